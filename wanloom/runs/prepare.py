"""A folder of media to a folder to train on: from the name of a model and settings to the report."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wanloom.codecs.identity import ENCODERS, encoder_identity
from wanloom.codecs.settings import read_vae
from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.config import expand_home
from wanloom.data.places import check_folders
from wanloom.dist import check_alike, pick_device, together
from wanloom.formats.pipeline import find_pipeline
from wanloom.memory import enough_memory
from wanloom.options import build_flat
from wanloom.prepare.encode import Encoders, Progress
from wanloom.prepare.run import Prepared, PrepareJob, encode_folder
from wanloom.prepare.settings import PrepareConfig, check_batch
from wanloom.threads import one_thread


def prepare(
    source: str | Path,
    out: str | Path,
    model: str = "tiny",
    device: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **settings: Any,
) -> Prepared:
    """Encode the media and captions below `source` for a model, or go on where an earlier start stopped.

    `model` is a folder in diffusers layout, a name on the hub or "tiny". The settings are those of `PrepareConfig` and
    its sections, side by side. Every rank of a run calls it. Raises UserError, the same on every rank.
    """
    config = build_flat(PrepareConfig, settings)
    source, out = Path(expand_home(str(source))), Path(expand_home(str(out)))
    with together():
        check_folders(source, out)  # before a large model is fetched
        kind = pick_device(device).type
        check_batch(config, kind)
        pipeline = find_pipeline(model, sum(ENCODERS.values(), ()))
        geometry = read_vae(pipeline).geometry
        # also where: by rounding a GPU encodes otherwise than a CPU
        identity = {name: encoder_identity(pipeline, name) for name in ENCODERS} | {"device": kind}
    check_alike(identity, "samples")
    with one_thread() if kind == "cpu" else nullcontext():  # the bytes of any number of processes are equal
        load = partial(_load_with_room, pipeline, kind)
        return encode_folder(PrepareJob(source, out, config, geometry, identity, load, on_progress))


def _load_with_room(pipeline: Path, device: str) -> Encoders:
    """The encoders. Raises UserError when the memory does not suffice for them alone."""
    helps = ["`device=cpu`"] if device == "cuda" else ["another machine, as the encoders alone need more"]
    with enough_memory(f"load the VAE and the text encoder of {pipeline}", helps):
        return load_encoders(pipeline, device)


def load_encoders(pipeline: Path, device: str) -> Encoders:
    """The VAE (fp32) and the text encoder (bf16 on a GPU, else fp32) of a pipeline."""
    vae = VaeCodec.load(pipeline, device)
    text = TextCodec.load(pipeline, device, torch.bfloat16 if device == "cuda" else torch.float32)
    return Encoders(vae.encode_batch, lambda caption, most: text.encode([caption], most)[0], text.count_tokens)
