"""The parts that videos are made with: where each is, and how it comes into memory.

In: the names that are asked for. Out: `ModelFiles`, then text states, the transformer in a layout, and the VAE. The one
decision: the text encoder, which may be several times as large as the transformer, is read by the first process alone
and is gone when its states are there.
"""

import gc
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wanloom.codecs.settings import read_vae
from wanloom.codecs.text import TextCodec
from wanloom.config import expand_home
from wanloom.dist import gather, rank, together
from wanloom.errors import UserError, cut
from wanloom.formats.pipeline import find_pipeline, full_name
from wanloom.geometry import Geometry
from wanloom.model.dit import WanDiT, materialise
from wanloom.parallel import params
from wanloom.parallel.apply import apply_layout
from wanloom.parallel.mesh import Layout, Mesh
from wanloom.parallel.settings import ComputeConfig
from wanloom.runs.asked import Asked
from wanloom.runs.found import is_published
from wanloom.runs.trained import Weights, open_published, open_trained
from wanloom.terminal import note

PARTS = ("text_encoder", "tokenizer", "vae")


class ModelFiles(NamedTuple):
    """Weights of a transformer, and the pipeline that its other parts are read from."""

    name: str  # of the pipeline
    pipeline: Path
    weights: Weights
    ema: bool

    @property
    def checkpoint(self) -> Path | None:
        """Whose weights they are, where they are not those of the pipeline."""
        return None if self.weights.path == self.pipeline else self.weights.path


class Placing(NamedTuple):
    """Where and how exactly it is computed."""

    layout: Layout
    device: torch.device
    precision: str
    kernel: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def find_files(asked: Asked) -> ModelFiles:
    """The pipeline, and the weights of the transformer, which may be elsewhere."""
    given, name = asked.weights, asked.model
    if not given and name and (folder := Path(expand_home(name))).exists() and not (folder / "transformer").is_dir():
        given, name = folder, None  # a transformer alone, as the original layout has it: its parts are elsewhere
        if not is_published(given):
            raise UserError(f"'{given}' holds no model: a pipeline has the folders transformer, {', '.join(PARTS)}.")
    if not given:
        pipeline = find_pipeline(name or "tiny", (*PARTS, "transformer"))
        return ModelFiles(full_name(name or "tiny"), pipeline, open_published(pipeline), asked.ema)
    weights = open_trained(given, asked.ema)
    name = name or weights.model
    if not name:
        raise UserError(
            f"'{given}' is a transformer alone: give the pipeline that its VAE and text encoder are of too, such as "
            f"`checkpoint={given}` `model=Wan-AI/Wan2.1-T2V-1.3B-Diffusers`."
        )
    return ModelFiles(full_name(name), find_pipeline(name, PARTS), weights, asked.ema)


def encode_texts(files: ModelFiles, place: Placing, texts: list[str]) -> dict[str, Tensor]:
    """The states of every text on every process, encoded by the first, whose encoder is freed on return."""
    with together():
        states = encode_alone(files, place, texts) if rank() == 0 else []
    if place.layout.world > 1:
        lens = gather([len(x) for x in states])[0]
        empty = torch.empty(sum(lens), files.weights.config.text_dim, dtype=place.dtype)
        flat = torch.cat(states).to(place.dtype) if rank() == 0 else empty
        torch.distributed.broadcast(flat.view(torch.uint8), 0)  # bytes: not every gloo knows bf16
        states = list(flat.split(lens))
    return dict(zip(texts, states, strict=True))


def encode_alone(files: ModelFiles, place: Placing, texts: list[str]) -> list[Tensor]:
    """The states of every text."""
    codec = TextCodec.load(files.pipeline, place.device, place.dtype)
    model = files.weights.config
    if codec.dim != model.text_dim:
        raise UserError(
            f"The text encoder of '{files.name}' gives states of {codec.dim} numbers, the transformer takes "
            f"{model.text_dim}: they do not belong together."
        )
    for text in texts:
        count = codec.count_tokens(text)
        if count > model.text_slots:
            note(f"of {count} tokens only the first {model.text_slots} are used: {cut(text)}")
    states = codec.encode(texts, model.text_slots)
    del codec
    gc.collect()  # the encoder holds itself in cycles
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
    return states


def load_model(files: ModelFiles, place: Placing, mesh: Mesh) -> WanDiT:
    """The part of the transformer that is this process's: `tp` splits it, and FSDP what that leaves."""
    apply = partial(apply_layout, mesh=mesh, compute=ComputeConfig())  # the weights are cast
    make = partial(materialise, dtype=place.dtype, device=place.device, kernel=place.kernel, apply=apply)
    model = files.weights.load_model(make)
    if rank() == 0 and not params.local(model.head.head.weight).any():
        note(f"the transformer of '{files.name}' is untrained, it will give noise")
    return model.eval().requires_grad_(False)


def find_geometry(files: ModelFiles) -> Geometry:
    """That of the VAE. Raises UserError when it is no known one, or the VAE does not belong to the transformer."""
    geometry, channels = read_vae(files.pipeline).geometry, files.weights.config.out_channels
    if geometry.channels != channels:
        raise UserError(
            f"The VAE of '{files.name}' has {geometry.channels} channels, the transformer takes {channels}: they do "
            "not belong together."
        )
    return geometry
