"""The header of a safetensors file: of what dtype and shape its tensors are, and where.

In: the first bytes of a file, and its size. Out: the entries that are asked for. The one decision: no number of a
header is used before it is known to fit the file. Format: the length of the header in 8 bytes, the header in JSON,
the values.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from wanloom.files import parse_json

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MOST_HEADER = 100_000_000  # bytes, as the format has it
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorHeader(NamedTuple):
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes after the header
    end: int


def header_length(data: bytes, size: int) -> int:
    """Bytes of the header of a file of `size` bytes that begins with the 8 of `data`. Raises ValueError for no file."""
    length = int.from_bytes(data, "little")
    if len(data) < 8 or length > size - 8:
        raise ValueError("a safetensors header is longer than its file")
    if length > MOST_HEADER:
        raise ValueError(f"a safetensors header has {length} bytes, more than the {MOST_HEADER} of the format")
    return length


def parse_header(data: bytes, size: int, names: Iterable[str]) -> dict[str, TensorHeader]:
    """The tensors of these names, what the header lacks left out; `size` bytes of values follow it.

    Raises ValueError when it is no header, or not one of such tensors.
    """
    try:
        header = parse_json(data)
    except ValueError as error:
        raise ValueError(f"a safetensors header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("a safetensors header is no table")
    return {name: _parse_entry(header[name], size) for name in names if name in header}


def _parse_entry(found: Any, size: int) -> TensorHeader:
    try:
        dtype, shape, (begin, end) = DTYPES[found["dtype"]], tuple(found["shape"]), found["data_offsets"]
        whole = all(isinstance(n, int) and 0 <= n < 2**63 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a safetensors header has {found}") from error
    if not whole or end > size or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"a safetensors header has {found}")
    return TensorHeader(dtype, shape, begin, end)
