import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from wanloom import torch_private
from wanloom.errors import UserError
from wanloom.model import attention, kernels
from wanloom.model.attention import PackedAttention
from wanloom.model.kernels import resolve_kernel

# (query lengths, key lengths)
CASES = {
    "self, all unlike": ((5, 3, 8), (5, 3, 8)),
    "self, runs": ((4, 4, 4, 7, 4), (4, 4, 4, 7, 4)),
    "cross, equal queries and unlike keys": ((6, 6, 6), (1, 9, 4)),
    "cross, mixed": ((6, 6, 2, 2, 2, 9), (3, 3, 3, 1, 12, 5)),
    "one sample": ((7,), (3,)),
    "samples without queries": ((0, 4, 0, 0, 4, 3, 0), (2, 5, 0, 7, 5, 1, 3)),
}


def draw(q_lens, k_lens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(q_lens), 3, 8, generator=generator)
    k, v = torch.randn(2, sum(k_lens), 3, 8, generator=generator)
    bias = 3 * torch.randn(sum(k_lens), generator=generator)
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), bias


def attend(q, k, v, q_lens, k_lens, bias=None, kernel="auto"):
    return PackedAttention(kernel)(q, k, v, torch.tensor(q_lens), torch.tensor(k_lens), bias)


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
    out = attend(*leaves, q_lens, k_lens, bias)
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
    torch.testing.assert_close(
        attend(q, k, v, (5, 2), (4, 4), bias), attend(q, many_k, many_v, (5, 2), (103, 4)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_in_and_out_with_fp32_between(autocast):
    q_lens, k_lens = CASES["cross, mixed"]
    leaves, bias = draw(q_lens, k_lens)
    q, k, v = (x.detach().bfloat16() for x in leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = attend(q, k, v, q_lens, k_lens, bias)
    assert out.dtype == torch.bfloat16
    exact = loop(q, k, v, q_lens, k_lens, bias)
    assert torch.equal(out, attend(q.float(), k.float(), v.float(), q_lens, k_lens, bias).bfloat16())
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)


def test_auto_is_what_runs_here():
    assert resolve_kernel("auto", "cpu", torch.float32) == resolve_kernel("auto", "cpu", torch.bfloat16) == "flash"


@pytest.mark.parametrize(("name", "message"), [("cudnn", "needs a CUDA device"), ("flsh", "Did you mean 'flash'")])
def test_a_kernel_that_cannot_run_is_an_error(name, message):
    (q, k, v), _ = draw((3,), (3,))
    with pytest.raises(UserError, match=message):
        attend(q, k, v, (3,), (3,), kernel=name)


def test_samples_without_keys_and_lengths_of_something_else_are_errors():
    (q, k, v), bias = draw((4, 2), (3, 3))
    with pytest.raises(ValueError, match="no keys"):
        attend(q, k, v, (4, 2), (6, 0))
    with pytest.raises(ValueError, match="sum to 5, 6, not 6, 6"):
        attend(q, k, v, (3, 2), (3, 3))
    with pytest.raises(ValueError, match="bias of the keys"):
        attend(q, k, v, (4, 2), (3, 3), bias.requires_grad_())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.15, of its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_are_what_their_shapes_and_gradients_say(dtype):
    """What a compiler relies on: shapes, strides and dtypes without content, no aliases, and the registrations."""
    leaves, bias = draw(*CASES["cross, mixed"])
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    lens = [torch.tensor(x) for x in CASES["cross, mixed"]]
    torch.library.opcheck(torch.ops.wanloom.attend, (*leaves, *lens, bias, "auto"))
    out, lse = (x.detach() for x in torch.ops.wanloom.attend(*leaves, *lens, bias, "auto"))
    given = [torch.randn_like(out), *(x.detach() for x in leaves), out, lse, *lens, bias, "auto"]
    torch.library.opcheck(torch.ops.wanloom.attend_backward, tuple(given))


def test_gradients_of_keys_in_two_parts_add_up_when_out_and_lse_are_the_whole_s():
    (q, k, v), bias = draw((5, 4), (6, 6))
    q, k, v = (x.detach() for x in (q, k, v))
    grad = torch.randn_like(q)
    out, lse = attention.packed_forward(q, k, v, (5, 4), (6, 6), bias, "auto")
    dq, dk, dv = attention.packed_backward(grad, q, k, v, out, lse, (5, 4), (6, 6), bias, "auto")
    total = torch.zeros_like(q)
    for rows in ([0, 1, 6, 7], [2, 3, 4, 5, 8, 9, 10, 11]):
        lens = (len(rows) // 2,) * 2
        part = attention.packed_backward(grad, q, k[rows], v[rows], out, lse, (5, 4), lens, bias[rows], "auto")
        total += part[0]
        torch.testing.assert_close(part[1], dk[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part[2], dv[rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, dq, rtol=1e-5, atol=1e-6)


def test_one_graph_for_other_lengths_and_other_numbers_of_samples():
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(PackedAttention(), backend=count, dynamic=True, fullgraph=True)
    # sizes that are equal in the first call are taken for one: 4 samples, 3 heads of 8
    for q_lens, k_lens in (((5, 3, 8, 1), (2, 3, 9, 1)), ((4, 4), (6, 2)), ((3, 9, 2, 2, 1), (1, 1, 7, 2, 2))):
        leaves, bias = draw(q_lens, k_lens)
        out = compiled(*leaves, torch.tensor(q_lens), torch.tensor(k_lens), bias)
        expected = attend(*leaves, q_lens, k_lens, bias)
        assert torch.equal(out, expected)
        found = torch.autograd.grad(out.sum(), leaves)
        assert all(map(torch.equal, found, torch.autograd.grad(expected.sum(), leaves)))
    assert len(graphs) == 1


def test_recomputation_can_keep_the_operator(monkeypatch):
    """It runs once where a policy keeps it, twice where it does not, and the gradients are the same."""
    ran = []
    forward = kernels.CPU.forward
    monkeypatch.setattr(kernels, "CPU", kernels.CPU._replace(forward=lambda *args: ran.append(1) or forward(*args)))
    q_lens, k_lens = CASES["self, all unlike"]
    leaves, _ = draw(q_lens, k_lens)

    def block(q, k, v):
        return attend(q * 2, k.sin(), v, (16,), (16,)).square()

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in attention.ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    results = []
    for calls, context in ((1, functools.partial(create_selective_checkpoint_contexts, policy)), (2, None)):
        ran.clear()
        extra = {"context_fn": context} if context else {}
        loss = checkpoint(block, *leaves, use_reentrant=False, **extra).sum()
        results.append(torch.autograd.grad(loss, leaves))
        assert len(ran) == calls
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


@pytest.mark.parametrize("lse_dims", [3, 4])
@pytest.mark.parametrize("kernel", kernels.CUDA)
def test_cuda_kernels_fit_their_operators(kernel, lse_dims, monkeypatch):
    """Arguments and shapes, without a GPU; what they compute is not tested here."""
    monkeypatch.setattr(kernels, "cudnn_lse_dims", lambda device: lse_dims)
    q, k = (torch.empty(2, size, 3, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2) for size in (40, 21))
    for bias in (None, torch.empty(2, 21, device="meta")) if kernel == "efficient" else (None,):
        out, lse = kernels.CUDA[kernel].forward(q, k, k, bias)
        assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
        grads = kernels.CUDA[kernel].backward(out, q, k, k, bias, out, lse)
        assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("queries", [1, 31, 32, 33, 64])
def test_the_efficient_kernel_gets_its_log_sum_exp_in_whole_blocks_of_infinity(queries, monkeypatch):
    """The backward reads blocks of 32: past the queries exp(logit - lse) must be 0, which +inf alone makes it."""
    given: dict[str, torch.Tensor] = {}

    def backward(grad_out, q, k, v, mask, out, lse, *rest):
        given.update(lse=lse, mask=mask)
        return q, k, v, None

    monkeypatch.setattr(torch_private, "efficient_backward", backward)
    q, k, bias = torch.randn(2, 3, queries, 8), torch.randn(2, 3, 21, 8), torch.randn(2, 21)
    lse = torch.randn(2, 3, queries)
    kernels.efficient_backward(q, q, k, k, bias, q, lse)
    blocks = -(-queries // 32) * 32
    assert given["lse"].shape == (2, 3, blocks) and given["lse"].is_contiguous()
    assert torch.equal(given["lse"][:, :, :queries], lse)
    assert (given["lse"][:, :, queries:] == float("inf")).all()
    # the bias reaches every head and query as it is, in rows that start at multiples of 16 values
    assert torch.equal(given["mask"], bias[:, None, None].expand(2, 3, queries, 21))
    assert given["mask"].stride()[0] % 16 == 0


def test_the_efficient_kernel_gives_back_no_more_rows_than_queries(monkeypatch):
    def forward(q, k, v, mask, with_lse):
        assert with_lse and mask is None
        return q, torch.arange(64.0).expand(2, 3, 64), None, None

    monkeypatch.setattr(torch_private, "efficient", forward)
    q = torch.randn(2, 3, 33, 8)
    assert torch.equal(kernels.efficient_forward(q, q, q, None)[1], torch.arange(33.0).expand(2, 3, 33))
