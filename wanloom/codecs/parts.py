"""The modules of a pipeline that diffusers and transformers know: built from a checked config, filled from safetensors.

In: a folder with config.json and weights, and the schema of its config. Out: a module that holds the file's values.
The one decision: only what the schema names reaches the library, and no library reads the folder. So nothing in it can
name code, a hub, an adapter, a quantiser or another file, and a number is bounded before a module of that size is made.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from wanloom.errors import UserError
from wanloom.folders import files_in, match_tensors, read_headers, read_tensors, tell_dtypes
from wanloom.terminal import note

M = TypeVar("M", bound=nn.Module)


def fill_part(
    module: M,
    folder: Path,
    stem: str,
    dtype: torch.dtype,
    device: torch.device,
    ignored: tuple[str, ...] = (),
    tied: tuple[str, str] = ("", ""),
) -> M:
    """The module, made on the meta device, with the weights of `folder`; tensors under `ignored` names are not read.

    Of `tied` names, which are one tensor, a file may have either or both. Raises UserError when a tensor is missing,
    unexpected, of another shape or not finite.
    """
    stored = read_headers(files_in(folder, stem))
    kept = {key: place for key, place in stored.items() if not key.startswith(ignored)} if ignored else dict(stored)
    if len(kept) < len(stored):
        note(f"{len(stored) - len(kept)} tensors of {folder} belong to parts that Wan does not use: not read.")
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    if tied[1] in kept:
        kept.setdefault(tied[0], kept[tied[1]])
    if tied[0] in kept:
        kept.setdefault(tied[1], kept[tied[0]])
    match_tensors(wanted, kept, folder)
    tell_dtypes(kept, folder)
    values = {name: value.to(dtype) for name, value in read_tensors(kept)}
    if tied[0] and kept[tied[0]] != kept[tied[1]] and not torch.equal(values[tied[0]], values[tied[1]]):
        raise UserError(f"{folder}: '{tied[0]}' and '{tied[1]}' are one tensor of the model, but differ in the files.")
    module.load_state_dict(values, assign=True)
    module.eval().requires_grad_(False).to(device)
    return module


class ForeignError(Exception):
    """What a library raised about the bytes of a file from outside, in its words."""


class Foreign(AbstractContextManager[None]):
    """`with Foreign():` around a library that reads a file from outside: all it raises about it is a ForeignError.

    A Rust library raises a bare `Exception`, a TypeError of its own code, or a panic, which is no `Exception` at all.
    So only here, where no code of ours runs inside, everything is taken but what is of the machine or the user.
    """

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, MemoryError | KeyboardInterrupt | SystemExit | GeneratorExit):
            words = " ".join(str(error).split())
            raise ForeignError(words[:200].rstrip(".") or type(error).__name__) from error
