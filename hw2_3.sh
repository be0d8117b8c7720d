#!/usr/bin/env bash
# bash hw2_3.sh IMAGES CSV [options of p3_test.py]: labels every image of the folder IMAGES (SVHN or USPS) in CSV.
set -eu
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
[ "${1-}" ] && [ "${2-}" ] || fail "usage: bash hw2_3.sh IMAGES CSV"
find_python requirements.txt
exec "$python" "$repository/p3_test.py" --images "$1" --out "${@:2}"
