#!/usr/bin/env bash
# bash test.sh [options of pytest]: checks style, then runs the tests. Needs no GPU, no data, no network once installed.
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/python.sh"
find_python requirements.txt requirements-test.txt
cd "$repository"
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
