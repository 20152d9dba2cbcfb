"""Model folders that others made: what their JSON says, which safetensors files hold the weights, and their tensors.

In: a folder or a file. Out: a config checked against a schema, the place, shape and dtype of every tensor, then the
tensors one by one. The one decision: nothing here is trusted. Only safetensors is opened, an index may name only files
beside it, no number of a config is used before its schema has bounded it, no tensor is made before its header agrees
with the model, and a value that is not finite is an error where it is read: later it would be a black video.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wanloom.errors import UserError
from wanloom.files import read_json
from wanloom.terminal import note

SHOWN = 3  # names of tensors in a message
BROKEN = ": the weights are broken, and every video would be black. Fetch or save them again"
# what programs put before or between the names of a model's parts
PREFIX = re.compile(r"^(?:model\.diffusion_model|diffusion_model|pipe\.dit|model|module)\.")
WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# what a file is whose weights are not there as they are, by the names of its tensors
LORA = re.compile(r"lora_[AB]\b|lora_(?:up|down)\b|^lora_unet_|\.(?:hada_w|lokr_w)\d|\.dora_scale$|\.alpha$")
SCALED = re.compile(r"(?:^|\.)(?:scaled_fp8|scale_weight|scale_input|weight_scale(?:_inv)?|input_scale)$")
QUANTISED = re.compile(r"\.(?:qweight|qzeros|wscales|SCB|absmax|quant_map|quant_state\.\w+|weight_format)$")
# of the dtypes in a header, those that are read
FLOATS = {"F64": "fp64", "F32": "fp32", "BF16": "bf16", "F16": "fp16", "F8_E4M3": "fp8", "F8_E5M2": "fp8 (e5m2)"}
USUAL = {"F32", "BF16"}

PACKAGE = Path(__file__).parent  # what is shipped is known


class StoredTensor(NamedTuple):
    """Where a tensor is, before it is read."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str = "F32"  # as safetensors calls it


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


def files_in(folder: Path, stem: str | None = None) -> list[Path]:
    """The safetensors files of the one model in a folder; of several, that of the usual name `stem`.

    Raises UserError where that is not clear, or there is none.
    """
    if stem and (folder / f"{stem}.safetensors.index.json").is_file():
        return files_of_index(folder / f"{stem}.safetensors.index.json")
    if stem and (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise UserError(f"{folder} has several indices; give the path of one: {', '.join(i.name for i in indices)}.")
    files = files_of_index(indices[0]) if indices else sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if not files:
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf"))
        why = f", only {shorten(others)}: such files can run code or are quantised, and are not read." if others else ""
        raise UserError(f"{folder} has no safetensors files{why or ': it holds no model.'}")
    return files


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """An open safetensors file; one that is corrupt or truncated is a UserError."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): fetch or write it again.") from error


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the files by its name, without what wrappers put into names.

    Raises UserError for a file that is not whole, a name that is there twice, and what is no model's own weights.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        with open_tensors(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                if key in found:
                    raise UserError(f"'{key}' is in {found[key].file} and in {file.name}: give the path of one file.")
                part = tensors.get_slice(key)
                found[key] = StoredTensor(file, key, tuple(part.get_shape()), part.get_dtype())
    check_kind(found)
    return without_wrappers(found)


def without_wrappers(found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors without a prefix that all of them carry, and without the names of wrappers."""
    out = {WRAPPERS.sub("", key): place for key, place in found.items()}
    while out and len(starts := {m and m[0] for m in map(PREFIX.match, out)}) == 1 and (start := starts.pop()):
        out = {key.removeprefix(start): place for key, place in out.items()}
    if len(out) < len(found):
        raise UserError(f"{next(iter(found.values())).file} has a tensor twice, with and without a prefix of its name.")
    return out


def check_kind(found: Mapping[str, StoredTensor]) -> None:
    """Raises UserError for LoRA and for weights that need scales or tables beside them."""

    def hits(pattern: re.Pattern[str]) -> Iterable[str]:
        return (key for key in found if pattern.search(key))

    if not found:
        return
    file = next(iter(found.values())).file
    if (lora := sum(1 for _ in hits(LORA))) * 2 > len(found):
        raise UserError(
            f"{file} is a LoRA ({lora} tensors), which changes a model and is none: wanloom cannot apply it. Give a "
            "transformer into which it was merged."
        )
    scaled, quantised = next(iter(hits(SCALED)), None), next(iter(hits(QUANTISED)), None)
    if scaled or quantised:
        kind = "scaled fp8" if scaled else "quantised"
        raise UserError(
            f"{file} holds {kind} weights (it has '{scaled or quantised}'), which only the program that they were made "
            "for can read: give the file in bf16, fp16 or fp32."
        )
    whole = next((key for key in found if found[key].dtype not in FLOATS), None)
    if whole:
        raise UserError(
            f"{file}: '{whole}' is of type {found[whole].dtype}, and quantised weights are not read: give the file in "
            "bf16, fp16 or fp32."
        )


def tell_dtypes(found: Mapping[str, StoredTensor], path: Path) -> None:
    """A line on weights that are not all of one of the usual types."""
    counts = dict[str, int]()
    for place in found.values():
        counts[place.dtype] = counts.get(place.dtype, 0) + 1
    if (len(counts) == 1 and counts.keys() <= USUAL) or PACKAGE in path.parents:
        return
    kinds = " and ".join(f"{count} in {FLOATS[dtype]}" for dtype, count in sorted(counts.items()))
    lost = ": in fp8 most of their precision is gone" if any(dtype.startswith("F8") for dtype in counts) else ""
    note(f"the tensors of {path} are {kinds}{lost}.")


def shorten(names: Iterable[str]) -> str:
    """The first of many names, and how many there are more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def match_tensors(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, StoredTensor], path: Path) -> None:
    """Raises UserError, one sentence, unless names and shapes agree one to one."""
    missing, unexpected = [key for key in wanted if key not in found], [key for key in found if key not in wanted]
    starts = {m[0] for m in map(PREFIX.match, found) if m}
    if len(missing) == len(wanted) and starts:
        raise UserError(f"{path} has several models in one: give the tensors under '{min(starts)}' alone.")
    if len(missing) == len(wanted):
        raise UserError(f"{path} holds another model: of its {len(found)} tensors ({shorten(found)}) none is expected.")
    shapes = [
        f"{key} ({list(found[key].shape)} in the file, {list(shape)} in the model)"
        for key, shape in wanted.items()
        if key in found and found[key].shape != tuple(shape)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    lines = [f"{len(names)} {kind}: {shorten(names)}" for kind, names in problems.items() if names]
    if lines:
        raise UserError(f"The tensors at {path} are not those of its config. {'. '.join(lines)}.")


def read_tensors(places: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name, each file opened once. Raises UserError for a value that is not finite."""
    for file in dict.fromkeys(place.file for place in places.values()):
        with open_tensors(file) as tensors:
            for name, place in places.items():
                if place.file == file:
                    value = tensors.get_tensor(place.key)
                    value = value.float() if value.dtype.itemsize == 1 else value  # fp8 has no operators
                    check_finite(value, f"{file}: '{place.key}'")
                    yield name, value


def check_finite(value: Tensor, what: str, harm: str = BROKEN) -> None:
    """Raises UserError for NaN and infinity, in one pass and without a copy."""
    if value.numel() and not all(map(torch.isfinite, torch.aminmax(value))):
        raise UserError(f"{what} holds NaN or infinity{harm}.")
