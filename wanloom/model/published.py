"""Published model folders: which files hold the weights, what config.json says, and which tensors are there.

In: a path. Out: safetensors files, a DiTConfig, and the place and shape of every tensor, nothing of them read yet. The
one decision: files from elsewhere are not trusted. Only safetensors is opened, an index may name only files beside it,
and a config.json that describes another network than WanDiT is an error, not a guess.
Sources: config.json of Wan-AI/Wan2.1-T2V-1.3B (original) and Wan-AI/Wan2.1-T2V-1.3B-Diffusers; the safetensors format.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from wanloom.config import UserError, build_config
from wanloom.files import parse_json
from wanloom.model.dit import DiTConfig
from wanloom.model.sequence import PATCH

PREFIX = "model.diffusion_model."  # some single files carry it

# (ours, original, diffusers) keys of config.json; diffusers gives the width of a head in place of that of the model
CONFIG_KEYS = (
    ("dim", "dim", None),
    ("ffn_dim", "ffn_dim", "ffn_dim"),
    ("num_heads", "num_heads", "num_attention_heads"),
    ("num_layers", "num_layers", "num_layers"),
    ("in_channels", "in_dim", "in_channels"),
    ("out_channels", "out_dim", "out_channels"),
    ("text_dim", "text_dim", "text_dim"),
    ("freq_dim", "freq_dim", "freq_dim"),
    ("text_slots", "text_len", None),
    ("eps", "eps", "eps"),
)
# what a WanDiT has built in; a config.json that says otherwise describes another network
BUILT_IN: dict[str, tuple[Any, ...]] = {
    "_class_name": ("WanTransformer3DModel", "WanModel"),
    "model_type": ("t2v",),
    "patch_size": (list(PATCH),),
    "qk_norm": ("rms_norm_across_heads", True),
    "cross_attn_norm": (True,),
    "window_size": ([-1, -1],),
    "image_dim": (None,),
    "added_kv_proj_dim": (None,),
    "pos_embed_seq_len": (None,),
}
UNUSED = {"rope_max_seq_len"}  # our angles are computed for any length

log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """Where a tensor is, before it is read."""

    file: Path
    key: str
    shape: tuple[int, ...]


def transformer_folder(path: Path) -> Path:
    """`path` itself, or the transformer of the pipeline there."""
    if not path.exists():
        raise UserError(f"There is no model at {path}.")
    if not (path / "transformer").is_dir():
        return path
    if (path / "transformer_2").is_dir():
        raise UserError(f"{path} has two transformers (Wan 2.2 A14B); give the folder of one of them.")
    return path / "transformer"


def find_files(path: Path) -> list[Path]:
    """The safetensors files of the model at `path`, sorted. Raises UserError unless there is exactly one model."""
    path = transformer_folder(path)
    if path.is_file():
        if path.name.endswith(".index.json"):
            return files_of_index(path)
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is not a safetensors file: only those are read, because they cannot run code.")
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise UserError(f"{path} has several indices; give the path of one: {', '.join(i.name for i in indices)}.")
    files = files_of_index(indices[0]) if indices else sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} has neither safetensors files nor a folder 'transformer': it holds no model.")
    return files


def files_of_index(path: Path) -> list[Path]:
    """The shards that an index names."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no 'weight_map' from tensors to files.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # a name that leads elsewhere would read files that the model's author has no business with
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{path} names '{name}', which is not a safetensors file beside it.")
        if not (path.parent / name).is_file():
            raise UserError(f"{path} names '{name}', but that file is missing: fetch the model again.")
    return [path.parent / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """An open safetensors file; one that is corrupt or truncated is a UserError."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): fetch or write it again.") from error


def read_headers(files: list[Path]) -> dict[str, Stored]:
    """Every tensor of the files by its name; a prefix that all of them carry is taken off."""
    found: dict[str, Stored] = {}
    for file in files:
        with open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                if key in found:
                    raise UserError(f"'{key}' is in {found[key].file} and in {file.name}: give the path of one file.")
                found[key] = Stored(file, key, tuple(tensors.get_slice(key).get_shape()))
    if found and all(key.startswith(PREFIX) for key in found):
        found = {key.removeprefix(PREFIX): place for key, place in found.items()}
    return found


def parse_config(values: dict[str, Any], file: Path) -> DiTConfig:
    """The content of a config.json in either style. Raises UserError when WanDiT is not the network it describes."""
    for key, allowed in BUILT_IN.items():
        if key in values and values[key] not in allowed:
            raise UserError(
                f"{file}: {key} is {values[key]!r}, but only Wan text-to-video transformers are supported, "
                f"where it is {allowed[0]!r}."
            )
    diffusers = "num_attention_heads" in values
    names = {theirs if diffusers else original: ours for ours, original, theirs in CONFIG_KEYS}
    config = {ours: values[key] for key, ours in names.items() if key is not None and values.get(key) is not None}
    if diffusers:
        heads, width = values["num_attention_heads"], values.get("attention_head_dim", 128)
        if not isinstance(heads, int) or not isinstance(width, int):
            raise UserError(f"{file}: num_attention_heads and attention_head_dim must be whole numbers.")
        config["dim"] = heads * width
    unread = values.keys() - names.keys() - BUILT_IN.keys() - UNUSED - {"attention_head_dim"}
    unread = sorted(key for key in unread if not key.startswith("_"))
    if unread:
        log.warning("%s: not read: %s", file, ", ".join(unread))
    try:
        out = build_config(DiTConfig, config)
    except UserError as error:
        raise UserError(f"{file} does not describe a Wan transformer. {error}") from error
    return check_channels(out, file)


def check_channels(config: DiTConfig, file: Path) -> DiTConfig:
    """Raises UserError for models that take condition latents beside the noisy ones."""
    if config.in_channels != config.out_channels:
        raise UserError(
            f"{file}: the model takes {config.in_channels} channels and gives {config.out_channels}; "
            "image-to-video models are not supported."
        )
    return config


def config_json(config: DiTConfig, layout: str) -> dict[str, Any]:
    """The content of a config.json that the loaders of `layout` read."""
    if layout == "diffusers" and config.text_slots != 512:
        raise UserError(f"diffusers has no models with {config.text_slots} text slots: use the original layout.")
    if layout == "original":
        out = {original: getattr(config, ours) for ours, original, _ in CONFIG_KEYS}
        return {"_class_name": "WanModel", "model_type": "t2v", **out}
    out = {theirs: getattr(config, ours) for ours, _, theirs in CONFIG_KEYS if theirs}
    return {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": config.dim // config.num_heads,
        "patch_size": list(PATCH),
        "qk_norm": "rms_norm_across_heads",
        "cross_attn_norm": True,
        **out,
    }
