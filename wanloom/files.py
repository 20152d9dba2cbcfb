"""Files that are whole or not there, and folders that one process has at a time.

In: bytes, or a block that writes a file by itself. Out: the file under its name. The one decision: a file is written
under a temporary name in the same folder, waited for until it is on the disk, then renamed; so neither a kill nor a
power loss leaves half of one under its name. A lock is the system's: it ends with the process, however that ends.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from wanloom.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_JSON = 64 << 20  # bytes; an index of 100,000 tensors has 10 MB, the vocabulary of UMT5 17
LOCK = ".lock"  # the file of a folder that is locked

BEGUN = re.compile(r"\..+\.\d+\.tmp")  # see `temporary_name`


def temporary_name(path: Path) -> Path:
    """Where a file is written before it takes its name; a kill leaves it, and `lock_folder` removes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what is written there replaces `path` when the block ends well."""
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None and error.errno in FULL:  # a write does not say of which file it was
            error.filename = str(path)
        raise
    finally:
        if temporary.exists():
            temporary.unlink()


def write_atomic(path: Path, chunks: bytes | Iterable[bytes]) -> None:
    """Write a file in one piece; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as temporary, temporary.open("wb") as file:
        file.writelines([chunks] if isinstance(chunks, bytes) else chunks)


def parse_json(data: str | bytes) -> Any:
    """JSON from outside. Raises ValueError for every fault of it, such as nesting that would exhaust the stack."""
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair, which is no character") from error
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no file.")
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise ValueError(f"it has {size >> 20} MiB")
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


def json_fault(error: ValueError) -> str:
    """What is wrong with one line of JSON. The parser counts lines itself: of one line it always says the first."""
    return f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def is_special(path: Path) -> bool:
    """Whether this, or what a link leads to, is a pipe or a device: reading it may never end."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:  # reading it will say why
        return False


def lock_folder(folder: Path, taken: str) -> TextIO:
    """Make the folder and lock it until the returned file is closed. Raises UserError, `taken` when another has it.

    What a process that was killed had begun to write there is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(taken) from error
    except OSError as error:
        file.close()
        raise UserError(f"The folder {folder} is on a disk without file locks: choose another.") from error
    for left in folder.glob(".*.tmp"):
        if BEGUN.fullmatch(left.name):
            left.unlink(missing_ok=True)
    return file


@contextmanager
def folder_for_one(folder: Path, taken: str) -> Iterator[None]:
    """`lock_folder` for a block, after which nothing of the lock is left in the folder."""
    path = folder / LOCK
    while True:
        file = lock_folder(folder, taken)
        try:
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        file.close()  # the one before has just removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link, of which what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_new(out: Path) -> None:
    """Raises UserError when something is at `out`."""
    if out.exists() or out.is_symlink():
        raise UserError(f"'{out}' is there already: give a new folder.")


@contextmanager
def whole_folder(out: Path, taken: str) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends well, and is gone when it does not; one process has it.

    Raises UserError when `out` is there, another process is writing it (`taken`), or the disk fails.
    """
    check_new(out)
    temporary = out.with_name(f".{out.name}.partial")
    if temporary.is_symlink():  # what it leads to is somebody's
        temporary.unlink()
    lock = lock_folder(temporary, taken)
    try:
        for left in temporary.iterdir():  # of a start that was killed
            if left.name != LOCK:
                remove(left)
        yield temporary
        check_new(out)
        (temporary / LOCK).unlink()
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {error.strerror or error}.") from error
    finally:
        remove(temporary)
        lock.close()


def clear_left(folder: Path) -> None:
    """Remove what a `whole_folder` of a process that was killed has left here, whatever it was writing."""
    for partial in folder.glob(".*.partial"):
        if partial.is_dir() and not partial.is_symlink() and (partial / LOCK).is_file():
            try:
                lock = lock_folder(partial, "")
            except UserError:
                continue  # of one that is at work
            remove(partial)
            lock.close()
