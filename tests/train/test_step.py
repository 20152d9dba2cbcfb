"""One step against diffusers: every sample alone through WanTransformer3DModel, in a plain loop."""

import math

import pytest
import torch
from torch import nn

from wanloom.data.loader import Loader, Plan
from wanloom.data.mock import MockDataset
from wanloom.data.settings import BatchConfig, SourceConfig
from wanloom.formats.transformer import load_dit, state_dict_as
from wanloom.geometry import WAN_21
from wanloom.keys import draw_noise, keyed_fractions
from wanloom.model.sequence import patchify
from wanloom.objective.inputs import Objective
from wanloom.objective.settings import FlowConfig
from wanloom.parallel.apply import apply_layout
from wanloom.parallel.mesh import ONE_PROCESS, Layout, Mesh
from wanloom.parallel.settings import ComputeConfig
from wanloom.train import step
from wanloom.train.step import (
    NonFiniteError,
    build_batch,
    clip_gradients,
    find_cause,
)

ALONE = Mesh(ONE_PROCESS, torch.device("cpu"))
TEXT_DIM = 64
FLOW = FlowConfig(sampler="logit_normal", logit_std=1.5, shift=2.5, mix_uniform_ratio=0.2)
EMPTY = torch.randn(1, TEXT_DIM, generator=torch.Generator().manual_seed(3))


def read_step(budget: int, samples: int = 7, step: int = 2, rank: int = 0, ranks: int = 1):
    """The packs of one step of a rank over clips and images of three sizes."""
    sources = [MockDataset("17x64x64,1x64x64*2,9x32x48", TEXT_DIM, WAN_21, size=12)]
    batch = BatchConfig(samples=samples, tokens_per_pack=budget)
    plan = Plan(sources, [SourceConfig(path="")], batch, 5, float, ranks)
    with Loader(sources, plan, step, lambda made: made, rank=rank) as loader:
        return next(iter(loader))


def objective(**changes) -> Objective:
    fixed = {"flow": FLOW, "seed": 5, "num_samples": 7, "channels": 16, "text_dim": TEXT_DIM}
    return Objective(**fixed | {"caption_dropout": 0.4, "empty_text": EMPTY} | changes)


def reference_loss(transformer, items, flow: FlowConfig) -> tuple[torch.Tensor, float, int]:
    """The step's loss as its definition reads: sample by sample, mean over all elements."""
    weighted, plain, count, dropped = torch.zeros(()), 0.0, 0, 0
    for item in items:
        level, mix = keyed_fractions(2, 5, "sigma", item.name, item.draw)
        normal = torch.special.ndtri(torch.tensor(level, dtype=torch.float64)).item()
        u = level if mix < 0.2 else 1 / (1 + math.exp(-1.5 * normal))
        sigma = 2.5 / (2.5 + (1 / u - 1))
        clean = item.sample.tensors["latents"].float()
        noise = draw_noise(tuple(clean.shape), 5, item.name, item.draw)
        text = item.sample.tensors["text"]
        if keyed_fractions(1, 5, "caption_dropout", item.name, item.draw)[0] < 0.4:
            text, dropped = EMPTY, dropped + 1
        padded = torch.cat([text, torch.zeros(512 - text.shape[0], TEXT_DIM)])
        velocity = transformer(
            hidden_states=((1 - sigma) * clean + sigma * noise)[None],
            timestep=torch.tensor([1000 * sigma]),
            encoder_hidden_states=padded[None],
            return_dict=False,
        )[0][0]
        square = (velocity - (noise - clean)).square().sum()
        weighted = weighted + (1 + 2.5 * sigma) * square
        plain, count = plain + square.item(), count + clean.numel()
    assert 0 < dropped < len(items), "the test needs both kinds of captions"
    return weighted / count, plain / count, count


def forward_backward(model, *words, **options):
    return step.forward_backward(model, dict(model.named_parameters()), *words, **options)


def train_step(model, *words, **options):
    return step.train_step(model, dict(model.named_parameters()), *words, **options)


@pytest.fixture(scope="module")
def transformer(tiny_pipeline):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(tiny_pipeline / "transformer")


