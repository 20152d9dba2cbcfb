import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from dit_reference import (
    SMALL,
    Samples,
    build_model,
    build_reference,
    draw_samples,
    gradients,
    loss,
    relative_error,
    run_reference,
)

from wanloom.config import build_config
from wanloom.errors import UserError
from wanloom.model.attention import PackedAttention
from wanloom.model.dit import WanDiT, cast_weights, keeps_fp32, time_features
from wanloom.model.init import init_weights
from wanloom.model.sequence import apply_rope, build_pack, grid_of, grid_positions, patchify, rope_table
from wanloom.model.settings import DiTConfig
from wanloom.variants import VARIANTS

# unlike frames and sizes, images beside videos, neighbours of equal size, captions from empty to full, one at the limit
MIXED = ([(1, 4, 6), (3, 4, 4), (3, 4, 4), (2, 6, 2), (5, 2, 8), (1, 2, 2)], [5, 0, 512, 7, 511, 5])
CASES = {
    "mixed": (SMALL, *MIXED),
    "head of 12 as in diffusers' own tests": (
        DiTConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=16),
        [(2, 16, 16), (1, 8, 8)],
        [300, 130],
    ),
    "three heads, three blocks, 16 channels": (
        DiTConfig(dim=96, ffn_dim=200, num_heads=3, num_layers=3, text_dim=24, freq_dim=32),
        [(4, 4, 6), (4, 6, 4), (1, 8, 8), (1, 8, 8), (1, 8, 8)],
        [12, 12, 1, 80, 9],
    ),
    "one sample, one head, one block": (
        DiTConfig(dim=20, ffn_dim=16, num_heads=1, num_layers=1, in_channels=2, out_channels=2, text_dim=8),
        [(1, 4, 4)],
        [200],
    ),
    "longer than one call's batch": (
        DiTConfig(dim=16, ffn_dim=24, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=8),
        [(9, 16, 16), (9, 16, 16), (1, 4, 4), (9, 16, 16)],
        [320, 133, 420, 420],
    ),
    "two levels, of which one is 0": (SMALL, *MIXED),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reference_dtype", [torch.float32, torch.float64])
def test_a_pack_equals_diffusers_on_each_sample_alone(case, reference_dtype, monkeypatch):
    config, shapes, text_lens = CASES[case]
    seed = list(CASES).index(case)
    model = build_model(config, seed)
    samples = draw_samples(config, shapes, text_lens, seed + 100, levels=1 + case.startswith("two levels"))
    if case.startswith("two levels"):
        assert (len(samples.pack.video_lens), len(samples.pack.level_lens)) == (6, 10)
        samples.sigma[1] = 0
    out = model(samples.pack, samples.sigma).split(samples.pack.video_lens)
    loss(list(out), samples).backward()
    found = gradients(model)
    if reference_dtype == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # its norms and tables ask for fp32
    reference = build_reference(model).to(reference_dtype)
    expected = run_reference(reference, samples, config.text_slots)
    loss(expected, samples).backward()
    for value, target in zip(out, expected, strict=True):
        assert target.dtype == reference_dtype
        assert relative_error(value, target) < 5e-5
    bound = 1e-4 if reference_dtype == torch.float32 else 5e-5  # diffusers in fp32 is further from fp64 than we are
    for name, param in reference.named_parameters():
        assert param.grad.norm() > 1e-4
        assert relative_error(found.pop(name), param.grad) < bound, name
    assert not found


def test_gradients_of_latents_and_text_equal_diffusers():
    samples = draw_samples(SMALL, *MIXED, seed=5)
    model = build_model(SMALL)
    pack = samples.pack
    pack.tokens.requires_grad_()
    pack.text.requires_grad_()
    loss(list(model(pack, samples.sigma).split(pack.video_lens)), samples).backward()
    for leaf in (*samples.latents, *samples.texts):
        leaf.requires_grad_()
    loss(run_reference(build_reference(model), samples, 512), samples).backward()
    tokens = torch.cat([patchify(x.grad) for x in samples.latents])
    assert relative_error(pack.tokens.grad, tokens) < 1e-4
    assert relative_error(pack.text.grad, torch.cat([x.grad for x in samples.texts])) < 1e-4


