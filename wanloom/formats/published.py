"""Published transformers: which files hold the weights, and what config.json says.

In: a path. Out: safetensors files and a DiTConfig. The one decision: a config.json that describes another network than
WanDiT is an error, not a guess.
Sources: config.json of Wan-AI/Wan2.1-T2V-1.3B (original) and Wan-AI/Wan2.1-T2V-1.3B-Diffusers; the safetensors format.
"""

from pathlib import Path
from typing import Any

from wanloom.config import build_config
from wanloom.errors import MOST_REASON, UserError, cut
from wanloom.folders import files_in, files_of_index
from wanloom.geometry import PATCH
from wanloom.model.settings import DiTConfig
from wanloom.terminal import note

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
    return files_in(path)


def parse_config(values: dict[str, Any], file: Path) -> DiTConfig:
    """The content of a config.json in either style. Raises UserError when WanDiT is not the network it describes."""
    for key, allowed in BUILT_IN.items():
        if key in values and values[key] not in allowed:
            raise UserError(
                f"{file}: {key} is {cut(str(values[key]), 60)!r}, but only Wan text-to-video transformers are read, "
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
        note(f"{file}: not read: {', '.join(unread)}")
    try:
        out = build_config(DiTConfig, config)
    except UserError as error:
        raise UserError(f"{file} does not describe a Wan transformer. {cut(str(error), MOST_REASON)}") from error
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
