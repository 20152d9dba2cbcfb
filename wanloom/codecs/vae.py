"""Video frames to normalised latents and back, on diffusers' AutoencoderKLWan.

In: RGB frames `(F, H, W, 3)` uint8 of a size that its geometry divides. Out: latents `(C, F', H', W')` fp32,
(posterior mean - latents_mean) / latents_std. The one decision: the mean and not a draw, so a clip has one encoding,
and no tiling, which changes the latents. The VAE is causal: a latent frame does not depend on later frames.
"""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from wanloom.codecs.parts import fill_part
from wanloom.codecs.settings import VaeConfig, read_vae
from wanloom.folders import check_finite

KEPT = ", which would be kept as black"


class VaeCodec:
    """An AutoencoderKLWan with its normalisation. `dtype` is that of the computation; fp32 is what Wan uses."""

    def __init__(self, vae: AutoencoderKLWan, config: VaeConfig, device: torch.device) -> None:
        self.vae = vae
        self.geometry = config.geometry
        self.device = device
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(config.latents_mean, dtype=torch.float32, device=device).view(shape)
        self.std = torch.tensor(config.latents_std, dtype=torch.float32, device=device).view(shape)

    @classmethod
    def load(
        cls, pipeline_folder: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> "VaeCodec":
        """Read the `vae` folder of a pipeline. Raises UserError when it is not there, of another kind or broken."""
        config, folder = read_vae(Path(pipeline_folder)), Path(pipeline_folder) / "vae"
        with torch.device("meta"):
            vae = AutoencoderKLWan(**config.model_dump(mode="json"))
        device = torch.device(device)
        return cls(fill_part(vae, folder, "diffusion_pytorch_model", dtype, device), config, device)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames `(F, H, W, 3)` uint8 to latents `(C, F', H', W')` fp32 on the CPU."""
        return self.encode_batch(frames[None])[0]

    @torch.no_grad()
    def encode_batch(self, frames: Tensor) -> Tensor:
        """Frames `(B, F, H, W, 3)` uint8 to latents `(B, C, F', H', W')` fp32 on the CPU."""
        _, count, height, width, _ = frames.shape
        step, side = self.geometry.frames, self.geometry.pixels
        if (count - 1) % step or height % side or width % side:  # the VAE would drop the rest silently
            raise ValueError(f"{count} frames of {width}x{height} are not {step}n+1 frames of multiples of {side}")
        pixels = frames.to(self.device).permute(0, 4, 1, 2, 3).to(self.vae.dtype) / 127.5 - 1
        latents = self.vae.encode(pixels, return_dict=False)[0].mode().float()
        check_finite(latents, "What the VAE makes of a picture", KEPT)
        return ((latents - self.mean) / self.std).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(C, F', H', W')` to frames `(F, H, W, 3)` uint8 on the CPU.

        Raises UserError for latents or pixels that are not finite: they would be written as black.
        """
        check_finite(latents, "The tensor of latents", KEPT)
        raw = latents[None].to(self.device, torch.float32) * self.std + self.mean
        pixels = self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0][0].float()
        check_finite(pixels, "What the VAE makes of the latents", KEPT)
        pixels.clamp_(-1, 1)
        return ((pixels + 1) * 127.5).round_().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()
