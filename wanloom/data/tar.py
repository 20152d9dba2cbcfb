"""WebDataset tar archives with the same bytes every time, and what a scan of their headers tells.

In: samples as tensors by the names of `TENSORS` and a record of where they come from. Out: the members
`<key>.json` and `<key>.safetensors`, one after the other; a shard is nothing but such pairs joined and an end mark. The
one decision: member headers carry no time, user or mode of this machine, so equal samples are equal bytes. Nothing here
can run code: latents are safetensors, and a pickled member is refused; nor can a small file take much memory: sparse
members and json members without measure are refused by their headers. Format: POSIX ustar.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, cast

from safetensors.torch import save
from torch import Tensor

from wanloom.errors import UserError
from wanloom.files import parse_json
from wanloom.tensors import TensorHeader, header_length, parse_header
from wanloom.terminal import is_text

END = bytes(2 * tarfile.BLOCKSIZE)
TENSORS = {"latents": ("C", "F", "H", "W"), "text": ("L", "D")}  # of a sample; others in its member are not read
MOST_JSON = 1 << 24  # bytes of a sample's record; captions are far shorter
PICKLED = {"pth", "pt", "pickle", "pkl", "pyd", "ckpt"}


class StoredSample(NamedTuple):
    """One sample of a tar: where it is and what its headers say."""

    key: str
    start: int  # byte at which the pair begins in the tar, and where it ends
    stop: int
    offset: int  # byte at which the safetensors data begins
    size: int
    shapes: dict[str, tuple[int, ...]]  # of those of `TENSORS` that the safetensors member has
    record: dict[str, Any]  # the json member


class Bounded:
    """A file of which nobody reads more at once than a record has: what a header says of its size is not believed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int) -> bytes:
        """As of a file. Raises ValueError for a size that cannot be."""
        if not 0 <= size <= MOST_JSON + tarfile.BLOCKSIZE:
            raise ValueError(f"a header has {size} bytes")
        return self._file.read(size)


def tar_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of one member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def tar_pair(key: str, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> bytes:
    """The two members of a sample; the sha256 of the safetensors member is added to the record."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    record = {**record, "sha256": hashlib.sha256(data).hexdigest()}
    text_data = json.dumps(record, indent=1, sort_keys=True).encode()
    return tar_member(f"{key}.json", text_data) + tar_member(f"{key}.safetensors", data)


def scan_tar(file: BinaryIO, name: str) -> Iterator[StoredSample]:
    """The samples of a tar, from its headers and json members. `name` is for the errors.

    Raises UserError for pickled members, pairs without one half, and a tar that ends too early.
    """
    record: tuple[str, int, dict[str, Any]] | None = None
    tensors: tuple[str, int, int, int, dict[str, tuple[int, ...]]] | None = None
    try:
        with tarfile.open(fileobj=cast(BinaryIO, Bounded(file)), mode="r:") as archive:
            for member in _members(archive, name):
                folder, slash, name_only = member.name.rpartition("/")
                stem, _, suffix = name_only.partition(".")  # as WebDataset has it
                key = folder + slash + stem
                stop = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if suffix == "json":
                    record = (key, member.offset, _read_json(archive, member))
                elif suffix == "safetensors":
                    shapes = read_shapes(file, member.offset_data, member.size)
                    tensors = (key, member.offset, member.offset_data, member.size, shapes)
                if record and tensors and record[0] == tensors[0] == key:
                    start = min(record[1], tensors[1])
                    yield StoredSample(key, start, stop, tensors[2], tensors[3], tensors[4], record[2])
                    record = tensors = None
    except RecursionError as error:  # a header of a header of a header
        raise UserError(f"{name} is damaged: its headers have no end. Restore the file.") from error
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(f"{name} is damaged: {error}. Restore the file or prepare the folder again.") from error
    left = record or tensors
    if left:
        other = "safetensors" if record else "json"
        raise UserError(f"{name} has no member '{left[0]}.{other}': every sample needs a json and a safetensors.")


def _members(archive: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, each as it can be. Raises UserError for a pickle, ValueError for what no writer makes."""
    for member in archive:
        if member.size < 0:  # the next header would be one that was read before, without end
            raise ValueError(f"the member '{member.name}' has {member.size} bytes")
        if not member.isfile():
            continue
        if member.issparse():
            raise ValueError(f"the member '{member.name}' is sparse, its bytes are not all there")
        if not is_text(member.name):
            raise ValueError(f"the name of the member {member.name!a} is not UTF-8")
        if member.name.rpartition("/")[2].partition(".")[2] in PICKLED:
            raise UserError(
                f"{name} holds the pickled member '{member.name}'. Pickles can run code and are never opened: "
                "prepare the data again with `wanloom prepare`."
            )
        yield member


def read_shapes(file: BinaryIO, offset: int, size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of latents and text of a safetensors member, from its header alone. Raises ValueError when it is none."""
    here = file.tell()
    file.seek(offset)
    length = header_length(file.read(8), size)
    entries = parse_header(file.read(length), size - 8 - length, TENSORS)
    file.seek(here)
    return {name: entry.shape for name, entry in entries.items()}


def view_tensors(data: Tensor) -> dict[str, Tensor]:
    """Latents and text of a safetensors member, as views of its bytes `(N,)` uint8: what it lacks is left out.

    Raises ValueError when it is none.
    """
    start = 8 + header_length(data[:8].numpy().tobytes(), len(data))
    entries = parse_header(data[8:start].numpy().tobytes(), len(data) - start, TENSORS)
    return {name: _view(data[start:], entry) for name, entry in entries.items()}


def _view(values: Tensor, entry: TensorHeader) -> Tensor:
    part = values[entry.begin : entry.end]
    if part.storage_offset() % entry.dtype.itemsize:  # some writers do not pad their header
        part = part.clone()
    return part.view(entry.dtype).view(entry.shape)


def _read_json(archive: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    if member.size > MOST_JSON:
        raise ValueError(f"the member '{member.name}' has {member.size} bytes, more than {MOST_JSON} of a record")
    data = archive.extractfile(member) or io.BytesIO()
    try:
        record = parse_json(data.read())
    except ValueError as error:
        raise ValueError(f"the member '{member.name}' is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"the member '{member.name}' is no json object")
    return record
