# Sourced by the wrappers:  . python.sh; find_python requirements.txt [more.txt ...]
#
# Sets $python to $PYTHON or python3 when it has every module that the files name; else to the Python of .venv,
# which is made once. A line of a requirements file reads "package  # module".

repository=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)

has_modules() { # PYTHON FILE...
    "$1" -c '
import importlib.util, sys
assert (3, 10) <= sys.version_info
lines = [line.partition("#") for name in sys.argv[1:] for line in open(name)]
modules = [module.strip() for package, _, module in lines if package.strip()]
sys.exit(any(importlib.util.find_spec(module) is None for module in modules))' "${@:2}" 2>/dev/null
}

fail() {
    echo "$(basename "$0"): error: $1" >&2
    exit 1
}

find_python() {
    local files=() environment=$repository/.venv base=${PYTHON:-python3} file
    for file; do files+=("$repository/$file"); done
    python=$base
    if has_modules "$python" "${files[@]}"; then return; fi

    python=$environment/bin/python
    local ready=yes
    for file in "${files[@]}"; do cmp -s "$file" "$environment/$(basename "$file")" || ready=; done
    if [ $ready ] && [ -x "$python" ]; then return; fi

    "$base" -c 'import sys; assert (3, 10) <= sys.version_info' 2>/dev/null ||
        fail "$base is no Python 3.10 or later; install one, or set PYTHON to it"
    echo "$(basename "$0"): $base lacks packages of $*; installing them into $environment, once" >&2
    { "$python" -m pip --version >/dev/null 2>&1 || "$base" -m venv "$environment" --clear; } >&2 ||
        fail "$environment could not be made; install Python's venv, or free some space"
    for file in "${files[@]}"; do
        "$python" -m pip install --quiet --disable-pip-version-check --requirement "$file" >&2 ||
            fail "$file could not be installed; connect to a network, or set PYTHON to a Python that has the packages"
        cp "$file" "$environment/"
    done
}
