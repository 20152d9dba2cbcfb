"""WanDiT: the Wan video diffusion transformer over one packed sequence.

In: a `Pack` of N samples of any size, and the noise level `sigma (M,)` of each of their M segments. Out: velocity
tokens in the layout of the pack's tokens, fp32. The one decision: the model sees samples and segments only as lengths.
Linears run over the packed sequence, attention inside each sample, and what differs between segments (modulation,
gates) is applied run by run, on views.

Numerics. The Linears of the blocks, the text and the patch embedding run in the compute dtype: that of autocast where
it is on, else that of their weights. Everything else is fp32 whatever the weights are: the residual stream, the time
embedding and projection, modulation, norms, QK-norm, rotary angles and products, gates, head. So there are two ways to
bf16: fp32 weights under `torch.autocast`, for training, and `cast_weights(model, torch.bfloat16)`, which keeps the fp32
parts in fp32, for sampling. Queries and keys are rounded once, after the rotation. This is the original's arithmetic;
diffusers rounds the residual stream and the modulation to bf16 as well, so in bf16 the two differ by bf16 rounding, and
in fp32 they agree to 1e-5.

Module names are those of the published checkpoint, because LoRA files in the wild use them. Every parameter lives in a
leaf module, the modulation tables too. Source: Wan, arXiv 2503.20314, and its published weights.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanloom.geometry import PATCH
from wanloom.model.attention import Attend, PackedAttention
from wanloom.model.layers import LayerNorm, Linear, Linear32, Modulation, RMSNorm
from wanloom.model.modulation import TokenLayout, add_gated, build_layout, modulate_norm
from wanloom.model.sequence import Pack, apply_rope, rope_table
from wanloom.model.settings import DiTConfig
from wanloom.model.text import TextEmbedding, fold_text

PATCH_SIZE = math.prod(PATCH)
# parts whose arithmetic and weights stay fp32 when the rest is bf16
FP32_PARTS = frozenset({"time_embedding", "time_projection", "modulation", "head", "norm3", "norm_q", "norm_k"})


class KV(NamedTuple):
    """Keys after QK-norm and values, `(S, heads, head_dim)` each, in the compute dtype."""

    k: Tensor
    v: Tensor


TextKV = dict[str, KV]  # of a pack's text, by block


class Conditions(NamedTuple):
    """What every block needs beside the residual stream."""

    modulation: Tensor  # (M, 6, dim) fp32, before the block's own table
    context: Tensor | KV  # (S, dim) projected text, compute dtype, or what the block makes of it
    context_bias: Tensor  # (S,) fp32, added to the logits of each text key
    context_lens: Tensor  # (N,) int64 on the CPU, as attention wants lengths
    rotation: Tensor  # (T, head_dim/2, 2) fp32, of queries and keys
    video_lens: Tensor  # of the tokens that attend here
    sequence_lens: Tensor  # what self-attention spans
    layout: TokenLayout  # of the residual stream
    dtype: torch.dtype  # in which the Linears run


class Stream(NamedTuple):
    """What goes from block to block and, in a pipeline, from stage to stage."""

    x: Tensor  # (T, dim) fp32, the residual stream
    e: Tensor  # (M, dim) fp32, the embedded noise levels
    modulation: Tensor  # (M, 6, dim) fp32
    context: Tensor  # (S, dim) projected text, compute dtype; no rows where its keys and values are given


class Attention(nn.Module):
    """Self- or cross-attention with QK-norm; `attend` is the core."""

    def __init__(self, config: DiTConfig, kernel: str) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim = dim // config.num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)
        self.attend: Attend = PackedAttention(kernel)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KV,
        q_lens: Tensor,
        k_lens: Tensor,
        rotation: Tensor | None = None,
        k_bias: Tensor | None = None,
    ) -> Tensor:
        """`x (T, dim)`, `context (S, dim)` -> `(T, dim)`; `rotation` is for queries and keys, `k_bias (S,)` per key.

        The context may be given as its `kv`.
        """
        q = self.norm_q(self.q(x)).unflatten(-1, (-1, self.head_dim))
        if rotation is not None:
            q = apply_rope(q, rotation)
        k, v = self.kv(context, rotation) if isinstance(context, Tensor) else context
        out = self.attend(q.to(v.dtype), k, v, q_lens, k_lens, k_bias)
        return self.o(out.flatten(1))

    def kv(self, context: Tensor, rotation: Tensor | None = None) -> KV:
        """Keys and values of `context (S, dim)`."""
        k = self.norm_k(self.k(context)).unflatten(-1, (-1, self.head_dim))
        v = self.v(context).unflatten(-1, (-1, self.head_dim))
        if rotation is not None:
            k = apply_rope(k, rotation)
        return KV(k.to(v.dtype), v)


class Block(nn.Module):
    """Self-attention and feed-forward with modulation and gate, cross-attention with neither."""

    def __init__(self, config: DiTConfig, kernel: str) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config, kernel)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = Attention(config, kernel)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim)
        )
        self.modulation = Modulation(6, config.dim)

    def forward(self, x: Tensor, cond: Conditions) -> Tensor:
        """The residual stream `x (T, dim)` fp32, in and out."""
        layout, lens = cond.layout, cond.sequence_lens
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = self.modulation(cond.modulation)
        y = modulate_norm(x, shift_attn, scale_attn, layout, self.eps).to(cond.dtype)
        x = add_gated(x, self.self_attn(y, y, lens, lens, rotation=cond.rotation), gate_attn, layout)
        y = self.norm3(x).to(cond.dtype)
        x = x + self.cross_attn(y, cond.context, cond.video_lens, cond.context_lens, k_bias=cond.context_bias)
        y = modulate_norm(x, shift_ffn, scale_ffn, layout, self.eps).to(cond.dtype)
        return add_gated(x, self.ffn(y), gate_ffn, layout)

    def text_kv(self, context: Tensor) -> KV:
        """What cross-attention makes of the projected text `(S, dim)`, whatever the noise level.

        A method of the block, because FSDP gathers a block's weights where one of its own methods is called.
        """
        return self.cross_attn.kv(context)


class Head(nn.Module):
    """The last norm, modulated by the time embedding itself, and the projection to tokens; fp32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = Linear32(config.dim, config.out_channels * PATCH_SIZE)
        self.modulation = Modulation(2, config.dim)

    def forward(self, x: Tensor, e: Tensor, layout: TokenLayout) -> Tensor:
        """`x (T, dim)`, `e (M, dim)` -> tokens `(T, C*4)`, ordered (channel, row, column)."""
        shift, scale = self.modulation(e[:, None])
        tokens = self.head(modulate_norm(x, shift, scale, layout, self.eps))
        # the checkpoint's head gives (row, column, channel)
        return tokens.unflatten(1, (PATCH_SIZE, -1)).transpose(1, 2).flatten(1)


