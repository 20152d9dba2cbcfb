"""Context parallelism: self-attention over a packed sequence that lies in equal parts on several ranks.

In: this rank's part of the queries, keys and values, and the lengths of the samples of the whole sequence. Out: this
rank's part of the values. The one decision: keys travel straight to the ranks that need them. Every rank knows all
lengths, so it knows which of its keys another part looks at: those of the one sample that reaches into both. In round i
a rank sends to the i-th after it and receives from the i-th before it, as in a ring, but only these rows, and gradients
go back the same way; a sample that lies on one rank costs nothing. The rows of round i+1 are under way while round i is
computed. Parts are merged by their log-sum-exp in fp32, and the backward is given the values and the log-sum-exp of the
whole.

Ulysses (`ulysses`) turns heads into tokens before it: an all-to-all gives each rank of the group all its tokens and a
part of the heads. With both, the ring goes over what the Ulysses groups hold together: the part of a rank in the
sequence is `ring index * ulysses degree + ulysses index`.

Source: Ulysses, arXiv 2309.14509; Ring Attention, arXiv 2310.01889. Not tested with NCCL.
"""

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wanloom.model.attention import packed_backward, packed_forward, shapes
from wanloom.model.dit import Attention, WanDiT
from wanloom.parallel.mesh import Mesh
from wanloom.parallel.tensor import adjoint_is, keep_group
from wanloom.torch_private import resolve_group


class ContextAttention(nn.Module):
    """Takes the place of `attend` in self-attention, with its arguments."""

    def __init__(self, kernel: str, ring: dist.ProcessGroup | None, ulysses: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.kernel = kernel
        self.ring = ring.group_name if ring else None
        self.ulysses = ulysses.group_name if ulysses else None
        self.degree = dist.get_world_size(ulysses) if ulysses else 1

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_lens: Tensor, k_lens: Tensor, k_bias: Tensor | None = None
    ) -> Tensor:
        """As `model.attention.Attend`, with the lengths of the whole sequence.

        Raises UserError for a kernel that cannot run here, ValueError for a bias, which self-attention has not, and
        for lengths that do not sum to T times the ranks.
        """
        if k_bias is not None:
            raise ValueError("self-attention over several ranks takes no bias")
        dtype = q.dtype
        if self.ulysses:
            q, k, v = scatter_heads(q, k, v, self.degree, self.ulysses)
        if self.ring:
            out = torch.ops.wanloom.ring_attend(q, k, v, q_lens, self.kernel, self.ring)[0]
        else:
            out = torch.ops.wanloom.attend(q, k, v, q_lens, k_lens, None, self.kernel)[0]
        out = out.to(dtype)
        return gather_heads(out, self.degree, self.ulysses) if self.ulysses else out


def scatter_heads(q: Tensor, k: Tensor, v: Tensor, degree: int, group: str) -> tuple[Tensor, ...]:
    """Each `(T, H, D)`, all heads of this rank's tokens -> `(degree*T, H/degree, D)`, all tokens of the group."""
    heads = [x.unflatten(1, (degree, -1)).movedim(1, 0) for x in (q, k, v)]
    return torch.ops.wanloom.exchange(torch.stack(heads, dim=2), group).flatten(0, 1).unbind(1)


def gather_heads(x: Tensor, degree: int, group: str) -> Tensor:
    """`(degree*T, H/degree, D)` -> `(T, H, D)`."""
    return torch.ops.wanloom.exchange(x.unflatten(0, (degree, -1)), group).movedim(0, 1).flatten(1, 2)


