"""What checkpoints a run has, and whether they are whole.

In: the folder of a run, or RUN/checkpoints/step_0001000/. Out: paths, the state of the run, or one sentence on what is
damaged. The one decision: state.json names every file with its size and checksum, its own among them, and nothing else
counts; a damaged checkpoint is named with the whole one before it, never skipped quietly. What this version did not
write may lack the sums of run.yaml and state.json.
"""

import json
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, ValidationError

from wanloom.config import Config, explain_yaml, load_yaml
from wanloom.errors import UserError
from wanloom.files import parse_json

FOLDER = "checkpoints"
NAME = re.compile(r"step_\d{7,}")
THREADS = 4  # that read files and compare checksums
Count = Annotated[int, Field(ge=0, lt=2**63)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.safetensors$")]  # never a path


class FileSum(Config):
    """What a file must be."""

    bytes: int
    crc32: int


class SavedState(Config):
    """What state.json must say; there may be more."""

    model_config = ConfigDict(extra="allow")

    crc32: int | None = None  # of the rest
    recipe: FileSum | None = None  # run.yaml
    step: Count
    files: dict[FileName, FileSum]
    model: dict[str, Any] = Field(default_factory=dict)
    trained: list[str] | None = None  # parameters, where it holds no others
    base: str | None = None  # then the identity of what has the others
    data: str = ""
    samples: Count = 0
    tokens: Count = 0
    seconds: float = 0.0
    window: dict[str, float] = Field(default_factory=dict)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run_dir / FOLDER
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint tells."""
    return int(checkpoint.name.removeprefix("step_"))


def find_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run folder, or the checkpoint folder itself. Raises UserError if there is none."""
    if (path / "state.json").is_file():
        return path
    if not path.is_dir():
        raise UserError(f"There is no folder {path}: give a run folder or one of its checkpoints.")
    found = list_checkpoints(path.parent if path.name == FOLDER else path)  # or the folder that holds them
    if not found:
        raise UserError(
            f"{path} holds no checkpoint: give the folder of a run that has saved one (run_dir of the run)."
        )
    return found[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of the run at this checkpoint. Raises UserError when state.json is missing or broken."""
    try:
        return _parse_state(checkpoint)
    except ValueError as error:
        raise damaged(checkpoint, str(error)) from error


def seal(state: Mapping[str, Any], recipe: bytes) -> dict[str, Any]:
    """The state of a checkpoint with the sum of its run.yaml, and its own."""
    sealed = {**state, "recipe": {"bytes": len(recipe), "crc32": zlib.crc32(recipe)}}
    return {**sealed, "crc32": _state_sum(sealed)}


def _state_sum(state: Mapping[str, Any]) -> int:
    rest = {name: value for name, value in state.items() if name != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _parse_state(checkpoint: Path) -> dict[str, Any]:
    """Raises ValueError, which says what is wrong with state.json, or with the run.yaml and the name that it tells."""
    state = _read_state(checkpoint)
    if NAME.fullmatch(checkpoint.name) and state["step"] != step_of(checkpoint):
        raise ValueError(f"state.json is of step {state['step']}, and the folder has another name")
    if state["recipe"] is not None and (damage := _file_damage(checkpoint / "run.yaml", state["recipe"])):
        raise ValueError(damage)
    return state


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        found = parse_json((checkpoint / "state.json").read_bytes())
        state = SavedState.model_validate(found).model_dump()
        if state["crc32"] not in (None, _state_sum(found)):
            raise ValueError("its content has changed")
        return state
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"{place}: {first['msg']}" if place else "it is not an object"
        raise ValueError(f"state.json cannot be read ({reason})") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"state.json cannot be read ({error})") from error


def read_recipe(checkpoint: Path) -> dict[str, Any]:
    """What run.yaml of a checkpoint says. Raises UserError when it is no recipe."""
    path = checkpoint / "run.yaml"
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = explain_yaml(error) if isinstance(error, yaml.YAMLError) else error
        raise UserError(f"{path} cannot be read: {reason}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read: it holds no settings.")
    return values


def find_damage(checkpoint: Path, first: int = 0, stride: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a few words with the file's name, or None.

    Reads every file; with `first` and `stride` only each `stride`-th of them, so that the ranks can share them.
    """
    try:
        files = _parse_state(checkpoint)["files"]
        strangers = {path.name for path in checkpoint.glob("*.safetensors")} - set(files)
        if strangers:
            return f"{min(strangers)} does not belong to it"
        with ThreadPoolExecutor(THREADS) as pool:  # reading and the CRC-32 run beside each other, without the GIL
            found = pool.map(lambda name: _file_damage(checkpoint / name, files[name]), sorted(files)[first::stride])
            damage = next(filter(None, found), None)
            pool.shutdown(cancel_futures=True)
            return damage
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})" if error.filename else str(error)


def _file_damage(path: Path, expected: dict[str, int]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    return f"the content of {path.name} has changed" if _checksum(path) != expected["crc32"] else None


def damaged(checkpoint: Path, damage: str) -> UserError:
    """What to tell of a damaged checkpoint; reads those before it until one is whole."""
    found = list_checkpoints(checkpoint.parent.parent)
    older = takewhile(lambda p: p.name != checkpoint.name, found)
    whole = next((p for p in reversed(list(older)) if find_damage(p) is None), None)
    advice = (
        f"The one before it, {whole}, is whole: to go on from there, delete {checkpoint} and start again."
        if whole
        else "There is no older whole checkpoint."
    )
    return UserError(f"The checkpoint {checkpoint} is damaged: {damage}. {advice}")


def _checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value
