"""Where a process computes. One process takes the first GPU where there is one, else the CPU."""

import torch


def pick_device() -> torch.device:
    """The device of this process; CUDA_VISIBLE_DEVICES chooses among GPUs, and an empty one means the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
