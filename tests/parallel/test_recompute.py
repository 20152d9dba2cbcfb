"""What is recomputed changes no gradient and runs attention no more often than it says; offload leaves no bytes."""

from collections import Counter
from functools import cache

import pytest
import torch
from small_model import SMALL, build_model, draw_pack
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.c05_activations import Storages
from wanloom.model import attention
from wanloom.parallel import offload
from wanloom.parallel.apply import apply_layout
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.parallel.settings import ComputeConfig, Recompute

ALONE = Mesh(ONE_PROCESS, torch.device("cpu"))
POLICIES = ("none", "cheap", "attention", "full")
GRIDS = [(1, 2, 3), (3, 2, 2), (3, 2, 2), (2, 3, 1), (5, 1, 4), (1, 1, 1)]
TEXTS = [5, 0, 512, 7, 511, 5]


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        if func in attention.ATTENTION_OPS:
            self.seen["self" if args[5] is None else "cross"] += 1
        return func(*args, **(kwargs or {}))


@cache
def train(policy: Recompute, bf16: bool, offload: bool) -> tuple[Tensor, dict[str, Tensor], Calls]:
    """Velocity and gradients of two packs, each with its own backward pass, and what ran; not to be written to."""
    model = build_model(SMALL)
    precision = "bf16" if bf16 else "fp32"
    apply_layout(model, ALONE, ComputeConfig(precision=precision, recompute=policy, offload_activations=offload))
    out, calls = torch.zeros(()), Calls()
    with calls:
        for seed in (1, 2):
            pack, sigma, weight = draw_pack(GRIDS[seed:], TEXTS[seed:], seed=seed)
            out = model(pack, sigma)
            (out * weight).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls


@pytest.fixture(autouse=True)
def nothing_is_too_small_to_send(monkeypatch):
    monkeypatch.setattr(offload, "SMALL", 0)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_without(policy, offload, bf16):
    out, found, _ = train(policy, bf16, offload)
    plain_out, plain, _ = train("none", bf16, False)
    assert torch.equal(out, plain_out)
    assert found.keys() == plain.keys() == dict(build_model(SMALL).named_parameters()).keys()
    for name, grad in plain.items():
        assert grad.norm() > 0 and torch.equal(found[name], grad), name


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize(
    ("policy", "own", "text"), [("none", 1, 1), ("cheap", 1, 2), ("attention", 1, 2), ("full", 2, 2)]
)
def test_how_often_attention_runs(policy, own, text, offload):
    seen = train(policy, False, offload)[2].seen
    calls = 2 * SMALL.num_layers  # two packs
    assert (seen["self"], seen["cross"]) == (own * calls, text * calls)
    assert seen["wanloom.attend_backward.default"] == 2 * calls


def test_cheap_runs_no_matrix_product_again():
    seen = {policy: train(policy, False, False)[2].seen for policy in POLICIES}
    counts = {policy: sum(seen[policy][f"aten.{op}.default"] for op in ("mm", "addmm")) for policy in POLICIES}
    assert counts["none"] == counts["cheap"] < counts["attention"] < counts["full"] + 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.slow
def test_offload_leaves_nothing_of_a_block_behind(policy, monkeypatch):
    """What a forward pass keeps on the device is what blocks share, and the same for a block more."""
    monkeypatch.setattr(offload.Parcel, "__init__", lambda self, tensor: setattr(self, "shape", tensor.shape))
    left = []
    for blocks in (2, 3):
        model = build_model(SMALL.model_copy(update={"num_layers": blocks}))
        apply_layout(model, ALONE, ComputeConfig(recompute=policy, offload_activations=True))
        pack, sigma, _ = draw_pack(GRIDS, TEXTS, seed=1)
        with Storages() as storages:
            out = model(pack, sigma)
        for param in model.parameters():
            storages.made.pop(param.untyped_storage()._cdata, None)
        left.append(storages.alive())
        del out
    assert left[0] == left[1]


def test_parameters_are_never_sent(monkeypatch):
    sent = []
    monkeypatch.setattr(offload, "send", lambda tensor: sent.append(tuple(tensor.shape)) or tensor)
    train.__wrapped__("none", bf16=True, offload=True)
    weights = {tuple(p.shape) for p in build_model(SMALL).blocks.parameters() if p.dim() == 2}
    assert sent and not {shape for shape in sent if shape in weights or shape[::-1] in weights}
