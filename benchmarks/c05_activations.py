"""C5: bytes that a block keeps of each token for its backward pass, at the width of the 14B model, in bf16.

The peer is diffusers' block as it is. Eager models are counted under fake tensors: every storage that a forward pass
leaves alive, each once, of three blocks less two, of many tokens less fewer, so that what blocks share, weights and
text are not in it; nothing is computed, so nothing is compared by value here. A compiled block keeps what the compiler
chose: it is run, on few tokens, and the storages that it saves are counted through autograd's hooks. Attention gives
bf16 here, as on a GPU; on a CPU it gives fp32, which is 2d more. In eager models RMS norm is one operator that keeps
its input and one value of a row, as on a GPU; on a CPU it is several, with which diffusers keeps 403,812 bytes and
wanloom 352,612. What is the same for all blocks is in none of it, like the rotations, 1,024 bytes in diffusers.
"""

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import define, register_fake
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import Row, main
from benchmarks.pair import WIDTHS
from benchmarks.peer import build_diffusers, cast_as_loaded
from wanloom.model import attention, kernels
from wanloom.model.dit import Conditions, WanDiT, cast_weights
from wanloom.model.modulation import build_layout
from wanloom.model.sequence import build_pack, rope_table
from wanloom.model.settings import DiTConfig
from wanloom.parallel.compile import apply_compile
from wanloom.parallel.recompute import apply_recompute
from wanloom.parallel.settings import Recompute

TOY = {"dim": 96, "ffn_dim": 256, "num_heads": 4, "text_dim": 64, "freq_dim": 32}
GRIDS = ((5, 64, 64), (10, 64, 64))  # of the counted tokens
TARGETS: dict[Recompute, float] = {"cheap": 135_000, "attention": 21_000}
LIMITS: dict[Recompute, str] = {
    "none": "34d + 4f with a bf16 stream: 229,376",
    "cheap": "20d + 2f: 130,048",
    "attention": "6d + log-sum-exp: 30,880; 4d + it with a bf16 stream: 20,640",
    "full": "4d: 20,480",
}
STREAM = (
    "The target is that of a residual stream in bf16. Wanloom's is fp32, as in the original, which is 2d bytes more "
    "for the input of a block; diffusers rounds it. Inputs of every second block alone would count as 4d, but then two "
    "blocks are at work at a time, 58d + 4f more: no less memory at 40 blocks, more at 30."
)
BOTH = (
    "Wanloom's residual stream and modulation are fp32, as in the original, which is 2d bytes more for the input of a "
    "block; diffusers rounds the stream to bf16."
)
define("wanloom_counts::rms_norm", "(Tensor x, Tensor weight) -> (Tensor, Tensor)")
define("wanloom_counts::rms_norm_backward", "(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)")


class Storages(TorchDispatchMode):
    """Knows every storage that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        """Bytes of those that still are."""
        gc.collect()
        return sum(size for ref, size in self.made.values() if not ref.expired())


Forward = Callable[[tuple[int, int, int]], object]  # of one sample of a grid of tokens
Build = Callable[[DiTConfig], Forward]


def build_peer(config: DiTConfig) -> Forward:
    """diffusers' model with the dtypes that its own loading gives it."""
    model = build_diffusers(config)
    cast_as_loaded(model, torch.bfloat16)

    def forward(grid: tuple[int, int, int]) -> object:
        frames, rows, columns = grid
        latents = torch.empty(1, 16, frames, 2 * rows, 2 * columns, dtype=torch.bfloat16)
        text = torch.empty(1, 512, config.text_dim, dtype=torch.bfloat16)
        return model(latents, torch.ones(1), text, return_dict=False)[0]

    return forward


def build_ours(config: DiTConfig, recompute: Recompute = "none", autocast: bool = False) -> Forward:
    """WanDiT with weights in bf16, or fp32 ones under autocast."""
    model = WanDiT(config)
    if not autocast:
        cast_weights(model, torch.bfloat16)
    apply_recompute(model, recompute, offload=False)

    def forward(grid: tuple[int, int, int]) -> object:
        tokens = grid[0] * grid[1] * grid[2]
        text = torch.empty(0, config.text_dim)
        pack = build_pack([torch.empty(tokens, 64)], [grid], [text])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(pack, torch.empty(1))

    return forward


