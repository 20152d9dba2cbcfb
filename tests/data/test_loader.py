"""Steps from real shards and made-up data: membership, packing, reading ahead, errors."""

import hashlib
import threading

import numpy as np
import pytest
import torch

from wanloom.data import index_cache
from wanloom.data.index import INDEX, Row, build_table, encode_index, read_table
from wanloom.data.loader import Loader, Plan, open_sources
from wanloom.data.mock import MockDataset
from wanloom.data.packing import pack_samples
from wanloom.data.settings import BatchConfig, DataConfig, SourceConfig
from wanloom.errors import UserError
from wanloom.geometry import WAN_21

MIX = "17x64x64,1x64x64*2,9x32x64"


def build_plan(sources=None, mix=None, samples=6, budget=200, seed=1, ranks=1) -> Plan:
    sources = sources or [MockDataset(MIX, 8, WAN_21, size=20)]
    mix = mix or [SourceConfig(path=s.path) for s in sources]
    batch = BatchConfig(samples=samples, tokens_per_pack=budget)
    return Plan(sources, mix, batch, seed, lambda n: float(n * n), ranks)


def with_rows(rows: list[Row]) -> MockDataset:
    """Made-up data with these rows to train on."""
    data = MockDataset(MIX, 8, WAN_21, size=20)
    data._indices = read_table(build_table(rows), data.path).splits
    return data


def names(step) -> list[list[tuple[str, int]]]:
    return [[(item.name, item.draw) for item in pack] for pack in step.packs]


def uses(step) -> list[tuple[str, int]]:
    return [use for pack in names(step) for use in pack]


def take(plan: Plan, sources, start: int, count: int, rank: int = 0) -> list:
    with Loader(sources, plan, start, lambda step: step, rank=rank) as loader:
        return [step for step, _ in zip(loader, range(count), strict=False)]


def test_a_step_holds_the_same_samples_whatever_the_packing_and_the_start():
    sources = [MockDataset(MIX, 8, WAN_21, size=20)]
    steps = take(build_plan(sources), sources, 0, 9)
    assert [s.step for s in steps] == list(range(9))
    small = take(build_plan(sources, budget=90), sources, 0, 9)
    assert sum(len(s.packs) for s in small) > sum(len(s.packs) for s in steps)
    for a, b in zip(steps, small, strict=True):
        assert sorted(uses(a)) == sorted(uses(b))
    late = take(build_plan(sources), sources, 5, 4)
    assert [names(s) for s in late] == [names(s) for s in steps[5:]]
    # 9 steps of 6 over 20 samples: two passes and a part, each sample once per pass
    seen = [use for step in steps for use in uses(step)]
    assert len(set(seen)) == 54 and len({name for name, draw in seen if draw == 0}) == 20


