"""Archives: their members are views of their tensors, and what no writer makes is refused."""

import io
import json
import tarfile

import pytest
import torch
from safetensors.torch import save
from small_shards import draw, named

from wanloom.data.tar import END, MOST_JSON, scan_tar, tar_member, tar_pair, view_tensors
from wanloom.errors import UserError
from wanloom.tensors import header_length


def test_views_of_a_member_are_its_tensors() -> None:
    latents, text = draw(1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        data = save({"text": text.to(dtype), "latents": latents.float(), "other": torch.arange(3)})
        length = int.from_bytes(data[:8], "little")
        unpadded = data[8 : 8 + length].rstrip(b" ")
        for odd in (0, 1, 3):  # other writers need not pad to what a view needs
            moved = (len(unpadded) + odd).to_bytes(8, "little") + unpadded + b" " * odd + data[8 + length :]
            views = view_tensors(torch.frombuffer(bytearray(moved), dtype=torch.uint8))
            assert views.keys() == {"latents", "text"}
            assert torch.equal(views["latents"], latents.float())
            assert views["text"].dtype == dtype and torch.equal(views["text"], text.to(dtype))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [0, 8]},
        [],
        None,
    ],
)
def test_a_member_that_is_none_is_a_value_error(entry: object) -> None:
    for header in (json.dumps({"latents": entry}).encode(), b"[]", b"{", b"\xff", b"[" * 100_000):
        data = len(header).to_bytes(8, "little") + header + bytes(8)
        with pytest.raises(ValueError):
            view_tensors(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        with pytest.raises(UserError, match=r"x\.tar is damaged: (a safetensors header|.*char|.*codec)"):
            scan(tar_member("a.safetensors", data) + END)
    with pytest.raises(ValueError, match="longer"):
        view_tensors(torch.full((20,), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match="longer"):
        view_tensors(torch.zeros(3, dtype=torch.uint8))


def scan(data: bytes) -> list[str]:
    return [pair.key for pair in scan_tar(io.BytesIO(data), "x.tar")]


def test_scanning_refuses_what_it_cannot_trust() -> None:
    pair = tar_pair("a", named(0), {"caption": "c"})
    tensors = tar_member("b.safetensors", save({"latents": torch.zeros(16, 1, 2, 2)}))
    assert scan(pair + END) == ["a"]
    with pytest.raises(UserError, match="never opened"):
        scan(pair + tar_member("b.pth", b"x") + END)
    with pytest.raises(UserError, match=r"no member 'b\.json'"):
        scan(pair + tensors + END)
    with pytest.raises(UserError, match="damaged"):
        scan(pair[:-700])
    with pytest.raises(UserError, match="damaged"):
        scan(tar_member("c.json", b"{") + END)
    with pytest.raises(UserError, match="damaged"):
        scan(tar_member("c.safetensors", b"no tensors here") + END)


def sparse_tar(name: str, size: int) -> bytes:
    """A member of `size` zeros of which none is in the archive (GNU's sparse format)."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (size - 1, 0)  # one piece, at the end and empty
    header[483:495] = b"%011o\0" % size
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return bytes(header) + END


@pytest.mark.parametrize("name", ["a.json", "a.safetensors"])
def test_a_small_tar_that_unfolds_to_gigabytes_is_refused(name: str) -> None:
    data = sparse_tar(name, 5 << 30)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getmembers()[0].size == 5 << 30  # a reader that trusts it would take as much
    with pytest.raises(UserError, match=rf"x.tar is damaged: the member '{name}' is sparse"):
        list(scan_tar(io.BytesIO(data), "x.tar"))


def test_a_record_without_measure_is_refused() -> None:
    data = tar_member("a.json", b" " * (MOST_JSON + 1)) + END
    with pytest.raises(UserError, match=r"the member 'a\.json' has 16777217 bytes, more than 16777216 of a record"):
        list(scan_tar(io.BytesIO(data), "x.tar"))


def test_a_header_without_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="more than the 100000000 of the format"):
        header_length((5 << 30).to_bytes(8, "little"), 6 << 30)


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    block[: len(name)], block[124:136], block[156:157] = name, size, kind
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header(b"\xff.json", b"00000000002\0", b"0") + b"{}".ljust(512, b"\0"), "is not UTF-8"),
        (header(b"long", b"77777777777\0", b"L"), r"a header has \d+ bytes"),
        (header(b"pax", b"\x80" + (1 << 80).to_bytes(11, "big"), b"x"), r"a header has \d+ bytes"),
        (header(b"back", b"\xff" * 12, b"0"), "the member 'back' has -1 bytes"),
        (header(b"l", b"00000000001\0", b"L") + b"x".ljust(512, b"\0"), None),
    ],
)
def test_headers_that_no_writer_makes(data: bytes, words: str | None) -> None:
    data, words = (data * 3000, "headers have no end") if words is None else (data, words)
    with pytest.raises(UserError, match=rf"x.tar is damaged: .*{words}"):
        list(scan_tar(io.BytesIO(data + END), "x.tar"))
