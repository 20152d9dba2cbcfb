"""The states of the empty caption, which `caption_dropout` puts in and guidance contrasts with.

In: a run and its folder. Out: the states, or nothing without `caption_dropout`. The one decision: they come from the
text encoder of the pipeline once, as prepare computes them, and are kept in the run folder with their checksum; every
checkpoint has it too, so that a run never goes on with others.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from wanloom.errors import UserError
from wanloom.files import write_atomic
from wanloom.formats.pipeline import find_pipeline
from wanloom.keys import keyed_normal
from wanloom.runs.recipe import Run

FILE = "empty_text.safetensors"


def empty_text(run: Run, run_dir: Path, text_dim: int, device: torch.device) -> Tensor | None:
    """The states `(L, text_dim)` fp32. Raises UserError when the file in the run folder is damaged or of others."""
    path = run_dir / FILE
    if run.caption_dropout == 0:
        return None
    if run.data.mock:
        return keyed_normal((1, text_dim), "mock", "empty text")
    if not path.is_file():
        from wanloom.codecs.text import TextCodec  # seconds to import

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        codec = TextCodec.load(find_pipeline(run.model, ("text_encoder", "tokenizer")), device, dtype)
        states = codec.encode([""])[0].float().contiguous()
        write_atomic(path, save({"text": states}, metadata={"sha256": sum_of(states)}))
    return read_states(path, text_dim)


def read_states(path: Path, text_dim: int) -> Tensor:
    """What is kept in the run folder. Raises UserError, with the way out, unless it is whole and fits the model."""
    try:
        with safe_open(path, framework="pt") as file:
            states, kept = file.get_tensor("text"), (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise damaged(path, f"it cannot be read: {error}") from error
    if states.dtype != torch.float32 or states.dim() != 2 or not len(states) or states.shape[1] != text_dim:
        raise damaged(path, f"it holds {states.dtype} {tuple(states.shape)}, and not fp32 (L, {text_dim})")
    if kept != sum_of(states) if kept else not states.isfinite().all():  # before it had a checksum
        raise damaged(path, "its content has changed")
    return states


def check_same(states: Tensor | None, stored: Mapping[str, Any], path: Path) -> None:
    """Raises UserError when the checkpoint of a run was made with other states of the empty caption."""
    kept = stored.get("empty_text")
    if kept is not None and (states is None or kept != sum_of(states)):
        raise UserError(
            f"{path} is not what this run was started with: restore it, start where it was started (another device "
            "rounds otherwise), or give another run_dir to start anew."
        )


def sum_of(states: Tensor) -> str:
    """The sha256 of the values."""
    return hashlib.sha256(states.contiguous().numpy().data).hexdigest()


def damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}): delete it, and it is made again from the text encoder.")
