"""Compiled blocks: the gradients of eager ones, one graph for packs of any lengths, and no quiet fallback."""

from functools import partial

import pytest
import torch
from small_model import build_model, draw_pack
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder

from wanloom.errors import UserError
from wanloom.model import attention
from wanloom.model.modulation import build_layout, spread
from wanloom.parallel import compile as module
from wanloom.parallel.apply import apply_layout
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.parallel.settings import ComputeConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the compiler warns of what it does itself
]

ALONE = Mesh(ONE_PROCESS, torch.device("cpu"))
# other lengths, numbers of samples, segments and equal neighbours, captions from empty to full; in the first as many
# text keys as tokens, which a compiler may take for one size
PACKS = (
    ([(1, 2, 3), (3, 2, 2), (3, 2, 2), (2, 3, 1)], [5, 0, 12, 15]),
    ([(5, 1, 4), (1, 1, 1)], [511, 512]),
    ([(2, 2, 2)] * 7, [3, 0, 3, 3, 200, 3, 3]),
    ([(1, 3, 3), (4, 1, 2), (2, 2, 5)], [7, 7, 30], [9, 2, 6, 10, 10]),  # two samples of two segments
    ([(1, 2, 2), (6, 2, 1), (1, 2, 2), (3, 1, 1), (2, 3, 3)], [0, 64, 1, 9, 512]),
    ([(2, 1, 3), (2, 1, 3), (1, 5, 1), (4, 2, 2), (1, 1, 2), (3, 3, 1)], [8, 2, 11, 0, 25, 4]),
)
BLOCK = ComputeConfig(compile="block")
EAGER = partial(torch.compile, backend="aot_eager")  # the graphs as they are, without code for them


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    with module.symbols.patch(use_duck_shape=True):  # put back afterwards
        yield
    torch._dynamo.reset()


def step(model: nn.Module, number: int) -> dict[str, torch.Tensor]:
    """The gradients of one pack."""
    pack, sigma, weight = draw_pack(*PACKS[number], seed=number)
    model.zero_grad()
    (model(pack, sigma) * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("policy", "offload", "attends", "eager"),
    [("attention", False, 6, False), ("none", True, 4, True), ("cheap", True, 6, True)],
)
def test_compiled_blocks_are_one_graph_and_equal_eager_ones(policy, offload, attends, eager, monkeypatch):
    """Attention runs twice a block, and once more for what a policy computes again; two blocks."""
    if eager:
        monkeypatch.setattr(torch, "compile", EAGER)
    monkeypatch.setattr("wanloom.parallel.offload.SMALL", 0)
    calls, forward = [], attention.packed_forward
    monkeypatch.setattr(attention, "packed_forward", lambda *args: calls.append(1) or forward(*args))
    plain, model = build_model(), build_model()
    apply_layout(model, ALONE, BLOCK.model_copy(update={"recompute": policy, "offload_activations": offload}))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for number in range(len(PACKS)):
        expected = step(plain, number)
        calls.clear()
        found = step(model, number)
        assert len(calls) == attends
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_compiled_blocks_with_kept_text_are_one_graph_and_equal_eager_ones(monkeypatch):
    monkeypatch.setattr(torch, "compile", EAGER)
    plain, model = build_model(), build_model()
    apply_layout(model, ALONE, BLOCK)
    with torch.no_grad():
        for number in range(len(PACKS)):
            pack, sigma, _ = draw_pack(*PACKS[number], seed=number)
            text_kv = model.text_kv(pack)
            for level in (sigma, sigma / 2):
                found, expected = model(pack, level, text_kv=text_kv), plain(pack, level)
                assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_pack_of_one_sample_equals_the_eager_one(monkeypatch):
    monkeypatch.setattr(torch, "compile", EAGER)
    plain, model = build_model(), build_model()
    apply_layout(model, ALONE, BLOCK)
    pack, sigma, weight = draw_pack([(3, 2, 5)], [9], seed=4)
    for each in (plain, model):
        (each(pack, sigma) * weight).sum().backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None, name
        assert (found.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm(), name


def test_more_graphs_than_the_limit_are_an_error(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = build_model()
    apply_layout(model, ALONE, BLOCK)
    with torch._dynamo.config.patch(recompile_limit=1):
        model(*draw_pack(*PACKS[0], seed=0)[:2])
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            model(*draw_pack([(2, 2, 2)], [5], seed=9)[:2])  # one sample is a graph of its own


def test_gradients_of_rows_are_summed_by_sample():
    lens = (3, 0, 4, 4, 1)
    layout = build_layout(lens, torch.device("cpu"))
    table, weight = torch.randn(5, 6, requires_grad=True), torch.randn(12, 6)
    rows = spread(table, layout)
    assert torch.equal(rows, torch.cat([table[i : i + 1].expand(n, -1) for i, n in enumerate(lens)]))
    (rows * weight).sum().backward()
    torch.testing.assert_close(table.grad, torch.stack([part.sum(0) for part in weight.split(lens)]))
    torch.library.opcheck(torch.ops.wanloom.sum_segments, (weight, layout.lens))


def test_no_compiler_is_said():
    cpp_builder.cpp_compiler_search.cache_clear()
    # torch's own way: to set the attribute back by hand deletes it, and the setting is gone for all tests that follow
    patched = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    with patched, pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        apply_layout(build_model(), ALONE, BLOCK)
