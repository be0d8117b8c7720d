#!/usr/bin/env bash
# bash hw2_2.sh OUT [options of p2_test.py]: writes 1,000 digits, 28x28 PNG, 0_001.png ... 9_100.png, into OUT.
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -eu
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/python.sh"
[ "${1-}" ] || fail "usage: bash hw2_2.sh OUT"
find_python requirements.txt
if [ "$1" = --help ]; then exec "$python" "$repository/p2_test.py" --help; fi
exec "$python" "$repository/p2_test.py" --out="$1" "${@:2}"
