#!/usr/bin/env bash
# bash hw2_1.sh OUT [options of p1_test.py]: writes 1,000 faces, 64x64 PNG, into the folder OUT.
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -eu
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
[ "${1-}" ] || fail "usage: bash hw2_1.sh OUT"
find_python requirements.txt
if [ "$1" = --help ]; then exec "$python" "$repository/p1_test.py" --help; fi
exec "$python" "$repository/p1_test.py" --out="$1" "${@:2}"