class WanDiT(nn.Module):
    """(pack, sigma) -> velocity tokens. May be built on the meta device and filled later.

    A stage of a pipeline is a WanDiT with some of its blocks, the embeddings only if it is the first and the head only
    if it is the last: parts are taken away from outside, and the names of those that stay do not change.
    """

    def __init__(self, config: DiTConfig, kernel: str = "auto") -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = Linear(config.in_channels * PATCH_SIZE, dim)
        self.text_embedding = TextEmbedding(config.text_dim, dim)
        self.time_embedding = nn.Sequential(Linear32(config.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.blocks = nn.ModuleDict({str(i): Block(config, kernel) for i in range(config.num_layers)})
        self.head = Head(config)
        self.has_head = True  # False where a pipeline has taken it away

    def forward(
        self, pack: Pack, sigma: Tensor, stream: Stream | None = None, text_kv: TextKV | None = None
    ) -> Tensor | Stream:
        """Velocity `(T, C*4)` fp32 for the noisy tokens of `pack` at noise levels `sigma (M,)`, fp32 or fp64.

        With `text_kv`, as the method gives it for this pack, the text is not read again. A later stage of a pipeline is
        given the stream of the stage before it, and one without the head returns its own. Raises ValueError when a
        caption has more states than the model has text slots.
        """
        if sigma.shape != (len(pack.level_lens),) or sigma.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"sigma is {sigma.dtype} {tuple(sigma.shape)}, not one fp32 value for each segment")
        dtype = self.compute_dtype(pack.tokens.device.type)
        text = fold_text(pack.text_lens, self.config.text_slots)
        if stream is None:
            context = pack.text.new_empty(0, self.config.dim, dtype=dtype)
            if text_kv is None:
                context = self.text_embedding.embed(pack.text, text.rows, dtype)
            stream = self.embed(pack, sigma, context, dtype)
        cond = Conditions(
            modulation=stream.modulation,
            context=stream.context,
            context_bias=torch.tensor(text.bias, device=stream.x.device),
            context_lens=torch.tensor(text.lens),
            rotation=rope_table(pack.positions, self.config.dim // self.config.num_heads),
            video_lens=torch.tensor(pack.video_lens),
            sequence_lens=torch.tensor(pack.sequence_lens),
            layout=build_layout(pack.level_lens, stream.x.device),
            dtype=dtype,
        )
        x = stream.x
        for name, block in self.blocks.items():
            x = block(x, cond if text_kv is None else cond._replace(context=text_kv[name]))
        return self.head(x, stream.e, cond.layout) if self.has_head else stream._replace(x=x)

    def text_kv(self, pack: Pack) -> TextKV:
        """What the blocks make of the text of `pack`, to be given to `forward` as often as only the tokens change.

        Kept are 2 * dim values a block for each text key, as many keys as a sample has states and one for the unused
        slots: in bf16 184 kB a key for the 1.3B and 819 kB for the 14B, which are 0.17 GB for a caption of 80 states
        and a negative prompt of 126; tensor parallelism splits them. Not for a stage of a pipeline. Raises ValueError
        as `forward`.
        """
        rows = fold_text(pack.text_lens, self.config.text_slots).rows
        context = self.text_embedding.embed(pack.text, rows, self.compute_dtype(pack.text.device.type))
        return {name: block.text_kv(context) for name, block in self.blocks.items()}  # pyright: ignore[reportCallIssue]

    def embed(self, pack: Pack, sigma: Tensor, context: Tensor, dtype: torch.dtype) -> Stream:
        """The stream before the first block."""
        e = self.time_embedding(time_features(sigma, self.config.freq_dim))
        return Stream(
            x=self.patch_embedding(pack.tokens.to(dtype)).float(),
            e=e,
            modulation=self.time_projection(e).unflatten(1, (6, -1)),
            context=context,
        )

    def compute_dtype(self, device: str) -> torch.dtype:
        """In which dtype the Linears run: autocast's where it is on, else that of the weights."""
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next(p.dtype for name, p in self.blocks.named_parameters() if not keeps_fp32(name))


def time_features(sigma: Tensor, freq_dim: int) -> Tensor:
    """Sinusoids of the timestep 1000 * sigma: `(M,)` -> `(M, freq_dim)` fp32, cosines first, computed in fp64."""
    half = freq_dim // 2
    freqs = 10_000.0 ** -(torch.arange(half, dtype=torch.float64, device=sigma.device) / half)
    angles = 1000.0 * sigma.double()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def keeps_fp32(name: str) -> bool:
    """Whether the parameter of this name stays fp32 when the model's weights are bf16."""
    return not FP32_PARTS.isdisjoint(name.split("."))


def cast_weights(model: WanDiT, dtype: torch.dtype) -> None:
    """Cast the weights of the Linears to `dtype` in place; the fp32 parts become fp32."""
    for name, param in model.named_parameters():
        param.data = param.data.to(torch.float32 if keeps_fp32(name) else dtype)


def on_meta(config: DiTConfig, kernel: str = "auto") -> WanDiT:
    """A model of shapes, without memory."""
    with torch.device("meta"):
        return WanDiT(config, kernel)


def materialise(
    config: DiTConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kernel: str = "auto",
    apply: Callable[[WanDiT], None] = lambda model: None,
) -> WanDiT:
    """A model that waits for its values, its Linears in `dtype`; `apply` may change it before it gets memory."""
    model = on_meta(config, kernel)
    cast_weights(model, dtype)
    apply(model)
    return model.to_empty(device=device)