@pytest.mark.parametrize("eps", [1e-2, 1e-10])
def test_every_norm_has_the_eps_of_the_config(eps):
    """Where all that is normed is about as small as the eps: another one in any norm would show."""
    config = SMALL.model_copy(update={"eps": eps})
    model, samples = build_model(config), draw_samples(config, *MIXED, seed=11)
    small = ("patch_embedding", "self_attn.q", "self_attn.k", "self_attn.o", "cross_attn.q", "cross_attn.k")
    small += ("cross_attn.o", "ffn.2")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if any(part in name for part in small):
                param *= 0.3 * eps**0.5
    expected = run_reference(build_reference(model), samples, config.text_slots)
    out = model(samples.pack, samples.sigma)
    assert relative_error(out, torch.cat(expected)) < 5e-5
    norms = [module for module in model.modules() if hasattr(module, "eps")]
    assert len(norms) == 6 * config.num_layers + 1
    for module in norms:  # each of them is seen: with the default in its place the result is another one
        module.eps = 1e-6
        assert relative_error(model(samples.pack, samples.sigma), out) > 2e-4
        module.eps = eps


@pytest.mark.parametrize("where", ["all", "fp32 parts alone"])
def test_queries_and_keys_are_rounded_once_and_after_the_rotation(where, monkeypatch):
    attention: Any = build_model(SMALL).blocks["0"].self_attn.requires_grad_(False)
    for name, param in attention.named_parameters():
        if where == "all" or "norm" not in name:
            param.data = param.data.bfloat16()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, SMALL.dim, generator=generator).bfloat16()
    rotation = rope_table(grid_positions((2, 4, 5)), attention.head_dim)
    seen = []
    core = attention.attend
    monkeypatch.setattr(
        core, "forward", lambda q, k, v, *rest: seen.extend((q, k)) or PackedAttention()(q, k, v, *rest)
    )
    attention(x, x, torch.tensor([40]), torch.tensor([40]), rotation=rotation)
    for found, linear, norm in zip(seen, ("q", "k"), ("norm_q", "norm_k"), strict=True):
        normed = getattr(attention, norm)(getattr(attention, linear)(x)).unflatten(-1, (-1, attention.head_dim))
        assert normed.dtype == torch.float32
        exact = apply_rope(normed, rotation)
        assert torch.equal(found, exact.bfloat16())
        twice = apply_rope(normed.bfloat16(), rotation)  # what it must not be
        assert not torch.equal(found, twice)


def test_other_samples_of_the_pack_do_not_matter():
    samples = draw_samples(SMALL, *MIXED, seed=6)
    model = build_model(SMALL)
    packed = model(samples.pack, samples.sigma).split(samples.pack.video_lens)
    for i in range(len(packed)):
        latents = samples.latents[i]
        alone = build_pack([patchify(latents)], [grid_of(latents.shape)], [samples.texts[i]])
        torch.testing.assert_close(model(alone, samples.sigma[i : i + 1]), packed[i], rtol=1e-4, atol=1e-5)


