"""Weights on disk: published Wan transformers in diffusers or original naming, read strictly and written whole.

In: a transformer folder, a pipeline folder, one safetensors file, or shards with or without an index. Out: a filled
WanDiT. The one decision: `NAMES` is the only table of names, and the expected tensors follow from it and the config, so
every missing, unexpected or wrong-shaped tensor is known before the first one is read.
Only safetensors is read, tensor by tensor into the model's own memory: loading takes the model's size once.
Sources: the files of Wan-AI/Wan2.1-T2V-1.3B and Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from wanloom.config import build_config
from wanloom.errors import UserError
from wanloom.files import read_json
from wanloom.folders import StoredTensor, match_tensors, read_headers, read_tensors, tell_dtypes
from wanloom.formats.published import check_channels, config_json, find_files, parse_config, transformer_folder
from wanloom.geometry import PATCH
from wanloom.model.dit import PATCH_SIZE, WanDiT, materialise, on_meta
from wanloom.model.init import Fill
from wanloom.model.settings import DiTConfig

Layout = Literal["original", "diffusers"]
LAYOUTS: tuple[Layout, ...] = ("original", "diffusers")
SHARD_BYTES = 10 * 10**9
HEAD_DIM = 128  # of every published model

# (original, diffusers) modules, N for the number of the block. Ours are the original's, but that a modulation table is
# the `weight` of its module here and a bare parameter there, and that our patch embedding is a Linear.
NAMES = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("blocks.N.self_attn.q", "blocks.N.attn1.to_q"),
    ("blocks.N.self_attn.k", "blocks.N.attn1.to_k"),
    ("blocks.N.self_attn.v", "blocks.N.attn1.to_v"),
    ("blocks.N.self_attn.o", "blocks.N.attn1.to_out.0"),
    ("blocks.N.self_attn.norm_q", "blocks.N.attn1.norm_q"),
    ("blocks.N.self_attn.norm_k", "blocks.N.attn1.norm_k"),
    ("blocks.N.norm3", "blocks.N.norm2"),
    ("blocks.N.cross_attn.q", "blocks.N.attn2.to_q"),
    ("blocks.N.cross_attn.k", "blocks.N.attn2.to_k"),
    ("blocks.N.cross_attn.v", "blocks.N.attn2.to_v"),
    ("blocks.N.cross_attn.o", "blocks.N.attn2.to_out.0"),
    ("blocks.N.cross_attn.norm_q", "blocks.N.attn2.norm_q"),
    ("blocks.N.cross_attn.norm_k", "blocks.N.attn2.norm_k"),
    ("blocks.N.ffn.0", "blocks.N.ffn.net.0.proj"),
    ("blocks.N.ffn.2", "blocks.N.ffn.net.2"),
    ("blocks.N.modulation", "blocks.N.scale_shift_table"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)
TO_DIFFUSERS = dict(NAMES)
# tensors of variants that a WanDiT is not, in either naming
VARIANTS = {
    "image-to-video": r"img_emb|image_embedder|k_img|v_img|add_k_proj|add_v_proj",
    "VACE": r"^vace_",
    "Animate": r"motion_encoder|face_adapter|face_encoder",
}


def rename(name: str, layout: Layout) -> str:
    """Our parameter name in another layout. Raises ValueError for a name that the table does not have."""
    module, _, parameter = name.rpartition(".")
    row, number = re.subn(r"^blocks\.\d+\.", "blocks.N.", module)
    if row not in TO_DIFFUSERS:
        raise ValueError(f"'{name}' is no parameter of a WanDiT")
    theirs = row if layout == "original" else TO_DIFFUSERS[row]
    if number:
        theirs = theirs.replace(".N.", f".{module.split('.')[1]}.")
    return theirs if row.endswith("modulation") else f"{theirs}.{parameter}"


def shape_in_file(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of our parameter in both published layouts: the patch embedding is a Conv3d weight there."""
    return (shape[0], shape[1] // (PATCH[1] * PATCH[2]), *PATCH) if name == "patch_embedding.weight" else shape


def state_dict_as(state: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our state dict under the names and shapes of another layout; the tensors share memory."""
    return {rename(name, layout): x.reshape(shape_in_file(name, tuple(x.shape))) for name, x in state.items()}


def load_dit(path: str | Path, make: Callable[[DiTConfig], WanDiT] = materialise, fill: Fill = Tensor.copy_) -> WanDiT:
    """A WanDiT with the weights at `path`: `make` gives it memory, `fill` sets what of a parameter is here.

    Raises UserError when there is no readable model, it is a variant that a WanDiT is not, or any tensor is missing,
    unexpected or of another shape.
    """
    path = Path(path)
    files = find_files(path)
    stored = read_headers(files)
    check_variant(stored, path)
    config = config_of(files, stored)
    places = match_names(on_meta(config), stored, path)
    model = make(config)
    tell_dtypes(stored, path)
    params = dict(model.named_parameters())  # of this stage
    with torch.no_grad():
        for name, value in read_tensors({name: places[name] for name in params}):
            fill(params[name], value.reshape(params[name].shape))
    return model


def read_config(path: str | Path) -> DiTConfig:
    """The config of the model at `path`, from config.json or, where there is none, from the shapes of its tensors."""
    file = transformer_folder(Path(path)) / "config.json"
    if file.is_file():
        return parse_config(read_json(file), file)
    files = find_files(Path(path))
    return config_of(files, read_headers(files))


def config_of(files: list[Path], stored: dict[str, StoredTensor]) -> DiTConfig:
    """From the config.json beside the files, else from shapes, which do not tell the number of heads."""
    file = files[0].parent / "config.json"
    if file.is_file():
        return parse_config(read_json(file), file)
    layout = layout_of(stored)
    needed = ("patch_embedding.weight", "blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight")
    keys = [rename(name, layout) for name in (*needed, "head.head.weight")]
    if not all(key in stored and len(stored[key].shape) >= 2 for key in keys):
        raise UserError(f"{files[0]} is not a Wan transformer, and there is no config.json beside it.")
    patch, ffn, text, time, head = (stored[key].shape for key in keys)
    if patch[0] % HEAD_DIM or patch[0] < 1024:
        raise UserError(f"{files[0]} is no published Wan size (width {patch[0]}): it needs its config.json beside it.")
    blocks = {key.split(".")[1] for key in stored if re.match(r"blocks\.\d+\.", key)}
    channels = {"in_channels": patch[1], "out_channels": head[0] // PATCH_SIZE}
    sizes = {"ffn_dim": ffn[0], "num_heads": patch[0] // HEAD_DIM, "num_layers": len(blocks)}
    values = {"dim": patch[0], **sizes, **channels, "text_dim": text[1], "freq_dim": time[1]}
    try:
        return check_channels(build_config(DiTConfig, values), files[0])
    except UserError as error:
        raise UserError(f"{files[0]} has tensors of sizes that no Wan transformer has: {error}") from error


def layout_of(stored: dict[str, StoredTensor]) -> Layout:
    """The layout that more of the names belong to."""
    columns = zip(*NAMES, strict=True)
    modules = {re.sub(r"^blocks\.\d+\.", "blocks.N.", key).removesuffix(".weight") for key in stored}
    return max(zip((len(modules & set(column)) for column in columns), LAYOUTS, strict=True))[1]


def check_variant(stored: dict[str, StoredTensor], path: Path) -> None:
    """Raises UserError for the variants of Wan that have further tensors."""
    for variant, pattern in VARIANTS.items():
        if any(re.search(pattern, key) for key in stored):
            raise UserError(f"{path} is a Wan {variant} model; only text-to-video models are supported.")


def match_names(model: WanDiT, stored: dict[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """The place of each of our parameters. Raises UserError unless names and shapes match one to one."""
    layout = layout_of(stored)
    names = {name: rename(name, layout) for name, _ in model.named_parameters()}
    shapes = {names[name]: shape_in_file(name, tuple(param.shape)) for name, param in model.named_parameters()}
    match_tensors(shapes, stored, path)
    return {name: stored[key] for name, key in names.items()}


def save_weights(
    state: dict[str, Tensor],
    config: DiTConfig,
    path: str | Path,
    layout: Layout = "diffusers",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and safetensors, in shards above 10 GB, into a folder, which is made where it is missing.

    Raises UserError when it cannot be written; what there is by then stays.
    """
    from huggingface_hub import save_torch_state_dict

    path = Path(path)
    renamed, pattern = state_dict_as(state, layout), "diffusion_pytorch_model{suffix}.safetensors"
    text = json.dumps(config_json(config, layout), indent=2, sort_keys=True)
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(renamed, path, filename_pattern=pattern, max_shard_size=shard_bytes)
        (path / "config.json").write_text(text + "\n", encoding="utf-8")
        mode = (path / "config.json").stat().st_mode  # by the user's umask; safetensors writes for the owner alone
        for file in (*path.glob("*.safetensors"), *path.glob("*.json")):
            file.chmod(mode)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}.") from error
