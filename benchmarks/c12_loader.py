"""C12, C13: prepared samples from disk to tensors, against WebDataset as NVIDIA's DFM uses it and a file each.

A sample is that of a clip of 240x416, 81 frames: latents (16, 21, 30, 52) and 80 text states of 4096, bf16, equal in
all three. DFM's tar has them as `pth` and `pickle`, the states padded to its 226 slots; WebDataset decodes them, and
then DFM's checks run (no NaN, no infinity, none over 1000). A file each is torch.save of both, unpadded, torch.load.
wanloom's is its Loader with its order and packing, in steps of 8 samples that are let go where a trainer would have
made its inputs of them, in the loader's thread; the peers let each sample go when the next one comes. One thread for
each, as in a worker of PyTorch's DataLoader: with two, the checks take WebDataset many times as long.
Timed are four passes over all samples, from the system's cache, divided by their number. wanloom checks the sha256 of a
sample the first time that a process reads it, the peers have none: the rows with the targets are of the passes after
the first, two more are of the first. Checked: every tensor of every sample is equal. C13 counts the bytes of the tars.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import webdataset
from torch import Tensor

from benchmarks.measure import Row, main, take_turns
from wanloom.data.index import INDEX, build_table, encode_index
from wanloom.data.loader import Loader, Plan, Step
from wanloom.data.settings import BatchConfig, SourceConfig
from wanloom.data.shards import Dataset, Sample, index_rows
from wanloom.data.tar import END, scan_tar, tar_pair
from wanloom.files import write_atomic

T = TypeVar("T")

SLOTS = 226  # of DFM's text states
PER_STEP = 8
EPOCHS = 4  # of a pass: a run of training reads on and on, so making the loader should not count
SHARD = "train/shard-000000.tar"
AGAIN = (
    "a third of what torch.load takes is about what the system needs to hand over the bytes in memory that is new for "
    "each sample; the rest is the plan of a step, the index and the hand-over between threads. Training takes up to "
    "100 samples a second"
)
FIRST = "wanloom alone checks what it reads; training takes up to 100 samples a second"


def measure(toy: bool) -> list[Row]:
    """Samples of a prepared folder per second, and bytes."""
    number, latents, text = (16, (16, 3, 4, 6), (20, 32)) if toy else (128, (16, 21, 30, 52), (80, 4096))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, number, latents, text)
        dataset = Dataset.open(folder / "wanloom")
        _check(folder, dataset, number)
        taken = take_turns(
            {
                "WebDataset": lambda: [_count(_read_tar(folder / "dfm.tar"), number) for _ in range(EPOCHS)],
                "torch.load": lambda: [_count(_read_files(folder / "files"), number) for _ in range(EPOCHS)],
                "wanloom": lambda: _count(_steps(dataset, EPOCHS * number, _let_go), EPOCHS * number),
                "copy": lambda: _copy(folder / "wanloom" / SHARD, number),
                "wanloom first": lambda: _count(_steps(Dataset.open(folder / "wanloom"), number, _let_go), number),
            }
        )
        sizes = [(folder / path).stat().st_size / number for path in (f"wanloom/{SHARD}", "dfm.tar")]
    read = {name: number * (EPOCHS if name in ("WebDataset", "torch.load", "wanloom") else 1) for name in taken}
    each = {name: [value / read[name] for value in values] for name, values in taken.items()}
    what = f"one of {number} cached samples, latents {latents}, {text[0]} text states"
    limit = f"copying {sizes[0] / 1e6:.2f} MB out of the system's cache: {min(each['copy']) * 1e3:.3f} ms"
    rows = [
        Row(
            "C12",
            f"{what}, {when}",
            "s",
            each[ours],
            f"{peer}{' and the checks of DFM' if peer == 'WebDataset' else ', a file each'}",
            each[peer],
            target=target if ours == "wanloom" else None,
            limit=limit if ours == "wanloom" else "the sha256 of its bytes: about 0.8 ms",
            checked="every tensor of every sample is equal",
            note=AGAIN if ours == "wanloom" and peer == "torch.load" else FIRST if ours != "wanloom" else "",
            facts={"samples a second": round(1 / min(each[ours]))},
        )
        for ours, when in (("wanloom", "read again"), ("wanloom first", "read first, with its sha256"))
        for peer, target in (("WebDataset", 20.0), ("torch.load", 3.0))
    ]
    note = "DFM pads to 226 text states and cuts longer captions; wanloom stores what there is, up to 512"
    padded = f"the tar of DFM, {SLOTS} slots"
    stored = f"bytes of one cached sample in its tar, latents {latents}, {text[0]} text states"
    rows.append(Row("C13", stored, "bytes", [sizes[0]], padded, [sizes[1]], target=1.80e6, at_most=True, note=note))
    return rows


def draw(i: int, latents: tuple[int, ...], text: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Latents and text states of sample `i`."""
    generator = torch.Generator().manual_seed(i)
    return (
        torch.randn(latents, generator=generator).bfloat16(),
        torch.randn(text, generator=generator).bfloat16(),
    )


