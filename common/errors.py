"""Errors a user can cause end as one line on stderr and a non-zero exit code."""

import argparse
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend. The message names the file or option, and the remedy."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and adds an option's default where its help does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if text.startswith("*"):  # Python 3.10 itself writes the default of --option / --no-option there
            text = text.removesuffix(" (default: %(default)s)")
        told = "default" in text or text.startswith("*")  # *: the default is the recipe's
        if told or any(action.default is none for none in (None, False, argparse.SUPPRESS)):
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Parses a script's options; ``--help`` shows its docstring. Raises UserError for what it cannot take."""

    def __init__(self, description: str | None, prog: str | None = None):
        super().__init__(prog, description=description, formatter_class=HelpFormatter)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, which takes the value of ``--out=--`` for a missing one, and gives an empty list."""
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"{word}: -- is no value; a path of that name is ./--")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def describe_os_error(error: OSError) -> str:
    """One line for an operating-system error: what failed, where, and what to do."""
    place = error.filename if error.filename is not None else "the output folder"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{place}: not permitted ({error.strerror}); choose a place you can read and write"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}: the disk is full; free some space or choose another place"
    return f"{place}: {error.strerror or error}; check this path, or choose another place"


def first_line(error: Exception) -> str:
    """What an error says, in a line; its kind when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python, PyTorch or CUDA says that there is not enough memory."""
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def drop_output() -> None:
    """Let what Python flushes at its exit go nowhere."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_main(main: Callable[[], None]) -> None:
    """Call ``main`` as a script's entry point: user errors become one line, Ctrl-C and SIGTERM clean up and end."""
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if sys.stderr is None:  # closed; progress bars need one
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()  # what cannot be written is told here, not at Python's exit
    except UserError as error:
        sys.exit(f"{name}: error: {error}")
    except BrokenPipeError:  # the reader of the output has left, as ``head`` does
        drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            drop_output()  # it may be what has no room
        sys.exit(f"{name}: error: {describe_os_error(error)}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"{name}: error: not enough memory; choose another --device, or lower --batch-size where there is one")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the clean end
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
