"""Model FLOPs per sample, in the convention of the published numbers.

In: a config and the number of video tokens of one sample. Out: floating-point operations, a multiply-add being two.
The one decision: it counts the model, not the machine: attention full and unmasked, all 512 text slots whether folded
or not, backward twice forward, nothing for recomputation. So tokens/s times these FLOPs compares with what other
trainers of Wan publish (165.9 GFLOP per token for the 14B at 37,440 tokens). Modulation, norms and gates are below 0.1%
and left out. Divided by the peak of a GPU they are its MFU; a GPU that is not in `PEAKS` has none.
"""

from wanloom.model.dit import PATCH_SIZE, DiTConfig

# Dense bf16 TFLOP/s with fp32 accumulation, by the whole of the name that CUDA gives. Cards of one family differ (SXM,
# PCIe, NVL, a part of a GPU under MIG, a custom chip), so a name that is not here is not guessed at. From NVIDIA's data
# sheets (A100, H100, H200, L4, L40, L40S, A10, A40, Blackwell), halved where they count sparsity, and the GA102, Ada
# and RTX Blackwell whitepapers; those of the A100, H100, H200, B200 and L40S are torchtitan's too.
PEAKS = {
    "GB300": 2500,
    "GB200": 2500,
    "B300 SXM6 AC": 2250,
    "B200": 2250,
    "GH200 480GB": 989,
    "GH200 144G HBM3e": 989,
    "H200": 989,
    "H200 NVL": 835,
    "H100 80GB HBM3": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "A100-SXM4-40GB": 312,
    "A100-SXM4-80GB": 312,
    "A100-PCIE-40GB": 312,
    "A100 80GB PCIe": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A40": 149.7,
    "A10": 125,
    "RTX 6000 Ada Generation": 364,
    "RTX A6000": 154.8,
    "GeForce RTX 5090": 209.5,
    "GeForce RTX 4090": 165.2,
    "GeForce RTX 3090": 71,
}


def forward_flops(config: DiTConfig, video_tokens: int, text_slots: int = 512) -> int:
    """FLOPs of one forward pass over one sample; `text_slots` is the number of text keys, 512 by convention."""
    d, f, s, t = config.dim, config.ffn_dim, video_tokens, text_slots
    linears = 2 * s * (6 * d * d + 2 * d * f) + 2 * t * 2 * d * d  # video tokens; then keys and values of the text
    attention = 4 * s * s * d + 4 * s * t * d
    tokens = 2 * s * PATCH_SIZE * (config.in_channels + config.out_channels) * d
    text = 2 * t * (config.text_dim * d + d * d)
    time = 2 * (config.freq_dim * d + 7 * d * d)
    return config.num_layers * (linears + attention) + tokens + text + time


def train_flops(config: DiTConfig, video_tokens: int, text_slots: int = 512) -> int:
    """FLOPs of forward and backward over one sample."""
    return 3 * forward_flops(config, video_tokens, text_slots)


def peak_tflops(gpu: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of the GPU that CUDA gives this name, or None for one that is not known."""
    return PEAKS.get(gpu.removeprefix("NVIDIA "))