@torch.library.custom_op("wanloom::exchange", mutates_args=())
def exchange(x: Tensor, group: str) -> Tensor:
    """Row i goes to rank i of the group, row i comes from it; the gradient goes the same way."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=resolve_group(group))
    return out


@exchange.register_fake
def _(x, group):
    return x.new_empty(x.shape)


exchange.register_autograd(adjoint_is(exchange), setup_context=keep_group)


class Overlap(NamedTuple):
    """Which queries of one part look at which keys of another, or of the same."""

    queries: slice  # rows of the one part
    keys: slice  # rows of the other
    q_lens: tuple[int, ...]  # of each sample that lies in both; there may be none
    k_lens: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def overlap(lens: tuple[int, ...], rows: int, q_part: int, k_part: int) -> Overlap:
    """Between two of the parts of `rows` rows that the sequence lies in."""
    q_first, k_first, begin = q_part * rows, k_part * rows, 0
    spans = []
    for length in lens:
        end = begin + length
        q = max(begin, q_first), min(end, q_first + rows)
        k = max(begin, k_first), min(end, k_first + rows)
        if q[0] < q[1] and k[0] < k[1]:
            spans.append((q, k))
        begin = end
    if not spans:
        return Overlap(slice(0, 0), slice(0, 0), (), ())
    (first_q, first_k), (last_q, last_k) = spans[0], spans[-1]
    return Overlap(
        slice(first_q[0] - q_first, last_q[1] - q_first),
        slice(first_k[0] - k_first, last_k[1] - k_first),
        tuple(end - start for (start, end), _ in spans),
        tuple(end - start for _, (start, end) in spans),
    )


class Transfer(NamedTuple):
    """A round under way: nothing of it may be touched before `wait`."""

    works: list[dist.Work]
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


class Ring:
    """This rank's place in a group, and what it shares with the others of a sequence."""

    def __init__(self, group: str, lens: Tensor, like: Tensor) -> None:
        self.group = resolve_group(group)
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.lens, self.rows = tuple(lens.tolist()), len(like)
        if sum(self.lens) != self.size * self.rows:
            raise ValueError(f"{self.size} ranks of {self.rows} tokens hold no samples of {self.lens}")
        self.own = self.shared(self.rank, self.rank)
        if like.is_cuda:
            connect(self.group, like.device)

    def shared(self, q_part: int, k_part: int) -> Overlap:
        return overlap(self.lens, self.rows, q_part, k_part)

    def before(self, step: int) -> int:
        """The rank whose keys come in round `step`."""
        return (self.rank - step) % self.size

    def after(self, step: int) -> int:
        """The rank that gets this one's keys in round `step`."""
        return (self.rank + step) % self.size

    def send_keys(self, kv: Tensor, step: int) -> Transfer:
        """Start round `step` with the rows of `kv (T, 2, H, D)` that the other looks at; no rows after the last."""
        if step == self.size:
            return Transfer([], kv[:0], kv[:0])
        mine, theirs = self.shared(self.after(step), self.rank), self.shared(self.rank, self.before(step))
        received = kv.new_empty(sum(theirs.k_lens), *kv.shape[1:])
        return self.swap(kv[mine.keys], self.after(step), received, self.before(step))

    def return_grads(self, grad: Tensor, step: int) -> Transfer:
        """Start the way back of round `step`: gradients of the rows that came, for those of the rows that went."""
        mine = self.shared(self.after(step), self.rank)
        received = grad.new_empty(sum(mine.k_lens), *grad.shape[1:])
        return self.swap(grad, self.before(step), received, self.after(step))

    def swap(self, sent: Tensor, to: int, received: Tensor, source: int) -> Transfer:
        """Send to one rank and receive from another; no rows are no message, which both ends know from the lengths.

        All ranks start their rounds in one order, so none waits in vain.
        """
        ops = []
        if len(sent):
            ops.append(dist.P2POp(dist.isend, sent, group=self.group, group_peer=to))
        if len(received):
            ops.append(dist.P2POp(dist.irecv, received, group=self.group, group_peer=source))
        return Transfer(dist.batch_isend_irecv(ops) if ops else [], sent, received)


