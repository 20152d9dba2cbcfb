"""Video frames to normalised latents and back, on diffusers' AutoencoderKLWan.

In: RGB frames `(F, H, W, 3)` uint8 with F = 4n+1 and H, W multiples of 8. Out: latents `(C, n+1, H/8, W/8)` fp32,
(posterior mean - latents_mean) / latents_std. The one decision: the mean and not a draw, so a clip has one encoding,
and no tiling, which changes the latents. The VAE is causal: a latent frame does not depend on later frames.
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from pydantic import Field, model_validator
from torch import Tensor

from wanloom.codecs.parts import PartConfig, fill_part, read_part
from wanloom.folders import check_finite

SPATIAL = 8  # pixels per latent, rows and columns
TEMPORAL = 4  # frames per latent frame, after the first
KEPT = ", which would be kept as black"

Channel = Annotated[int, Field(gt=0, le=1024)]
Statistic = Annotated[float, Field(ge=-1000, le=1000)]


class VaeConfig(PartConfig):
    """An AutoencoderKLWan of Wan 2.1; the defaults are the library's, the fixed values what `VaeCodec` assumes."""

    base_dim: Channel = 96
    decoder_base_dim: Channel | None = None
    z_dim: int = Field(16, gt=0, le=256)
    dim_mult: tuple[int, int, int, int] = (1, 2, 4, 4)
    num_res_blocks: int = Field(2, gt=0, le=16)
    attn_scales: tuple[Statistic, ...] = Field((), max_length=8)
    temperal_downsample: tuple[bool, bool, bool] = (False, True, True)
    dropout: float = Field(0.0, ge=0, lt=1)
    latents_mean: tuple[Statistic, ...]
    latents_std: tuple[Statistic, ...]
    is_residual: Literal[False] = False
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    patch_size: None = None
    scale_factor_temporal: Literal[4] = 4
    scale_factor_spatial: Literal[8] = 8

    @model_validator(mode="after")
    def _agrees(self) -> "VaeConfig":
        if not all(0 < factor <= 16 for factor in self.dim_mult):
            raise ValueError(f"dim_mult is {list(self.dim_mult)}, factors of 1 to 16 are expected")
        if sum(self.temperal_downsample) != 2:
            raise ValueError(f"temperal_downsample is {list(self.temperal_downsample)}, two of them halve the frames")
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) != self.z_dim:  # one number would be taken for all channels
                raise ValueError(f"{name} has {len(values)} numbers for {self.z_dim} channels of latents")
        if min(self.latents_std) <= 0:
            raise ValueError("latents_std has a number that is not above 0")
        return self


class VaeCodec:
    """An AutoencoderKLWan with its normalisation. `dtype` is that of the computation; fp32 is what Wan uses."""

    def __init__(self, vae: AutoencoderKLWan, device: torch.device) -> None:
        self.vae = vae
        self.device = device
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config["latents_mean"], dtype=torch.float32, device=device).view(shape)
        self.std = torch.tensor(vae.config["latents_std"], dtype=torch.float32, device=device).view(shape)

    @classmethod
    def load(
        cls, pipeline_folder: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> "VaeCodec":
        """Read the `vae` folder of a pipeline. Raises UserError when it is not there, of another kind or broken."""
        folder = Path(pipeline_folder) / "vae"
        config = read_part(VaeConfig, folder, "VAE", "AutoencoderKLWan")
        with torch.device("meta"):
            vae = AutoencoderKLWan(**config.model_dump(mode="json"))
        device = torch.device(device)
        return cls(fill_part(vae, folder, "diffusion_pytorch_model", dtype, device), device)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.vae.config["z_dim"]

    def encode(self, frames: Tensor) -> Tensor:
        """Frames `(F, H, W, 3)` uint8 to latents `(C, (F-1)/4+1, H/8, W/8)` fp32 on the CPU."""
        return self.encode_batch(frames[None])[0]

    @torch.no_grad()
    def encode_batch(self, frames: Tensor) -> Tensor:
        """Frames `(B, F, H, W, 3)` uint8 to latents `(B, C, F', H/8, W/8)` fp32 on the CPU."""
        _, count, height, width, _ = frames.shape
        if count % TEMPORAL != 1 or height % SPATIAL or width % SPATIAL:  # the VAE would drop the rest silently
            raise ValueError(f"{count} frames of {width}x{height} are not 4n+1 frames of multiples of {SPATIAL}")
        pixels = frames.to(self.device).permute(0, 4, 1, 2, 3).to(self.vae.dtype) / 127.5 - 1
        latents = self.vae.encode(pixels, return_dict=False)[0].mode().float()
        check_finite(latents, "What the VAE makes of a picture", KEPT)
        return ((latents - self.mean) / self.std).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(C, F', H', W')` to frames `(4(F'-1)+1, 8H', 8W', 3)` uint8 on the CPU.

        Raises UserError for latents or pixels that are not finite: they would be written as black.
        """
        check_finite(latents, "The tensor of latents", KEPT)
        raw = latents[None].to(self.device, torch.float32) * self.std + self.mean
        pixels = self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0][0].float()
        check_finite(pixels, "What the VAE makes of the latents", KEPT)
        pixels.clamp_(-1, 1)
        return ((pixels + 1) * 127.5).round_().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()