def _write(folder: Path, number: int, latents: tuple[int, ...], text: tuple[int, ...]) -> None:
    """The same samples three times."""
    (folder / "files").mkdir()
    pairs = []
    with webdataset.TarWriter(str(folder / "dfm.tar")) as tar:
        for i in range(number):
            values, states = draw(i, latents, text)
            record = {"caption": f"clip {i} " * 40, "source": f"clips/{i}.mp4"}
            padded = torch.cat([states, states.new_zeros(SLOTS - len(states), text[1])])
            tar.write({"__key__": f"{i:06d}", "pth": values, "pickle": padded, "json": record})
            torch.save({"latents": values, "text": states}, folder / "files" / f"{i:06d}.pt")
            pairs.append(tar_pair(f"{i:06d}", {"latents": values, "text": states}, record))
    write_atomic(folder / "wanloom" / SHARD, [*pairs, END])
    with (folder / "wanloom" / SHARD).open("rb") as file:
        rows = index_rows(scan_tar(file, SHARD), SHARD, "train")
    write_atomic(folder / "wanloom" / INDEX, encode_index(build_table(rows)))


def _read_tar(path: Path) -> Iterator[dict[str, Any]]:
    for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
        latents = sample["pth"]
        if torch.isnan(latents).any() or torch.isinf(latents).any() or torch.max(torch.abs(latents)) > 1e3:
            continue
        yield sample


def _read_files(folder: Path) -> Iterator[dict[str, Tensor]]:
    for path in sorted(folder.iterdir()):
        yield torch.load(path, weights_only=True)


def _steps(dataset: Dataset, number: int, assemble: Callable[[Step], list[T]]) -> Iterator[T]:
    budget = int(dataset.rows("train").tokens.max())
    batch = BatchConfig(samples=PER_STEP, tokens_per_pack=2 * budget)
    plan = Plan([dataset], [SourceConfig(path=dataset.path)], batch, 0, lambda tokens: float(tokens**2))
    with Loader([dataset], plan, 0, assemble) as loader:
        for _, made in zip(range(number // PER_STEP), loader, strict=False):
            yield from made


def _samples(step: Step) -> list[Sample]:
    return [item.sample for pack in step.packs for item in pack]


def _let_go(step: Step) -> list[str]:
    return [sample.key for sample in _samples(step)]


def _count(samples: Iterator[object], number: int) -> None:
    assert sum(1 for _ in samples) == number


def _copy(path: Path, number: int) -> None:
    """What no one can do without: the bytes of the samples into memory that is at hand."""
    data = memoryview(bytearray(path.stat().st_size // number))
    with path.open("rb", buffering=0) as file:
        for _ in range(number):
            file.readinto(data)


def _check(folder: Path, dataset: Dataset, number: int) -> None:
    """Every sample equal, whoever reads it."""
    read = {sample.key: sample for sample in _steps(dataset, number, _samples)}
    assert len(read) == number
    for tar, file in zip(_read_tar(folder / "dfm.tar"), _read_files(folder / "files"), strict=True):
        sample = read.pop(tar["__key__"])
        latents, text = sample.tensors["latents"], sample.tensors["text"]
        assert torch.equal(latents, tar["pth"]) and torch.equal(latents, file["latents"])
        assert torch.equal(text, tar["pickle"][: len(text)]) and torch.equal(text, file["text"])
        assert not tar["pickle"][len(text) :].any()
    assert not read


if __name__ == "__main__":
    main(__spec__, measure, threads=1)
