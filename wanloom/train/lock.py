"""One training run per folder: an advisory lock that the system lets go of when the process ends, however it ends."""

import fcntl
from pathlib import Path
from typing import TextIO

from wanloom.config import UserError


def lock_folder(run_dir: Path) -> TextIO:
    """Make the folder and lock it until the returned file is closed. Raises UserError when another run has it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a")
    except OSError as error:
        raise UserError(f"The run folder {run_dir} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"Another run is training in {run_dir}: wait for it or stop it, or choose another run_dir."
        ) from error
    except OSError as error:
        file.close()
        raise UserError(f"The run folder {run_dir} is on a disk without file locks: choose another.") from error
    return file
