import pytest
import torch

from wanloom.config import UserError
from wanloom.model import attention
from wanloom.model.attention import PackedAttention, resolve_kernel

# (query lengths, key lengths)
CASES = {
    "self, all unlike": ((5, 3, 8), (5, 3, 8)),
    "self, runs": ((4, 4, 4, 7, 4), (4, 4, 4, 7, 4)),
    "cross, equal queries and unlike keys": ((6, 6, 6), (1, 9, 4)),
    "cross, mixed": ((6, 6, 2, 2, 2, 9), (3, 3, 3, 1, 12, 5)),
    "one sample": ((7,), (3,)),
}


def draw(q_lens, k_lens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(q_lens), 3, 8, generator=generator)
    k, v = torch.randn(2, sum(k_lens), 3, 8, generator=generator)
    bias = 3 * torch.randn(sum(k_lens), generator=generator)
    return [x.requires_grad_() for x in (q, k, v)], bias


def loop(q, k, v, q_lens, k_lens, bias):
    """Sample by sample, head by head, in float64."""
    out = []
    bias = torch.zeros(len(k)) if bias is None else bias
    rows = zip(q.split(q_lens), k.split(k_lens), v.split(k_lens), bias.split(k_lens), strict=True)
    for q_one, k_one, v_one, bias_one in rows:
        heads = []
        for head in range(q.shape[1]):
            logits = q_one[:, head].double() @ k_one[:, head].double().T / q.shape[2] ** 0.5 + bias_one.double()
            heads.append(torch.softmax(logits, dim=-1) @ v_one[:, head].double())
        out.append(torch.stack(heads, dim=1))
    return torch.cat(out)


@pytest.mark.parametrize("batch_below", [0, 5, 512])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_a_plain_loop_with_its_gradients(case, biased, batch_below, monkeypatch):
    monkeypatch.setattr(attention, "BATCH_BELOW", batch_below)
    attention.group.cache_clear()
    q_lens, k_lens = CASES[case]
    leaves, bias = draw(q_lens, k_lens)
    bias = bias if biased else None
    out = PackedAttention()(*leaves, q_lens, k_lens, bias)
    expected = loop(*leaves, q_lens, k_lens, bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), leaves)
    for value, target in zip(found, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(value, target, rtol=1e-4, atol=1e-5)
    attention.group.cache_clear()


def test_groups_batch_short_neighbours_and_run_long_ones_alone():
    long = attention.BATCH_BELOW
    assert attention.group((4, 4, 9, long, long, long), (1, 2, 3, 5, 5, 6)) == [
        (2, 4, (1, 2)),
        (1, 9, (3,)),
        (2, long, (5, 5)),
        (1, long, (6,)),
    ]


def test_n_equal_keys_are_one_with_log_n():
    (q, k, v), _ = draw((5, 2), (4, 4))
    many_k = torch.cat([k[:4], k[3:4].expand(99, -1, -1), k[4:]])
    many_v = torch.cat([v[:4], v[3:4].expand(99, -1, -1), v[4:]])
    bias = torch.zeros(8)
    bias[3] = torch.tensor(100.0).log()
    attend = PackedAttention()
    torch.testing.assert_close(
        attend(q, k, v, (5, 2), (4, 4), bias), attend(q, many_k, many_v, (5, 2), (103, 4)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_in_and_out_with_fp32_between(autocast):
    q_lens, k_lens = CASES["cross, mixed"]
    leaves, bias = draw(q_lens, k_lens)
    half = [x.detach().bfloat16() for x in leaves]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = PackedAttention()(*half, q_lens, k_lens, bias)
    assert out.dtype == torch.bfloat16
    exact = loop(*half, q_lens, k_lens, bias)
    assert torch.equal(out, PackedAttention()(*(x.float() for x in half), q_lens, k_lens, bias).bfloat16())
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


def test_auto_is_what_runs_here():
    assert resolve_kernel("auto", "cpu", torch.float32) == resolve_kernel("auto", "cpu", torch.bfloat16) == "sdpa"


@pytest.mark.parametrize(("name", "message"), [("cudnn", "needs a CUDA device"), ("spda", "Did you mean 'sdpa'")])
def test_a_kernel_that_cannot_run_is_an_error(name, message):
    (q, k, v), _ = draw((3,), (3,))
    with pytest.raises(UserError, match=message):
        PackedAttention(name)(q, k, v, (3,), (3,))
