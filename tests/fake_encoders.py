"""Quick encoders for the tests of prepare: latents and text states that follow from pixels and caption."""

import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wanloom.prepare.encode import Encoders

IDENTITY = {"vae": "fake", "text-encoder": "fake", "device": "cpu"}


def encode_frames(frames: Tensor) -> Tensor:
    """(B, F, H, W, 3) uint8 to (B, 16, (F-1)/4+1, H/8, W/8): mean colours, then filler."""
    video = frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    small = F.avg_pool3d(video, (1, 8, 8))[:, :, ::4]
    return torch.cat([small] * 6, dim=1)[:, :16]


def encode_text(caption: str, most: int) -> Tensor:
    words = caption.split()[: most - 1]
    seeds = [zlib.crc32(word.encode()) for word in [*words, "</s>"]]
    return torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def count_tokens(caption: str) -> int:
    return len(caption.split()) + 1


def build_encoders(log: Path | None = None, seconds: float = 0.0) -> Encoders:
    """`log` gets one line per encoded sample; `seconds` is how long a batch takes."""

    def frames(batch: Tensor) -> Tensor:
        out = encode_frames(batch)
        time.sleep(seconds)
        if log is not None:
            with log.open("a") as file:
                file.writelines(f"{zlib.crc32(sample.numpy().tobytes())}\n" for sample in batch)
        return out

    return Encoders(frames, encode_text, count_tokens)