@pytest.mark.parametrize("budget", [80, 150, 1000])
def test_loss_and_every_gradient_equal_a_loop_over_diffusers(tiny_pipeline, transformer, budget):
    step = read_step(budget)
    assert (len(step.packs) > 1) == (budget < 1000)
    model = load_dit(tiny_pipeline)
    batch = build_batch(step, objective())
    weighted, plain = forward_backward(model, ALONE, batch, FLOW)

    transformer.zero_grad()
    items = [item for pack in step.packs for item in pack]
    expected, expected_plain, count = reference_loss(transformer, items, FLOW)
    expected.backward()
    assert batch.num_elements == count
    torch.testing.assert_close(weighted.sum() / count, expected.detach(), rtol=1e-5, atol=0)
    assert (plain.sum() / count).item() == pytest.approx(expected_plain, rel=1e-5)
    grads = state_dict_as({name: p.grad for name, p in model.named_parameters()}, "diffusers")
    reference = {name: p.grad for name, p in transformer.named_parameters()}
    assert grads.keys() == reference.keys()
    for name, grad in grads.items():
        scale = reference[name].abs().max()
        assert scale > 0, name
        assert (grad - reference[name]).abs().max() <= 1e-4 * scale, name


def test_a_step_does_not_depend_on_the_packing(tiny_pipeline):
    results = []
    for budget in (80, 130, 5000):
        model = load_dit(tiny_pipeline)
        batch = build_batch(read_step(budget), objective())
        results.append(train_step(model, ALONE, batch, FLOW, clip_norm=1.0))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize(("budget", "ranks", "num_empty"), [(80, 2, 0), (130, 4, 0), (5000, 8, 1)])
def test_gradients_and_losses_of_the_ranks_add_up_to_those_of_one(tiny_pipeline, budget, ranks, num_empty):
    def losses_of(batch):
        weighted, plain = forward_backward(model, ALONE, batch, FLOW)
        return torch.stack([weighted.sum(), plain.sum()]).double() / batch.num_elements

    def gradients():
        return {name: p.grad.double() for name, p in model.named_parameters()}

    model = load_dit(tiny_pipeline)
    expected = losses_of(build_batch(read_step(budget), objective()))
    reference = gradients()
    found, empty, summed = torch.zeros(2, dtype=torch.float64), 0, dict.fromkeys(reference, 0.0)
    for rank in range(ranks):
        batch = build_batch(read_step(budget, rank=rank, ranks=ranks), objective())
        filled = [made for made in batch.inputs if made.pack.video_lens]
        empty += len(batch.inputs) - len(filled)
        if not filled:
            continue
        model.zero_grad()
        found += losses_of(batch._replace(inputs=filled))
        summed = {name: summed[name] + grad for name, grad in gradients().items()}
    assert empty == num_empty
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for name, grad in reference.items():
        assert (summed[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name


def test_the_loss_of_a_step_weighs_ranks_by_their_tokens(tiny_pipeline, monkeypatch):
    """Two data ranks whose packs hold unequal tokens, one after the other: both have the loss of one process."""
    batches = [build_batch(read_step(130, 3, 3, rank, ranks=2), objective()) for rank in range(2)]
    tokens = [sum(len(made.pack.tokens) for made in batch.inputs) for batch in batches]
    assert sorted(tokens) == [32, 80]
    whole = build_batch(read_step(130, 3, 3), objective())
    expected = train_step(load_dit(tiny_pipeline), ALONE, whole, FLOW, None)
    mesh = Mesh(ONE_PROCESS, torch.device("cpu"))
    mesh.layout = Layout(dp_replicate=2)
    monkeypatch.setattr(step, "sum_copies", lambda params, mesh: None)
    monkeypatch.setattr(step, "clip_gradients", lambda params, mesh, max_norm: torch.zeros(()))
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: sent.append(values.clone()))
    for batch in batches:
        train_step(load_dit(tiny_pipeline), mesh, batch, FLOW, None)
    assert len(sent) == 2
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.copy_(sent[0] + sent[1]))
    for batch in batches:
        found = train_step(load_dit(tiny_pipeline), mesh, batch, FLOW, None)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.weighted_loss == pytest.approx(expected.weighted_loss, rel=1e-5)


def test_stratified_levels_use_the_place_in_the_step():
    flow = FlowConfig(sampler="uniform", shift=1.0, stratified=True)
    batch = build_batch(read_step(1000), objective(flow=flow, caption_dropout=0.0))
    levels = sorted(torch.cat([made.sigma for made in batch.inputs]).tolist())
    assert all(i / 7 <= level < (i + 1) / 7 for i, level in enumerate(levels))


