# Sourced by the wrappers:  . python.sh; find_python requirements.txt [more.txt ...]
#
# Sets $python to $PYTHON or python3 when it has every package that the files name, in a version they allow; else to the
# Python of .venv, which is made once. A line of a requirements file reads "package>=version  # module".

repository=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)

has_packages() { # PYTHON FILE...
    "$1" -c '
import sys
assert (3, 10) <= sys.version_info
sys.path = [place for place in sys.path if place]  # a folder of that name where the user is counts for nothing
import re
from importlib import metadata, util

def numbers(version):
    return [int(n) for n in re.findall("[0-9]+", version)[:2]]

for line in (line for name in sys.argv[1:] for line in open(name)):
    package, _, module = (part.strip() for part in line.partition("#"))
    if package and util.find_spec(module) is None:
        sys.exit(1)
    name, _, least = package.partition(">=")
    try:
        if least and numbers(metadata.version(name)) < numbers(least):
            sys.exit(1)
    except metadata.PackageNotFoundError:
        pass  # installed under another name
' "${@:2}" 2>/dev/null
}

fail() {
    echo "$(basename "$0"): error: $1" >&2
    exit 1
}

is_made() { # ENVIRONMENT FILE...
    local file
    for file in "${@:2}"; do cmp -s "$file" "$1/$(basename "$file")" || return 1; done
    has_packages "$1/bin/python" "${@:2}"
}

make_environment() { # ENVIRONMENT BASE FILE...
    local environment=$1 base=$2 python=$1/bin/python file
    trap 'fail "interrupted; start again to go on"' INT
    exec 9<"$repository"
    if command -v flock >/dev/null; then flock 9; fi # two scripts started at once
    if is_made "$environment" "${@:3}"; then return; fi
    echo "$(basename "$0"): $base lacks packages of $(basename -a "${@:3}" | xargs); installing them into $environment, once" >&2
    { "$python" -m pip --version >/dev/null 2>&1 || "$base" -m venv "$environment" --clear; } >&2 ||
        fail "$environment could not be made; install Python's venv, free some space, or copy $repository where you can write"
    for file in "${@:3}"; do
        "$python" -m pip install --quiet --disable-pip-version-check --requirement "$file" >&2 ||
            fail "$file could not be installed; connect to a network, free 6 GB here and in ${TMPDIR:-/tmp}, or set PYTHON to a Python that has the packages"
        cp "$file" "$environment/"
    done
}

find_python() {
    local files=() environment=$repository/.venv base=${PYTHON:-python3} file
    case $base in /*) ;; */*) base=$PWD/$base ;; esac # the caller may change the folder
    for file; do files+=("$repository/$file"); done
    python=$base
    if has_packages "$python" "${files[@]}"; then return; fi
    python=$environment/bin/python
    if is_made "$environment" "${files[@]}"; then return; fi
    "$base" -c 'import sys; assert (3, 10) <= sys.version_info' 2>/dev/null ||
        fail "$base is no Python 3.10 or later; install one, or set PYTHON to it"
    (make_environment "$environment" "$base" "${files[@]}") || exit 1
}