@functools.lru_cache(maxsize=16)
def connect(group: dist.ProcessGroup, device: torch.device) -> None:
    """NCCL wants all ranks of a group in its first exchange; later ones may be between some of them."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)


def merge(out: Tensor, lse: Tensor, out_part: Tensor, lse_part: Tensor) -> None:
    """Add what more keys say to `out (T, H, D)` and `lse (T, H)`, in place."""
    total = torch.logaddexp(lse, lse_part)
    out.mul_((lse - total).exp().unsqueeze(-1)).addcmul_(out_part.to(out.dtype), (lse_part - total).exp().unsqueeze(-1))
    lse.copy_(total)


@torch.library.custom_op("wanloom::ring_attend", mutates_args=())
def ring_attend(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, kernel: str, group: str) -> tuple[Tensor, Tensor]:
    """Values `(T, H, D)` and log-sum-exp `(T, H)` of this rank's queries over the keys of all ranks of the group."""
    ring = Ring(group, lens, q)
    kv = torch.stack((k, v), dim=1)
    coming = ring.send_keys(kv, 1)
    out, lse = packed_forward(q, k, v, ring.own.q_lens, ring.own.k_lens, None, kernel)
    dtype = out.dtype
    for step in range(1, ring.size):
        keys = coming.wait()
        coming = ring.send_keys(kv, step + 1)
        part = ring.shared(ring.rank, ring.before(step))
        if part.q_lens:
            out = out.to(lse.dtype)
            k, v = keys.unbind(1)
            found = packed_forward(q[part.queries], k, v, part.q_lens, part.k_lens, None, kernel)
            merge(out[part.queries], lse[part.queries], *found)
    return out.to(dtype), lse


def take_home(rows: slice, returning: Transfer, dk: Tensor, dv: Tensor) -> None:
    """Add what another rank found out about some rows of this one's keys, in place."""
    grad = returning.wait()
    dk[rows] += grad[:, 0]
    dv[rows] += grad[:, 1]


@torch.library.custom_op("wanloom::ring_attend_backward", mutates_args=())
def ring_attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lens: Tensor,
    kernel: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's q, k and v, those of the keys from all ranks that looked at them."""
    ring, grad_out = Ring(group, lens, q), grad_out.contiguous()
    kv = torch.stack((k, v), dim=1)
    coming, returning = ring.send_keys(kv, 1), None
    grads = packed_backward(grad_out, q, k, v, out, lse, ring.own.q_lens, ring.own.k_lens, None, kernel)
    dq, dk, dv = (grad.to(lse.dtype) for grad in grads)
    for step in range(1, ring.size):
        keys = coming.wait()
        coming = ring.send_keys(kv, step + 1)
        part, grad = ring.shared(ring.rank, ring.before(step)), torch.empty_like(keys)
        if part.q_lens:
            (k_part, v_part), rows = keys.unbind(1), part.queries
            given = grad_out[rows], q[rows], k_part, v_part, out[rows], lse[rows]
            dq_part, *found = packed_backward(*given, part.q_lens, part.k_lens, None, kernel)
            dq[rows] += dq_part
            grad = torch.stack(found, dim=1)
        if returning:
            take_home(*returning, dk, dv)
        returning = ring.shared(ring.after(step), ring.rank).keys, ring.return_grads(grad, step)
    if returning:
        take_home(*returning, dk, dv)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@ring_attend.register_fake
def _(q, k, v, lens, kernel, group):
    return shapes(q)


@ring_attend_backward.register_fake
def _(grad_out, q, k, v, out, lse, lens, kernel, group):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.kernel, ctx.group = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def backward_of_ring(ctx, grad_out, _):
    q, k, v, lens, out, lse = ctx.saved_tensors
    if grad_out is None:  # the other ranks wait for this one's gradients
        grad_out = torch.zeros_like(out)
    grads = torch.ops.wanloom.ring_attend_backward(grad_out, q, k, v, out, lse, lens, ctx.kernel, ctx.group)
    return *grads, None, None, None


ring_attend.register_autograd(backward_of_ring, setup_context=keep_for_backward)

# beside ATTENTION_OPS, what is worth keeping where the rest of a block is recomputed: it saves the exchange too
CONTEXT_OPS = (torch.ops.wanloom.ring_attend.default, torch.ops.wanloom.exchange.default)


def apply_context(model: WanDiT, mesh: Mesh) -> None:
    """Let the self-attention of every block span the ranks that share a pack, in place."""
    ring, ulysses = mesh.group("cp_ring"), mesh.group("cp_ulysses")
    if ring is None and ulysses is None:
        return
    for name, module in model.blocks.named_modules():
        if name.endswith("self_attn") and isinstance(module, Attention):
            module.attend = ContextAttention(module.attend.kernel, ring, ulysses)
