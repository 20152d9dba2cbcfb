"""Video frames to normalised latents and back, on diffusers' AutoencoderKLWan.

In: RGB frames `(F, H, W, 3)` uint8 with F = 4n+1 and H, W multiples of 8. Out: latents `(C, n+1, H/8, W/8)` fp32,
(posterior mean - latents_mean) / latents_std. The one decision: the mean and not a draw, so a clip has one encoding,
and no tiling, which changes the latents. The VAE is causal: a latent frame does not depend on later frames.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from wanloom.codecs.identity import folder_identity
from wanloom.config import UserError

SPATIAL = 8  # pixels per latent, rows and columns
TEMPORAL = 4  # frames per latent frame, after the first


class VaeCodec:
    """An AutoencoderKLWan with its normalisation. `dtype` is that of the computation; fp32 is what Wan uses."""

    def __init__(self, vae: AutoencoderKLWan, folder: Path, device: torch.device) -> None:
        self.vae = vae
        self.folder = folder
        self.device = device
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config["latents_mean"], dtype=torch.float32, device=device).view(shape)
        self.std = torch.tensor(vae.config["latents_std"], dtype=torch.float32, device=device).view(shape)

    @classmethod
    def load(
        cls, pipeline_folder: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> "VaeCodec":
        """Read the `vae` folder of a pipeline. Raises UserError when it is not there or lacks tensors."""
        folder = Path(pipeline_folder) / "vae"
        if not (folder / "config.json").is_file():
            raise UserError(f"There is no VAE in '{pipeline_folder}': {folder / 'config.json'} is missing.")
        try:
            loaded: Any = AutoencoderKLWan.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"The VAE in {folder} cannot be loaded: {error}") from error
        vae, info = loaded
        if info["missing_keys"]:
            raise UserError(f"The VAE in {folder} lacks {len(info['missing_keys'])} tensors: {info['missing_keys']}.")
        device = torch.device(device)
        return cls(vae.to(device).eval().requires_grad_(False), folder, device)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.vae.config["z_dim"]

    @cached_property
    def identity(self) -> str:
        """Fingerprint of the config and the weights."""
        return folder_identity(self.folder)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames `(F, H, W, 3)` uint8 to latents `(C, (F-1)/4+1, H/8, W/8)` fp32 on the CPU."""
        return self.encode_batch(frames[None])[0]

    @torch.no_grad()
    def encode_batch(self, frames: Tensor) -> Tensor:
        """Frames `(B, F, H, W, 3)` uint8 to latents `(B, C, F', H/8, W/8)` fp32 on the CPU."""
        _, count, height, width, _ = frames.shape
        if count % TEMPORAL != 1 or height % SPATIAL or width % SPATIAL:  # the VAE would drop the rest silently
            raise ValueError(f"{count} frames of {height}x{width} are not 4n+1 frames of multiples of {SPATIAL}")
        pixels = frames.to(self.device).permute(0, 4, 1, 2, 3).to(self.vae.dtype) / 127.5 - 1
        latents = self.vae.encode(pixels, return_dict=False)[0].mode().float()
        return ((latents - self.mean) / self.std).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(C, F', H', W')` to frames `(4(F'-1)+1, 8H', 8W', 3)` uint8 on the CPU."""
        raw = latents[None].to(self.device, torch.float32) * self.std + self.mean
        pixels = self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0][0].float().clamp_(-1, 1)
        return ((pixels + 1) * 127.5).round_().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()