def test_folded_text_equals_all_slots_written_out():
    """The same model on captions padded with zero rows to 512 states, so that nothing is folded."""
    samples = draw_samples(SMALL, *MIXED, seed=7)
    full = [torch.cat([text, text.new_zeros(512 - len(text), text.shape[1])]) for text in samples.texts]
    plain = build_pack([patchify(x) for x in samples.latents], [grid_of(x.shape) for x in samples.latents], full)
    model = build_model(SMALL)
    results = []
    for pack in (samples.pack, plain):
        model.zero_grad()
        out = model(pack, samples.sigma)
        loss(list(out.split(pack.video_lens)), samples).backward()
        results.append((out, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (folded, folded_grads), (written, written_grads) = results
    assert relative_error(folded, written) < 1e-5
    for name, grad in written_grads.items():
        assert relative_error(folded_grads[name], grad) < 1e-4, name


@pytest.mark.parametrize("mode", ["fp32", "autocast", "weights"])
def test_kept_text_gives_the_bits_of_text_read_anew(mode):
    model, samples = build_model(SMALL).requires_grad_(False), draw_samples(SMALL, *MIXED, seed=9)
    if mode == "weights":
        cast_weights(model, torch.bfloat16)
    pack = samples.pack
    unread = replace(pack, text=torch.full_like(pack.text, torch.nan))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        text_kv = model.text_kv(pack)
        for sigma in (samples.sigma, samples.sigma / 3):
            assert torch.equal(model(unread, sigma, text_kv=text_kv), model(pack, sigma))
    keys = sum(length + (length < 512) for length in pack.text_lens)
    kept = sum(x.untyped_storage().nbytes() for each in text_kv.values() for x in each)
    assert kept == 2 * SMALL.num_layers * keys * SMALL.dim * (4 if mode == "fp32" else 2)


def test_a_caption_longer_than_the_slots_is_an_error():
    samples = draw_samples(SMALL, [(1, 2, 2)], [513], seed=0)
    for call in (lambda model: model(samples.pack, samples.sigma), lambda model: model.text_kv(samples.pack)):
        with pytest.raises(ValueError, match="513 text states"):
            call(build_model(SMALL))


@pytest.mark.parametrize("sigma", [torch.zeros(2), torch.zeros(1, dtype=torch.bfloat16)])
def test_sigma_is_one_fp32_value_per_sample(sigma):
    samples = draw_samples(SMALL, [(1, 2, 2)], [5], seed=0)
    with pytest.raises(ValueError, match="sigma"):
        build_model(SMALL)(samples.pack, sigma)


def test_time_features_are_cosines_then_sines_of_the_timestep():
    sigma = torch.tensor([0.0, 0.37, 1.0])
    features = time_features(sigma, 8)
    for i, value in enumerate(sigma.double() * 1000):
        for j in range(4):
            angle = value * 10_000 ** (-j / 4)
            assert features[i, j] == pytest.approx(angle.cos().item(), abs=1e-6)
            assert features[i, 4 + j] == pytest.approx(angle.sin().item(), abs=1e-6)


# ---- bf16

BF16_CONFIG = DiTConfig(dim=96, ffn_dim=256, num_heads=3, num_layers=4, text_dim=32)
OUTPUT_BOUND = 0.008  # relative to fp32, four blocks of random weights; measured 0.0035
GRADIENT_BOUND = 0.03  # measured 0.012


def bf16_case() -> tuple[WanDiT, Samples, torch.Tensor]:
    model = build_model(BF16_CONFIG)
    samples = draw_samples(BF16_CONFIG, *MIXED, seed=8)
    return model, samples, model(samples.pack, samples.sigma)


def test_bf16_by_autocast_stays_close_to_fp32_with_its_gradients():
    model, samples, exact = bf16_case()
    loss(list(exact.split(samples.pack.video_lens)), samples).backward()
    exact_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(samples.pack, samples.sigma)
    assert out.dtype == torch.float32
    loss(list(out.split(samples.pack.video_lens)), samples).backward()
    assert 1e-4 < relative_error(out, exact) < OUTPUT_BOUND
    for name, param in model.named_parameters():
        assert param.grad.dtype == torch.float32
        assert relative_error(param.grad, exact_grads[name]) < GRADIENT_BOUND, name


def test_bf16_weights_stay_closer_to_fp32_than_diffusers():
    model, samples, exact = bf16_case()
    reference = build_reference(model).to(torch.bfloat16)
    # what from_pretrained(torch_dtype=torch.bfloat16) does
    for name, param in reference.named_parameters():
        if any(part in name for part in ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")):
            param.data = param.data.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(samples.pack, samples.sigma)
    cast_weights(model, torch.bfloat16)
    assert model.get_parameter("blocks.0.ffn.0.weight").dtype == torch.bfloat16
    out = model(samples.pack, samples.sigma)
    theirs = torch.cat(run_reference(reference, samples, 512))
    assert out.dtype == torch.float32
    assert 1e-4 < relative_error(out, exact) < OUTPUT_BOUND
    assert relative_error(out, exact) < relative_error(theirs, exact)
    assert torch.equal(out, autocast)


def test_a_model_cast_as_a_whole_still_runs_its_fp32_parts_in_fp32():
    model, samples, exact = bf16_case()
    assert 1e-4 < relative_error(model.to(torch.bfloat16)(samples.pack, samples.sigma), exact) < 2 * OUTPUT_BOUND


@pytest.mark.parametrize("mode", ["autocast", "weights"])
def test_what_runs_in_which_dtype(mode):
    model, samples, _ = bf16_case()
    if mode == "weights":
        cast_weights(model, torch.bfloat16)
    dtypes: dict[str, torch.dtype] = {}
    watched = set()
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)) or isinstance(module, PackedAttention):
            watched.add(name)
            module.register_forward_hook(
                lambda module, inputs, out, name=name: dtypes.update(
                    {name: (out[0] if isinstance(out, tuple) else out).dtype}
                )
            )
    streams: list[torch.dtype] = []
    for block in model.blocks.values():
        block.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        model(samples.pack, samples.sigma)
    assert streams == [torch.float32] * 4
    assert dtypes == {name: torch.float32 if keeps_fp32(name) else torch.bfloat16 for name in watched}
    assert {"blocks.3.cross_attn.attend", "blocks.0.modulation", "head.head", "patch_embedding"} <= watched


# ---- configs and initial weights


def test_parameter_counts_of_the_published_models():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in WanDiT(row.shape).parameters()) for name, row in VARIANTS.items()}
    assert counts["wan2.1-t2v-1.3b"] == 1_418_996_800
    assert counts["wan2.1-t2v-14b"] == 14_288_491_584
    assert counts["tiny"] < 2_000_000


