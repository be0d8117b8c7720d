"""Writing files so that nothing half-written is ever left under its final name."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError


def real_path(path: Path) -> Path:
    """The path without symbolic links, as ``Path.resolve``, which before Python 3.13 fails where links form a loop."""
    return Path(os.path.realpath(path))


def check_replaceable(path: Path) -> None:
    """Raises UserError when there is something else than a file under this name."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is a device or a pipe, which would be replaced; give the name of a file")


def file_in_the_way(path: Path) -> UserError:
    return UserError(f"{path}: is (or lies under) a file, not a folder; choose another output folder")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success rename it to ``path``, on any error remove it. Raises
    UserError when ``path`` is something else than a file."""
    check_replaceable(Path(path))
    path = real_path(path)  # what a symbolic link points to is replaced, not the link
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def alone_in(folder: Path, busy: str = "") -> Iterator[None]:
    """Wait until no other process or thread is in here with the same folder: for files that several scripts change.
    With ``busy`` raises UserError of this text instead. On file systems that have no locks nobody waits."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError:  # ENOSYS, ENOLCK: some network file systems
            pass
        yield
    finally:
        os.close(handle)


def make_folder(path: Path) -> Path:
    """Create an output folder with its parents. Raises UserError when a file is in the way."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise file_in_the_way(path) from None
    return path


def read_json(path: Path) -> dict | None:
    """The content of a JSON file; None when it is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_file(path: Path | None) -> None:
    """Raises UserError when ``path`` is something else than a file, OSError when it cannot be written. For use before
    long work."""
    if path:
        check_replaceable(path)
        check_writable(path.parent)


def check_apart(folder: Path | None, *outputs: Path | None) -> None:
    """Raises UserError when an output is ``folder``, a set of images, or in it: no image must get among others."""
    for out in outputs if folder else ():
        if out and real_path(out).is_relative_to(real_path(folder)):
            raise UserError(f"{out}: lies in {folder}, among the images of that folder; choose another place")


def check_writable(folder: Path) -> None:
    """Raises OSError when nothing can be written to ``folder``, or where it would be made, UserError when a file is in
    the way. For use before long work."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise file_in_the_way(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None  # not the temporary file's name
