"""The steps of a run, in order: global order -> the samples of a step -> packs, read ahead in a thread.

In: opened sources, their order, the batch size. Out: for every step its packs of items, through `assemble`, which the
trainer gives to turn items into model inputs off the critical path. The one decision: a step is planned from the index
alone (tokens and keys), so packing needs no sample in memory, any step can be made without those before it, and every
data rank knows the whole step and reads only the packs that are its own. Inside a pack samples are sorted by length:
neighbours of equal lengths are computed as one batch.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from wanloom.data.index import Index
from wanloom.data.mock import MockDataset
from wanloom.data.order import Order, source_weights
from wanloom.data.packing import max_over_mean, pack_samples
from wanloom.data.settings import BatchConfig, DataConfig, SourceConfig
from wanloom.data.shards import Dataset, Sample
from wanloom.errors import UserError
from wanloom.geometry import Geometry

T = TypeVar("T")
FINGERPRINT = 2  # the way in which data is recorded; others cannot be compared


Source = Dataset | MockDataset


def open_sources(
    config: DataConfig, geometry: Geometry | None, channels: int, text_dim: int, text_slots: int
) -> list[Source]:
    """Open what the config names. Raises UserError for a source that does not fit a model of these sizes.

    Only made-up data needs a geometry: what is prepared is latents.
    """
    named = config.resolved()
    if config.mock:
        if geometry is None:
            raise UserError(
                "data.mock gives sizes in pixels, and which latents they make is not known: the VAE of the model is "
                "not on this machine."
            )
        return [MockDataset(config.mock, text_dim, replace(geometry, channels=channels))]
    sources: list[Source] = [Dataset.open(source.path) for source in named]
    for source in sources:
        index = source.rows("train")
        if len(index) == 0:
            raise UserError(f"{source.path} has no training samples.")
        if (found := set(np.unique(index.columns["channels"]).tolist())) != {channels}:
            raise UserError(f"{source.path} has latents of {sorted(found)} channels, the model takes {channels}.")
        found = source.read(index[0]).tensors["text"].shape[1]
        if found != text_dim:
            raise UserError(
                f"{source.path} was prepared with another text encoder: its states have {found} values, the model "
                f"takes {text_dim}. Prepare it with the model of this run."
            )
        if (longest := int(index.columns["text_len"].max())) > text_slots:
            raise UserError(
                f"A caption of {source.path} has {longest} tokens, the model takes {text_slots}: prepare it with a "
                "smaller `max_text_length`."
            )
    return sources


class Item(NamedTuple):
    """A sample at its place in the run."""

    sample: Sample
    draw: int  # how often the sample was used before
    position: int  # in the global order
    name: str  # what its random draws are keyed by; the same key in two sources is not the same sample


class Totals(NamedTuple):
    """What is known of a whole step, of all data ranks together, before a sample is read."""

    num_samples: int
    num_tokens: int
    flops: float
    efficiency: float  # tokens over the token budget of the packs
    balance: float  # how much longer the step takes than with equal packs: max over mean


class Step(NamedTuple):
    """One optimizer step as one data rank has it; a pack may be empty."""

    step: int
    packs: list[list[Item]]
    totals: Totals


class Plan:
    """Which samples make a step and how they are packed, from the index alone."""

    def __init__(
        self,
        sources: Sequence[Source],
        mix: Sequence[SourceConfig],
        batch: BatchConfig,
        seed: int,
        flops: Callable[[int], float],  # of one training step on a sample of so many tokens
        ranks: int = 1,
    ) -> None:
        self.indices = [source.rows("train") for source in sources]
        self.batch = batch
        self.ranks = ranks
        self._flops = flops
        for source, index in zip(sources, self.indices, strict=True):
            check_budget(source.path, index, batch.tokens_per_pack)
        sizes = [len(index) for index in self.indices]
        self._weights = source_weights(mix, sizes)
        self.order = Order(sizes, self._weights, seed)

    def packs(self, step: int) -> list[list[int]]:
        """Positions in the global order, pack by pack, of optimizer step `step` (from 0).

        Data rank r has the packs r, r + ranks, r + 2 * ranks, ...; which samples they hold together does not depend on
        the number of ranks.
        """
        first = step * self.batch.samples
        entries = [self.order.at(first + i) for i in range(self.batch.samples)]
        tokens = [int(self.indices[e.source].tokens[e.index]) for e in entries]
        packs = pack_samples(tokens, self.batch.tokens_per_pack, [self._flops(n) for n in tokens], self.ranks)

        def place(i: int) -> tuple[int, int, str, int]:
            index, row = self.indices[entries[i].source], entries[i].index
            return tokens[i], int(index.columns["text_len"][row]), index.texts["key"][row].as_py(), i

        return [[first + i for i in sorted(pack, key=place)] for pack in packs]

    def totals(self, packs: Sequence[Sequence[int]]) -> Totals:
        """What the packs of a step add up to."""
        tokens = [[self.tokens(position) for position in pack] for pack in packs]
        work = [sum(self._flops(n) for n in pack) for pack in tokens]
        num_tokens = sum(sum(pack) for pack in tokens)
        return Totals(
            num_samples=sum(len(pack) for pack in packs),
            num_tokens=num_tokens,
            flops=sum(work),
            efficiency=num_tokens / (len(packs) * self.batch.tokens_per_pack),
            balance=max_over_mean(work, self.ranks),
        )

    def tokens(self, position: int) -> int:
        """Video tokens of the sample at a position."""
        entry = self.order.at(position)
        return int(self.indices[entry.source].tokens[entry.index])

    def shares(self) -> list[float]:
        """The part of all positions that each source has."""
        return [float(weight / sum(self._weights)) for weight in self._weights]

    def fingerprint(self) -> str:
        """A hash of every key, size and content and of the weights: a run is not resumed on data that changed."""
        digest = hashlib.blake2b(digest_size=16)
        for weight, index in zip(self._weights, self.indices, strict=True):
            digest.update(f"{weight / sum(self._weights)}".encode())
            digest.update(index.digest.encode())
        return f"{FINGERPRINT}:{digest.hexdigest()}"


def check_budget(path: str, index: Index, budget: int) -> None:
    """Raises UserError when a sample fits in no pack; it names the largest."""
    largest = int(index.tokens.argmax())
    if index.tokens[largest] > budget:
        raise UserError(
            f"Sample '{index[largest].key}' of {path} has {index.tokens[largest]} tokens and does not fit in a pack "
            f"of {budget}: set batch.tokens_per_pack to {index.tokens[largest]} or more."
        )


class Loader(Generic[T]):
    """Iterates over the steps of a data rank from `start_step` on, without end; a context manager, or call `close`.

    An error while reading ahead is raised where its step is asked for.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        plan: Plan,
        start_step: int,
        assemble: Callable[[Step], T],
        prefetch: int = 2,
        rank: int = 0,
    ) -> None:
        self._sources = sources
        self._plan = plan
        self._rank = rank
        self._assemble = assemble
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead = deque(self._pool.submit(self._make, start_step + i) for i in range(prefetch))
        self._next = start_step + prefetch

    def __iter__(self) -> Iterator[T]:
        while True:
            made = self._ahead.popleft().result()
            self._ahead.append(self._pool.submit(self._make, self._next))
            self._next += 1
            yield made

    def __enter__(self) -> "Loader[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead and wait for the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> T:
        packs = self._plan.packs(step)
        own = [[self._item(position) for position in pack] for pack in packs[self._rank :: self._plan.ranks]]
        return self._assemble(Step(step, own, self._plan.totals(packs)))

    def _item(self, position: int) -> Item:
        entry = self._plan.order.at(position)
        sample = self._sources[entry.source].read(self._plan.indices[entry.source][entry.index])
        return Item(sample, entry.draw, position, f"{entry.source}/{sample.key}")
