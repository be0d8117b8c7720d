"""Numbers on the command line: types of options that refuse what makes no sense, before anything is done."""

import argparse
import math
from collections.abc import Callable


def number(kind: type, what: str, accepts: Callable[[float], bool]) -> Callable[[str], int | float]:
    """A type for argparse: the finite number that a text says, if it is accepted. ``what`` says in the error what is
    expected. Raises ArgumentTypeError for any other text."""

    def convert(text: str) -> int | float:
        try:
            value = kind(text)
            accepted = math.isfinite(value) and accepts(value)
        except (ValueError, OverflowError):
            accepted = False
        if not accepted:
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return convert


positive_int = number(int, "a positive whole number", lambda x: x >= 1)
positive_float = number(float, "a positive number", lambda x: x > 0)
from_zero = number(int, "a whole number from 0", lambda x: x >= 0)
several = number(int, "a whole number from 2", lambda x: x >= 2)
several_or_none = number(int, "0 or a whole number from 2", lambda x: x == 0 or x >= 2)
weight = number(float, "a number from 0", lambda x: x >= 0)
share_of_one = number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)
seed = number(int, "a whole number from -2^63 to below 2^63", lambda x: -(2**63) <= x < 2**63)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """The device, for ``common.device.pick_device``."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def add_dims_option(parser: argparse.ArgumentParser) -> None:
    what = "with --evaluate: size of the Inception features (default: 2048 where the weights have them)"
    parser.add_argument("--dims", type=int, choices=(768, 2048), help=what)