def test_every_parameter_is_in_a_leaf_module():
    for name, module in build_model(SMALL).named_modules():
        assert not (list(module.children()) and list(module.parameters(recurse=False))), name


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="48 does not split into 5 heads"):
        build_config(DiTConfig, {"dim": 48, "ffn_dim": 8, "num_heads": 5, "num_layers": 1})


def test_init_is_the_originals():
    config = DiTConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=128)
    model = WanDiT(config)
    init_weights(model, seed=3)
    for name, param in model.named_parameters():
        values = param.detach()
        if "norm" in name:
            assert (values == float(name.endswith("weight"))).all(), name
        elif "modulation" in name:
            assert values.std().item() == pytest.approx(256**-0.5, rel=0.1), name
        elif name == "patch_embedding.bias":
            assert 0.7 / 8 < values.abs().max() <= 1 / 8
        elif name.endswith("bias") or name == "head.head.weight":
            assert not values.any(), name
        elif name.startswith(("text_embedding", "time_embedding")):
            assert values.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = (6 / sum(values.shape)) ** 0.5
            assert 0.99 * bound < values.abs().max() <= bound, name
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
    samples = draw_samples(config, [(1, 4, 4)], [3], seed=0)
    assert not model(samples.pack, samples.sigma).any()


def test_init_depends_on_the_seed_and_the_names_alone():
    first, again, other, deeper = (WanDiT(SMALL.model_copy(update={"num_layers": n})) for n in (2, 2, 2, 3))
    for model, seed in ((first, 1), (again, 1), (other, 2), (deeper, 1)):
        torch.rand(7)
        init_weights(model, seed)
    states = [model.state_dict() for model in (first, again, other, deeper)]
    drawn = [name for name, value in states[0].items() if value.unique().numel() > 1]
    assert len(drawn) == 8 + 11 * 2  # all but zeros and ones
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert torch.equal(value, states[3][name]), name
    assert not any(torch.equal(states[0][name], states[2][name]) for name in drawn)
    assert not torch.equal(states[0]["blocks.0.self_attn.q.weight"], states[0]["blocks.1.self_attn.q.weight"])


def test_every_seed_draws_other_weights():
    """Also those that only their lowest bit, a high one or the sign tells apart."""
    seeds = (0, 1, 2, 3, 4, 2**31, 2**32, 2**33, 2**63, -1)
    model, found = WanDiT(SMALL), {}
    for seed in seeds:
        init_weights(model, seed)
        for name in ("blocks.1.ffn.0.weight", "text_embedding.0.weight", "blocks.0.modulation.weight"):
            found.setdefault(name, []).append(model.get_parameter(name).detach().flatten()[:4].clone())
    for name, values in found.items():
        assert len({tuple(value.tolist()) for value in values}) == len(seeds), name


def test_a_model_built_on_meta_can_be_filled():
    with torch.device("meta"):
        model = WanDiT(SMALL)
    model.to_empty(device="cpu")
    init_weights(model, 4)
    plain = WanDiT(SMALL)
    init_weights(plain, 4)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "value"), [("num_layers", 10_000_000), ("dim", 2**40), ("text_slots", 10**9), ("eps", 1e9), ("dim", 0)]
)
def test_a_shape_that_no_model_has_is_refused_before_it_is_built(name, value):
    shape = {"dim": 128, "ffn_dim": 512, "num_heads": 4, "num_layers": 6, name: value}
    with pytest.raises(UserError, match=f"The setting '{name}' is {re.escape(str(value))}: it must be"):
        build_config(DiTConfig, shape)
