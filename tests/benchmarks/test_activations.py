"""What a block keeps for its backward pass: what is promised of it, and what is claimed against diffusers."""

import pytest
import torch

from benchmarks import c05_activations as module
from benchmarks.c05_activations import LIMITS, TOY, attention_in_bf16, build_ours, kept_by_block, norm_in_one
from benchmarks.pair import WIDTHS
from wanloom.model.settings import DiTConfig
from wanloom.parallel.memory import kept_bytes
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.slow

FOURTEEN = VARIANTS["wan2.1-t2v-14b"].shape
KEPT = {"none": 352_612, "cheap": 130_208, "attention": 30_880, "full": 20_480}  # the lengths of rows are kept too


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
@pytest.mark.parametrize("policy", LIMITS)
def test_a_block_keeps_the_bytes_that_are_promised(policy, autocast):
    """Of the 14B model, exactly."""
    with attention_in_bf16():
        found = kept_by_block(lambda config: build_ours(config, policy, autocast), WIDTHS["14B"])
    assert found == KEPT[policy] == pytest.approx(kept_bytes(FOURTEEN, policy, bf16=True), rel=2e-3)


def test_other_shapes_and_fp32_keep_what_is_promised(monkeypatch):
    monkeypatch.setattr(module, "cast_weights", lambda model, dtype: None)
    for dim, ffn_dim, heads in [(128, 512, 4), (256, 512, 4), (128, 1024, 2)]:
        shape = {"dim": dim, "ffn_dim": ffn_dim, "num_heads": heads}
        expected = kept_bytes(DiTConfig(num_layers=1, **shape), "none", bf16=False)
        assert kept_by_block(build_ours, shape) == pytest.approx(expected, rel=0.05)


def test_the_peer_keeps_more_than_twice_as_much_as_cheap():
    """On a GPU, where RMS norm is one operator. Without 1,024 bytes of the rotations, which its blocks share."""
    with norm_in_one():
        theirs = kept_by_block(module.build_peer, WIDTHS["14B"])
    assert theirs == 311_652 and KEPT["cheap"] <= 135_000 and KEPT["cheap"] < theirs / 2
    assert kept_by_block(module.build_peer, WIDTHS["14B"]) == 403_812  # on a CPU


def test_rms_norm_in_one_keeps_three_streams_fewer():
    with attention_in_bf16(), norm_in_one():
        assert kept_by_block(build_ours, WIDTHS["14B"]) == KEPT["none"] - 3 * 4 * 5120


def test_rms_norm_in_one_is_an_operator_each_way():
    """It keeps its input and one fp32 value of each row."""
    with module.FakeTensorMode(), module.Storages() as storages, norm_in_one():
        norm = torch.nn.RMSNorm(128, dtype=torch.bfloat16)
        x = torch.empty(10, 128, dtype=torch.bfloat16, requires_grad=True)
        before = storages.alive()
        out = norm(x)
        assert storages.alive() - before == out.nbytes + 10 * 4
        out.backward(torch.empty_like(out))
        assert x.grad.shape == x.shape and norm.weight.grad.shape == norm.weight.shape


@pytest.mark.filterwarnings("default")
def test_both_ways_of_counting_agree():
    """What autograd saves in a block that runs, and what is alive after a forward pass of several."""
    torch._dynamo.reset()
    with attention_in_bf16():
        alive = kept_by_block(build_ours, TOY)
    assert module.saved_by_block(TOY, compiled=False) == alive
