#!/usr/bin/env bash
# bash hw2_3.sh IMAGES CSV [options of p3_test.py]: labels every image of the folder IMAGES (SVHN or USPS) in CSV.
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -eu
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
[ "${1-}" ] && { [ "${2-}" ] || [ "$1" = --help ]; } || fail "usage: bash hw2_3.sh IMAGES CSV"
find_python requirements.txt
if [ "$1" = --help ]; then exec "$python" "$repository/p3_test.py" --help; fi
exec "$python" "$repository/p3_test.py" --images="$1" --out="$2" "${@:3}"