def test_packs_keep_the_budget_and_put_equal_lengths_side_by_side():
    sources = [MockDataset(MIX, 8, WAN_21, size=20)]
    for step in take(build_plan(sources, samples=12), sources, 0, 4):
        total = 0
        for pack in step.packs:
            tokens = [item.sample.tensors["latents"][0].numel() // 4 for item in pack]
            assert sum(tokens) <= 200 and tokens == sorted(tokens)
            lens = [(n, item.sample.tensors["text"].shape[0]) for n, item in zip(tokens, pack, strict=True)]
            assert lens == sorted(lens)
            total += sum(tokens)
        assert step.totals.num_tokens == total and step.totals.num_samples == 12 and step.totals.balance == 1
        assert step.totals.efficiency == pytest.approx(total / (200 * len(step.packs)))


@pytest.mark.parametrize("samples", [5, 30])
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(samples):
    sources = [MockDataset(MIX, 8, WAN_21, size=20)]
    union, sums = {}, {}
    for ranks in (1, 2, 4, 8):
        plan = build_plan(sources, samples=samples, budget=120, ranks=ranks)
        shares = [take(plan, sources, 3, 4, rank) for rank in range(ranks)]
        for steps in zip(*shares, strict=True):
            assert len({len(step.packs) for step in steps}) == 1  # all ranks take part in every round
            assert len({step.totals for step in steps}) == 1
            items = sorted((item for step in steps for pack in step.packs for item in pack), key=lambda i: i.position)
            union.setdefault(ranks, []).append([(item.position, item.name, item.draw) for item in items])
            totals = steps[0].totals
            tokens = [item.sample.tensors["latents"][0].numel() // 4 for item in items]
            assert totals.num_tokens == sum(tokens) and totals.num_samples == samples == len(items)
            budget = 120 * ranks * len(steps[0].packs)
            assert totals.efficiency == pytest.approx(sum(tokens) / budget)
            # the ranks of a round wait for the costliest pack
            grids = [[[i.sample.tensors["latents"][0] for i in pack] for pack in s.packs] for s in steps]
            work = [[sum((grid.numel() // 4) ** 2 for grid in pack) for pack in packs] for packs in grids]
            waiting = sum(max(of_round) for of_round in zip(*work, strict=True))
            assert totals.balance == pytest.approx(waiting * ranks / sum(map(sum, work)))
            sums.setdefault(ranks, []).append((totals.num_samples, totals.num_tokens, totals.flops))
    assert union[1] == union[2] == union[4] == union[8]
    assert sums[1] == sums[2] == sums[4] == sums[8]


def plain_packs(rows: list[Row], plan: Plan, seed: int, step: int) -> list[list[int]]:
    """The packs of a step over one source as they were before columns: by stable sorts, over rows in memory."""
    passes: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * plan.batch.samples, (step + 1) * plan.batch.samples):
        draw, place = divmod(position, len(rows))
        if draw not in passes:
            digest = hashlib.blake2b(f"{seed}\x1forder\x1f0\x1f{draw}".encode(), digest_size=8).digest()
            x = np.uint64(int.from_bytes(digest, "little"))
            x = x + np.arange(1, len(rows) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            passes[draw] = np.argsort(x ^ (x >> np.uint64(31)), kind="stable").tolist()
        chosen.append((position, rows[passes[draw][place]]))
    tokens = [row.tokens for _, row in chosen]
    packs = pack_samples(tokens, plan.batch.tokens_per_pack, [float(n * n) for n in tokens], plan.ranks)

    def place_of(i: int) -> tuple[int, int, str, int]:
        return tokens[i], chosen[i][1].text_len, chosen[i][1].key, i

    return [[chosen[i][0] for i in sorted(pack, key=place_of)] for pack in packs]


@pytest.mark.parametrize("ranks", [1, 4])
def test_mapped_columns_give_the_steps_that_rows_in_memory_gave(tmp_path, monkeypatch, ranks):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(index_cache, "LARGE", 1)
    rows = [*MockDataset("17x64x64*2,1x64x64*5,9x32x64", 8, WAN_21, size=700).rows("train")]
    rows = [row._replace(text_len=5 + i % 2) for i, row in enumerate(rows)]  # many are equal but for their keys
    (tmp_path / INDEX).write_bytes(encode_index(build_table(rows)))
    source = MockDataset(MIX, 8, WAN_21)
    source._indices = index_cache.open_index(tmp_path / INDEX, "data").splits
    plan = build_plan([source], samples=24, budget=160, seed=9, ranks=ranks)
    for step in (58, 0, 29, 1000, 28, 30):  # 29 crosses from one pass to the next
        assert plan.packs(step) == plain_packs(rows, plan, 9, step)
    for position in (0, 699, 700, 24_001):
        entry = plan.order.at(position)
        assert plan.indices[0][entry.index] == rows[entry.index] and plan.tokens(position) == rows[entry.index].tokens


def test_a_step_may_take_a_small_source_several_times():
    sources = [MockDataset(MIX, 8, WAN_21, size=20)]
    (step,) = take(build_plan(sources, samples=50), sources, 1, 1)
    assert len(set(uses(step))) == 50  # positions 50 to 99: the passes 2 to 4, each with noise of its own
    assert {draw for _, draw in uses(step)} == {2, 3, 4}


def test_two_sources_are_mixed_and_keep_their_names_apart():
    sources = [MockDataset("17x64x64", 8, WAN_21, size=10), MockDataset("1x64x64", 8, WAN_21, size=10)]
    mix = [SourceConfig(path="a", weight=0.25), SourceConfig(path="b", weight=0.75)]
    steps = take(build_plan(sources, mix, samples=8), sources, 0, 5)
    for step in steps:
        frames = [item.sample.tensors["latents"].shape[1] for pack in step.packs for item in pack]
        assert sorted(frames) == [1] * 6 + [5] * 2
    assert {item.name for pack in steps[0].packs for item in pack} == {
        f"{int(item.sample.tensors['latents'].shape[1] == 1)}/{item.sample.key}"
        for pack in steps[0].packs
        for item in pack
    }


def test_a_sample_larger_than_a_pack_is_named_at_the_start():
    with pytest.raises(
        UserError, match=r"Sample 'mock-000000' of mock 17x64x64,1x64x64 has 80 tokens .*tokens_per_pack to 80"
    ):
        build_plan([MockDataset("17x64x64,1x64x64", 8, WAN_21)], budget=79)


def test_an_error_of_the_thread_is_raised_at_its_step_and_the_thread_ends():
    sources = [MockDataset(MIX, 8, WAN_21)]
    before = threading.active_count()

    def assemble(step):
        if step.step == 2:
            raise UserError("The sample 'x' is damaged.")
        return step.step

    seen = []
    with Loader(sources, build_plan(sources), 0, assemble) as loader, pytest.raises(UserError, match="damaged"):
        for number in loader:
            seen.append(number)
    assert seen == [0, 1]
    assert threading.active_count() == before


def test_reading_stays_ahead_but_not_far():
    sources, made = [MockDataset(MIX, 8, WAN_21)], []
    release = threading.Event()

    def assemble(step):
        made.append(step.step)
        if len(made) == 3:
            release.set()
        return step.step

    with Loader(sources, build_plan(sources), 0, assemble, prefetch=3) as loader:
        assert release.wait(10)
        assert made == [0, 1, 2]
        next(iter(loader))
    assert len(made) <= 5


def test_the_fingerprint_knows_samples_lengths_contents_and_weights():
    def fingerprint(*args, **kwargs):
        return build_plan(*args, **kwargs).fingerprint()

    base = fingerprint()
    assert fingerprint(budget=999, samples=3, seed=4) == base
    assert fingerprint([MockDataset(MIX, 8, WAN_21, size=21)]) != base
    assert fingerprint([MockDataset("9x64x64", 8, WAN_21, size=20)]) != base
    rows = [*MockDataset(MIX, 8, WAN_21, size=20).rows("train")]
    assert fingerprint([with_rows(rows)]) == base
    longer = [row.text_len + (i == 7) for i, row in enumerate(rows)]  # of one caption, by one token
    for name, values in (
        ("sha256", ["0" * 64] * 20),
        ("text_len", longer),
        ("tokens", [row.tokens + (i == 7) for i, row in enumerate(rows)]),
        ("height", [row.height + 2 * (i == 7) for i, row in enumerate(rows)]),
        (
            "key",
            [f"{row.key[:-2]}{row.key[-1]}{row.key[-2]}" if row.key[-2] != row.key[-1] else row.key for row in rows],
        ),
    ):
        changed = [row._replace(**{name: value}) for row, value in zip(rows, values, strict=True)]
        assert changed != rows or name == "height"
        assert (fingerprint([with_rows(changed)]) != base) == (changed != rows), name
    assert fingerprint([with_rows([*reversed(rows)])]) != base
    joined = [rows[0]._replace(key="ab"), rows[1]._replace(key="c"), *rows[2:]]
    other = [rows[0]._replace(key="a"), rows[1]._replace(key="bc"), *rows[2:]]
    assert fingerprint([with_rows(joined)]) != fingerprint([with_rows(other)])
    two = [MockDataset(MIX, 8, WAN_21), MockDataset(MIX, 8, WAN_21)]
    weights = [[SourceConfig(path="a", weight=1), SourceConfig(path="b", weight=w)] for w in (1, 2, 1.0)]
    found = [fingerprint(two, mix) for mix in weights]
    assert found[0] == found[2] != found[1]


def test_wrong_sources_are_sentences():
    with pytest.raises(UserError, match="Say once where the training data is"):
        open_sources(DataConfig(), None, 16, 8, 512)
    with pytest.raises(UserError, match="Say once"):
        open_sources(DataConfig(path="x", mock="1x64x64"), None, 16, 8, 512)
    with pytest.raises(UserError, match="There is no folder"):
        open_sources(DataConfig(path="/nowhere"), None, 16, 8, 512)


def test_samples_of_a_prepared_folder_arrive_bit_for_bit(prepared):
    folder, latents = prepared
    sources = open_sources(DataConfig(path=str(folder)), None, 16, 8, 512)
    plan = build_plan(sources, samples=4, budget=100)
    for step in take(plan, sources, 0, 3):
        for pack in step.packs:
            for item in pack:
                assert torch.equal(item.sample.tensors["latents"], latents[item.sample.key])
    with pytest.raises(UserError, match="another text encoder: its states have 8 values, the model takes 64"):
        open_sources(DataConfig(path=str(folder)), None, 16, 64, 512)
    with pytest.raises(UserError, match="latents of \\[16\\] channels, the model takes 48"):
        open_sources(DataConfig(path=str(folder)), None, 48, 8, 512)
    with pytest.raises(UserError, match="has 5 tokens, the model takes 4"):
        open_sources(DataConfig(path=str(folder)), None, 16, 8, 4)
