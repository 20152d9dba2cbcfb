"""Attention over a sequence in parts equals attention over the whole, for the values and for every gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from context_ranks import LAYOUTS
from safetensors.torch import load_file, save_file

from wanloom.parallel.context import ContextAttention, overlap

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RANKS = {name: max(i for lists in groups for ranks in lists for i in ranks) + 1 for name, groups in LAYOUTS.items()}
PACKS = {  # 48 tokens, which divide by 2, 3 and 4 ranks
    "unequal": (5, 20, 9, 14),
    "one": (48,),
    "across three ranks": (7, 33, 8),
    "many tiny in one rank": (2, 1, 3, 2, 1, 1, 2, 30, 6),
    "cut at the borders": (12, 12, 24),
    "cut at some borders and a row beside others": (16, 8, 1, 11, 12),
    "equal neighbours": (4,) * 12,
    "a pad at the end": (13, 30, 5),
    "in bf16": (9, 26, 13),
}


def draw(name: str, lens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Large logits, so that parts weigh unlike."""
    generator = torch.Generator().manual_seed(list(PACKS).index(name))
    dtype = torch.bfloat16 if name == "in bf16" else torch.float32
    q, k, v, weight = torch.randn(4, sum(lens), 4, 8, generator=generator)
    return {
        f"{name}.{key}": x.to(dtype) for key, x in zip(("q", "k", "v", "weight"), (2 * q, k, v, weight), strict=True)
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[list[dict[str, torch.Tensor]], list[dict]]:
    """What every rank wrote: its rows, and what it counted."""
    folder = tmp_path_factory.mktemp("context")
    save_file(
        {k: v.contiguous() for name, lens in PACKS.items() for k, v in draw(name, lens).items()},
        folder / "packs.safetensors",
    )
    (folder / "packs.json").write_text(json.dumps(PACKS))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    words = [*command, str(Path(__file__).parent / "context_ranks.py"), str(folder)]
    result = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return (
        [load_file(folder / f"rank{i}.safetensors") for i in range(4)],
        [json.loads((folder / f"rank{i}.json").read_text()) for i in range(4)],
    )


def reference(name: str) -> dict[str, torch.Tensor]:
    """Sample by sample from the formula, in float64."""
    tensors = draw(name, PACKS[name])
    *leaves, weight = (x.double() for x in tensors.values())
    leaves = [x.requires_grad_() for x in leaves]
    out = []
    for q, k, v in zip(*(x.split(PACKS[name]) for x in leaves), strict=True):
        logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
        out.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
    out = torch.cat(out)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad((out * weight).sum(), leaves)), strict=True))


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_equal_the_whole(layout, name, found):
    bound = 1e-2 if name == "in bf16" else 1e-5
    for key, expected in reference(name).items():
        parts = [rank[f"{layout}.{name}.{key}"] for rank in found[0] if f"{layout}.{name}.{key}" in rank]
        assert len(parts) == RANKS[layout]
        value = torch.cat(parts)
        assert value.dtype == draw(name, PACKS[name])[f"{name}.q"].dtype
        assert ((value.double() - expected).norm() / expected.norm()).item() < bound, key


def test_a_kept_operator_exchanges_rows_once(found):
    """Two ranks: keys in the forward; keys and gradients in the backward; keys again where all is recomputed."""
    assert [notes["exchanges"] for notes in found[1][:2]] == [[3, 4]] * 2


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_other_lengths_are_the_same_graph(alone):
    """No size of the first pack is as another one's: the compiler would take them for one."""
    torch._dynamo.reset()
    attend, graphs = ContextAttention("auto", alone, alone), []
    compiled = torch.compile(attend, backend=lambda g, _: graphs.append(g) or g, dynamic=True, fullgraph=True)
    for name in ("across three ranks", "many tiny in one rank", "unequal"):
        *leaves, weight = (x.requires_grad_() for x in draw(name, PACKS[name]).values())
        lens, grads = torch.tensor(PACKS[name]), []
        for call in (compiled, attend):
            grads.append(torch.autograd.grad((call(*leaves, lens, lens) * weight).sum(), leaves))
        assert all(map(torch.equal, *grads))
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_are_what_their_shapes_and_gradients_say(dtype, alone):
    q, k, v, weight = (x.to(dtype) for x in draw("unequal", PACKS["unequal"]).values())
    lens, group = torch.tensor(PACKS["unequal"]), alone.group_name
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.wanloom.exchange, (weight[None].clone().requires_grad_(), group))
    torch.library.opcheck(torch.ops.wanloom.ring_attend, (*leaves, lens, "auto", group))
    out, lse = (x.detach() for x in torch.ops.wanloom.ring_attend(*leaves, lens, "auto", group))
    given = [weight.to(out.dtype), *(x.detach() for x in leaves), out, lse, lens, "auto", group]
    torch.library.opcheck(torch.ops.wanloom.ring_attend_backward, tuple(given))


def test_what_it_cannot_attend_to_is_an_error(alone):
    q, k, v, _ = draw("unequal", PACKS["unequal"]).values()
    attend, lens = ContextAttention("auto", alone, None), torch.tensor(PACKS["unequal"])
    with pytest.raises(ValueError, match="takes no bias"):
        attend(q, k, v, lens, lens, torch.zeros(48))
    with pytest.raises(ValueError, match="1 ranks of 48 tokens hold no samples of"):
        attend(q, k, v, lens[:2], lens[:2])


def test_the_only_rows_that_travel_are_those_of_a_sample_on_both_sides():
    lens = (7, 25, 8, 8)
    nothing = (slice(0, 0), slice(0, 0), (), ())
    assert overlap(lens, 12, 0, 3) == overlap(lens, 12, 3, 0) == overlap(lens, 12, 1, 3) == nothing
    assert overlap(lens, 12, 0, 2) == (slice(7, 12), slice(0, 8), (5,), (8,))
    assert overlap(lens, 12, 2, 0) == (slice(0, 8), slice(7, 12), (8,), (5,))
    assert overlap(lens, 12, 3, 2) == (slice(0, 4), slice(8, 12), (4,), (4,))
    assert overlap(lens, 12, 3, 3) == (slice(0, 12), slice(0, 12), (4, 8), (4, 8))