def kept_by_block(build: Build, shape: dict[str, int]) -> float:
    """Bytes per token that the forward pass of one block more leaves behind."""
    left = {}
    with FakeTensorMode():
        for blocks, grid in itertools.product((2, 3), GRIDS):
            with Storages() as storages:
                forward = build(DiTConfig(num_layers=blocks, **shape))
                before = storages.alive()
                out = forward(grid)
                left[blocks, grid] = storages.alive() - before
                del out, forward
    few, many = (left[3, grid] - left[2, grid] for grid in GRIDS)
    first, second = (grid[0] * grid[1] * grid[2] for grid in GRIDS)
    return (many - few) / (second - first)


def half_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = kernels.cpu_forward(q, k, v, bias)
    return out.to(q.dtype), lse


def half_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> kernels.Grads:
    return kernels.cpu_backward(grad_out.float(), q, k, v, bias, out.float(), lse)


@contextmanager
def attention_in_bf16() -> Iterator[None]:
    """Attention gives its values in the dtype of the queries, as on a GPU."""
    dtypes, cpu = attention.dtypes, kernels.CPU
    attention.dtypes = lambda device, dtype: (dtype, torch.float32)
    kernels.CPU = kernels.Calls(half_forward, half_backward)
    try:
        yield
    finally:
        attention.dtypes, kernels.CPU = dtypes, cpu


@register_fake("wanloom_counts::rms_norm")
def fake_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty(*x.shape[:-1], 1)


@register_fake("wanloom_counts::rms_norm_backward")
def fake_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


