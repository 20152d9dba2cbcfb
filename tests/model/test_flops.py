from dataclasses import replace

import pytest
import torch
from dit_reference import build_model, draw_samples
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from wanloom.model.flops import count_frozen, forward_flops, train_flops
from wanloom.model.settings import DiTConfig
from wanloom.variants import VARIANTS

WIDE = DiTConfig(dim=256, ffn_dim=1024, num_heads=2, num_layers=2, text_dim=64)


@register_flop_formula(torch.ops.wanloom.attend, get_raw=True)
def attention_flops(q, k, v, q_lens, k_lens, *args, out_val, **kwargs) -> int:
    """Two matrix products of queries times keys for each sample."""
    return 4 * q.shape[1] * q.shape[2] * int((q_lens * k_lens).sum())


@register_flop_formula(torch.ops.wanloom.attend_backward, get_raw=True)
def attention_backward_flops(grad_out, q, k, v, out, lse, *lens, out_val, **kwargs) -> int:
    """By convention two products for each of forward."""
    return 2 * attention_flops(q, k, v, *lens[:2], out_val=out_val)


@pytest.mark.parametrize(("shape", "text_len"), [((5, 16, 16), 40), ((1, 8, 8), 511), ((3, 32, 8), 0)])
def test_agrees_with_the_counter_of_torch(shape, text_len):
    """On the model as it runs, the unused slots folded into one key; attention as the formula above."""
    model = build_model(WIDE)
    samples = draw_samples(WIDE, [shape], [text_len], seed=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(samples.pack, samples.sigma)
    tokens = samples.pack.video_lens[0]
    expected = forward_flops(WIDE, tokens, text_slots=text_len + 1)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("parts", ["", ".ffn.", "blocks.0.", "cross_attn", "text_embedding", "head.head.bias"])
def test_training_of_some_parameters_agrees_with_the_counter_of_torch(parts):
    """Also the gradients of tokens and text are asked for: the convention counts those of all inputs.

    Of few tokens and much text: what is counted with the wrong one of the two is far off.
    """
    model = build_model(WIDE)
    names = [name for name, _ in model.named_parameters() if parts in name]
    for name, param in model.named_parameters():
        param.requires_grad_(name in names)
    samples = draw_samples(WIDE, [(3, 8, 8)], [250], seed=0)
    pack = replace(samples.pack, tokens=samples.pack.tokens.requires_grad_(), text=samples.pack.text.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        model(pack, samples.sigma).sum().backward()
    expected = train_flops(WIDE, len(pack.tokens), 251, count_frozen(WIDE, names))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("model", "tokens", "tera"),
    [("1.3b", 390, 1.19), ("1.3b", 32_760, 283.0), ("14b", 75_600, 6523.4), ("14b", 390, 11.81)],
)
def test_forward_flops_of_known_shapes(model, tokens, tera):
    assert forward_flops(VARIANTS[f"wan2.1-t2v-{model}"].shape, tokens) == pytest.approx(tera * 1e12, rel=5e-3)
