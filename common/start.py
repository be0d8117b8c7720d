"""Imported by every script before all else, with nothing but Python's own modules: an old Python, a missing package and
Ctrl-C while packages load end in one line. What comes later is for ``common.errors.run_main``."""

import os
import sys
from types import TracebackType

NAME = os.path.basename(sys.argv[0])  # noqa: PTH119
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(NAME + ": error: needs Python 3.10 or later; bash hw2_1.sh OUT looks for one")


def in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        print(f"{NAME}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # after this hook Python's own status would be 1
    if isinstance(error, ModuleNotFoundError):
        remedy = "use .venv/bin/python, which the shell scripts make, or pip install -r requirements.txt"
        print(f"{NAME}: error: the package {error.name} is not installed; {remedy}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = in_one_line
