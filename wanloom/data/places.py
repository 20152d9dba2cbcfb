"""What is where in a prepared folder, and which folders prepare may read and write.

In: an input and an output folder. Out: a UserError where one is in the way of the other. The one decision: this needs
no torch, so that a wrong folder is told before it is loaded.
"""

from pathlib import Path

from wanloom.errors import UserError

DONE = "prepare.json"  # written last: the folder is complete
WORK = ".work"  # what prepare keeps while it runs
REPORT = "report.json"
SPLITS = ("train", "val")


def check_folders(source: Path, out: Path) -> None:
    """Raise UserError when the two folders are in each other's way or `out` holds something else."""
    here, there = source.resolve(), out.resolve()
    if source.is_file():
        raise UserError(f"'{source}' is a file: give the folder that it is in.")
    if not source.is_dir():
        raise UserError(f"There is no folder '{source}'.")
    if (source / DONE).is_file():
        raise UserError(f"'{source}' is prepared already: train on it, or give the folder of the videos and images.")
    if (source / WORK / DONE).is_file():
        raise UserError(f"'{source}' is being prepared from another folder: give the folder of the videos and images.")
    if here == there or here.is_relative_to(there):
        raise UserError(f"The output folder '{out}' would hold the input '{source}': give another output folder.")
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file, not a folder.")
    if out.is_dir() and not (out / DONE).exists() and not (out / WORK).exists():
        other = sorted(path.name for path in out.iterdir() if path.name != REPORT)
        if other:
            raise UserError(f"'{out}' is not empty and was not made by prepare (it holds '{other[0]}').")