class OneNorm(torch.autograd.Function):
    """RMS norm with the operators, and what is kept, of CUDA's; for fake tensors, it computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        assert x.dtype == weight.dtype, "CUDA's is one operator for one dtype alone"
        out, scale = torch.ops.wanloom_counts.rms_norm(x, weight)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.ops.wanloom_counts.rms_norm_backward(grad, *ctx.saved_tensors)


@contextmanager
def norm_in_one() -> Iterator[None]:
    """RMS norm is one operator, as on a GPU, for models under fake tensors."""
    own = F.rms_norm
    F.rms_norm = lambda x, shape, weight, eps: OneNorm.apply(x, weight)
    try:
        yield
    finally:
        F.rms_norm = own


def draw_conditions(config: DiTConfig, lens: tuple[int, ...], text: int = 8) -> Conditions:
    """What a block needs beside the stream, for samples of so many tokens and text keys; bf16."""
    tokens, samples, device = sum(lens), len(lens), torch.device("cpu")
    return Conditions(
        modulation=torch.randn(samples, 6, config.dim, requires_grad=True),
        context=torch.randn(samples * text, config.dim, dtype=torch.bfloat16, requires_grad=True),
        context_bias=torch.zeros(samples * text),
        context_lens=torch.tensor([text] * samples),
        rotation=rope_table(torch.zeros(tokens, 3, dtype=torch.int64), config.dim // config.num_heads),
        video_lens=torch.tensor(lens),
        sequence_lens=torch.tensor(lens),
        layout=build_layout(lens, device),
        dtype=torch.bfloat16,
    )


def build_block(config: DiTConfig, compiled: bool = True) -> torch.nn.Module:
    """One block with random bf16 weights."""
    with torch.device("meta"):
        model = WanDiT(config)
    block = model.blocks["0"].to_empty(device="cpu")
    cast_weights(model, torch.bfloat16)
    with torch.no_grad():
        for param in block.parameters():
            param.normal_(0, 0.02)
    if compiled:
        apply_compile(model, "block", torch.device("cpu"))
    return block


def build_peer_block(shape: dict[str, int]) -> WanTransformerBlock:
    """diffusers' block on torch's default device, with the dtypes that its own loading gives it."""
    block = WanTransformerBlock(shape["dim"], shape["ffn_dim"], shape["num_heads"], "rms_norm_across_heads", True, 1e-6)
    cast_as_loaded(block, torch.bfloat16)
    return block


def draw_for_peer(shape: dict[str, int], tokens: int) -> tuple[Any, ...]:
    """The stream, in bf16, and what else diffusers' block is given."""
    x = torch.randn(1, tokens, shape["dim"], dtype=torch.bfloat16, requires_grad=True)
    text = torch.randn(1, 512, shape["dim"], dtype=torch.bfloat16, requires_grad=True)
    rotation = torch.randn(2, 1, tokens, 1, shape["dim"] // shape["num_heads"])
    return x, text, torch.randn(1, 6, shape["dim"], requires_grad=True), (rotation[0], rotation[1])


def saved_bytes(block: torch.nn.Module, draw: Callable[[int], tuple[Any, ...]], few: int = 128) -> float:
    """Bytes per token that autograd saves in a block as it runs; without what does not grow with the tokens."""
    own, saved = {param.untyped_storage().data_ptr() for param in block.parameters()}, []
    for tokens in (few, 2 * few):
        x, *rest = draw(tokens)
        seen: dict[int, Tensor] = {}
        shared = own | {t.untyped_storage().data_ptr() for t in tree_leaves(rest) if isinstance(t, Tensor)}

        def pack(t: Tensor, seen: dict[int, Tensor] = seen, shared: set[int] = shared) -> Tensor:
            place = t.untyped_storage().data_ptr()
            if place not in shared:
                seen[place] = t  # held, so that no other tensor takes its place
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(x, *rest)
        saved.append(sum(t.untyped_storage().nbytes() for t in seen.values()))
    return (saved[1] - saved[0]) / few


def saved_by_block(shape: dict[str, int], compiled: bool) -> float:
    """Bytes per token that autograd saves in wanloom's block."""
    config = DiTConfig(num_layers=1, **shape)

    def draw(tokens: int) -> tuple[Any, ...]:
        return torch.randn(tokens, config.dim, requires_grad=True), draw_conditions(config, (tokens,))

    with attention_in_bf16():
        return saved_bytes(build_block(config, compiled), draw)


def saved_by_peer(shape: dict[str, int]) -> float:
    """Bytes per token that autograd saves in diffusers' compiled block."""
    block = build_peer_block(shape)
    block.compile()
    return saved_bytes(block, lambda tokens: draw_for_peer(shape, tokens))


def measure(toy: bool) -> list[Row]:
    """Bytes that a block keeps of a token."""
    shape = TOY if toy else WIDTHS["14B"]
    on_cpu = kept_by_block(build_peer, shape)
    facts = {"diffusers, eager, on a CPU": on_cpu}
    note = f"On a CPU, where RMS norm is several operators, diffusers keeps {on_cpu:,.0f}."
    rows = []
    with attention_in_bf16(), norm_in_one():
        peer = {"peer": "diffusers, eager", "theirs": [kept_by_block(build_peer, shape)]}
        for recompute in LIMITS:
            rows.append(
                Row(
                    "C5",
                    f"kept for the backward pass, per token and block, recompute={recompute}",
                    "bytes",
                    [kept_by_block(lambda config, recompute=recompute: build_ours(config, recompute), shape)],
                    **peer,
                    target=TARGETS.get(recompute),
                    at_most=True,
                    limit=LIMITS[recompute],
                    note=f"{STREAM} {note}" if recompute == "attention" else note,
                    facts=facts,
                )
            )
    compiled, both = [saved_by_block(shape, compiled=True)], [saved_by_peer(shape)]
    what, limit = "kept for the backward pass, per token and block, recompute=none", LIMITS["none"]
    rows[1:1] = [
        Row("C5", f"{what} compile=block", "bytes", compiled, **peer, limit=limit, note=note, facts=facts),
        Row("C5", f"{what}, both compiled", "bytes", compiled, "diffusers, compiled", both, limit=limit, note=BOTH),
    ]
    return rows


if __name__ == "__main__":
    main(__spec__, measure)
