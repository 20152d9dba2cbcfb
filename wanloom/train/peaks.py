"""Peaks: the arithmetic that MFU is measured against, and the most memory that was in use.

In: the device of every rank, by the name that CUDA gives it. Out: the mean of their dense bf16 peaks; GiB. The one
decision: a GPU that is not in the table has no peak, and a run with such a GPU has no MFU: nothing is guessed.
"""

import resource
from typing import NamedTuple

import torch

from wanloom.dist import gather

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


class Peak(NamedTuple):
    """What MFU is measured against."""

    tflops: float | None  # dense bf16, of a GPU of the run (the mean over them); None where there is none to tell
    unknown: tuple[str, ...]  # GPUs whose peak is not known


def find_peak(device: torch.device, bf16: bool) -> Peak:
    """The peak of the GPUs of all ranks, each of which asks. fp32 runs and CPUs have none."""
    names = gather(torch.cuda.get_device_name(device) if device.type == "cuda" and bf16 else None)
    peaks = {name: PEAKS.get((name or "").removeprefix("NVIDIA ")) for name in names}
    known = [peak for name in names if (peak := peaks[name]) is not None]
    unknown = tuple(name for name, peak in peaks.items() if name is not None and peak is None)
    return Peak(sum(known) / len(known) if len(known) == len(names) else None, unknown)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in use so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