def test_inputs_are_the_noised_samples_in_their_order():
    batch = build_batch(step := read_step(1000), objective())
    (pack, target, sigma) = batch.inputs[0]
    first = 0
    for item, n, s in zip(step.packs[0], pack.video_lens, sigma, strict=True):
        clean = patchify(item.sample.tensors["latents"].float())
        noisy, velocity = pack.tokens[first : first + n], target[first : first + n]
        torch.testing.assert_close(noisy - s * velocity, clean, atol=2e-6, rtol=0)
        first += n
    assert batch.totals.num_tokens == first and batch.totals.num_samples == 7
    assert sigma.dtype == torch.float32


def test_bf16_computes_in_bf16_and_stays_near(tiny_pipeline):
    batch = build_batch(read_step(1000), objective())
    results, grads = [], []
    for precision in ("fp32", "bf16"):
        model = load_dit(tiny_pipeline)
        apply_layout(model, ALONE, ComputeConfig(precision=precision))
        results.append(train_step(model, ALONE, batch, FLOW, None))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    assert results[0] != results[1]
    assert results[1].loss == pytest.approx(results[0].loss, rel=0.02)
    assert torch.nn.functional.cosine_similarity(grads[0], grads[1], dim=0) > 0.99


def test_only_what_is_trained_is_summed_measured_and_clipped(tiny_pipeline, monkeypatch):
    """Of a model in which every parameter has a gradient."""
    batch = build_batch(read_step(1000), objective())
    model, summed = load_dit(tiny_pipeline), []
    forward_backward(model, ALONE, batch, FLOW)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    names = ["blocks.0.ffn.0.weight", "head.head.bias"]
    trained = {name: param for name, param in model.named_parameters() if name in names}
    monkeypatch.setattr(step, "sum_copies", lambda params, mesh: summed.extend(params))
    found = step.train_step(model, trained, ALONE, batch, FLOW, 0.01)
    assert len(summed) == 2 and all(a is b for a, b in zip(summed, trained.values(), strict=True))
    norm = torch.stack([before[name].norm() for name in names]).norm()
    assert found.grad_norm == pytest.approx(norm.item(), rel=1e-6) and norm > 0.01
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, before[name] * (0.01 / norm if name in names else 1), rtol=1e-4, atol=0)


def test_clipping_scales_all_gradients_alike():
    params = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(4))]
    given, g = [params[0], params[2]], torch.Generator().manual_seed(0)  # one between them has no gradient
    for p in given:
        p.grad = torch.randn(p.shape, generator=g)
    before = torch.cat([p.grad.flatten() for p in given])
    assert clip_gradients(params, ALONE, None).item() == pytest.approx(before.norm().item())
    assert torch.equal(torch.cat([p.grad.flatten() for p in given]), before)
    assert clip_gradients(params, ALONE, 0.5).item() == pytest.approx(before.norm().item())
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in given]), before * 0.5 / before.norm())
    clip_gradients(params, ALONE, 10.0)
    assert torch.cat([p.grad.flatten() for p in given]).norm() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_found_and_named(tiny_pipeline, what):
    step = read_step(100)
    model = load_dit(tiny_pipeline)
    batch = build_batch(step, objective())
    if what == "loss":
        batch.inputs[1].target[3, 1] = float("nan")
        expected = [item.sample.key for item in step.packs[1]]
    else:
        model.head.head.weight.register_hook(lambda grad: grad * float("inf"))
        expected = [item.sample.key for pack in step.packs for item in pack]
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFiniteError, match=f"the {what} of step 2") as caught:
        train_step(model, ALONE, batch, FLOW, clip_norm=1.0)
    assert caught.value.keys == expected
    assert caught.value.weights == [] and len(caught.value.samples) == (what == "loss")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weights_and_samples_are_told_apart(tiny_pipeline):
    """By what is not finite before the step."""
    step, model = read_step(100), load_dit(tiny_pipeline)
    batch = build_batch(step, objective())
    assert find_cause(model, batch) == ([], [])
    with torch.no_grad():
        dict(model.named_parameters())["blocks.0.ffn.0.weight"][3, 3] = float("inf")
    batch.inputs[1].pack.text[-1, 0] = float("nan")
    assert find_cause(model, batch) == (["blocks.0.ffn.0.weight"], [step.packs[1][-1].sample.key])
