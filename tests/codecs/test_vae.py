"""The VAE codec against diffusers called directly."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from wanloom.codecs.identity import folder_identity
from wanloom.codecs.settings import read_vae
from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.errors import UserError
from wanloom.geometry import WAN_22


@pytest.fixture(scope="module")
def codec(tiny_pipeline: Path) -> VaeCodec:
    return VaeCodec.load(tiny_pipeline, "cpu")


def random_frames(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def test_encode_is_the_normalised_posterior_mean(codec: VaeCodec, tiny_pipeline: Path) -> None:
    frames = random_frames(9, 32, 48)
    latents = codec.encode(frames)
    vae = AutoencoderKLWan.from_pretrained(tiny_pipeline / "vae")
    video = (frames.double() / 255 * 2 - 1).float().permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        mean, _ = vae.encode(video).latent_dist.parameters.chunk(2, dim=1)
    for channel in range(16):  # written out, channel by channel
        expected = (mean[0, channel] - vae.config.latents_mean[channel]) / vae.config.latents_std[channel]
        torch.testing.assert_close(latents[channel], expected, rtol=1e-4, atol=1e-5)
    assert latents.shape == (16, 3, 4, 6)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad


def test_decode_undoes_the_normalisation_and_clamps(codec: VaeCodec, tiny_pipeline: Path) -> None:
    latents = 4 * torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    vae = AutoencoderKLWan.from_pretrained(tiny_pipeline / "vae")
    raw = torch.stack([latents[c] * vae.config.latents_std[c] + vae.config.latents_mean[c] for c in range(16)])
    with torch.no_grad():
        video = vae.decode(raw[None]).sample[0]
    expected = ((video.clamp(-1, 1) + 1) / 2 * 255).permute(1, 2, 3, 0)
    frames = codec.decode(latents)
    assert frames.shape == (5, 32, 48, 3)
    assert frames.dtype == torch.uint8
    assert (frames.float() - expected).abs().max() <= 0.51


def test_the_vae_of_wan_22_is_that_of_the_library(wan22_pipeline: Path) -> None:
    """Of another geometry, through the same lines: latents, and a video of the size that they stand for."""
    codec, vae = VaeCodec.load(wan22_pipeline, "cpu"), AutoencoderKLWan.from_pretrained(wan22_pipeline / "vae")
    assert codec.geometry == read_vae(wan22_pipeline).geometry == WAN_22
    frames = random_frames(9, 32, 64)
    video = (frames.double() / 255 * 2 - 1).float().permute(3, 0, 1, 2)[None]
    shape = (1, 48, 1, 1, 1)
    mean, std = (torch.tensor(values).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        expected = ((vae.encode(video).latent_dist.mode() - mean) / std)[0]
        decoded = vae.decode(expected[None] * std + mean).sample[0]
    latents = codec.encode(frames)
    assert latents.shape == expected.shape == codec.geometry.latents_shape(9, 32, 64) == (48, 3, 2, 4)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    made = codec.decode(expected)
    assert made.shape == (*codec.geometry.video_shape(*expected.shape[1:]), 3) == frames.shape
    assert (made.float() - ((decoded.clamp(-1, 1) + 1) / 2 * 255).permute(1, 2, 3, 0)).abs().max() <= 0.51
    with pytest.raises(ValueError, match=r"are not 4n\+1 frames of multiples of 16"):
        codec.encode(random_frames(5, 32, 40))


@pytest.mark.parametrize(
    "change",
    [
        {"scale_factor_spatial": 8},
        {"patch_size": None},
        {"in_channels": 3},
        {"is_residual": False},
        {"scale_factor_temporal": 8},
    ],
)
def test_a_vae_of_no_known_geometry_is_refused(wan22_pipeline: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = json.loads((wan22_pipeline / "vae" / "config.json").read_text()) | change
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    message = r"no VAE of the geometry 4x8x8 with 16 channels \(Wan 2.1\) or 4x16x16 with 48 channels \(Wan 2.2\)"
    with pytest.raises(UserError, match=message):
        read_vae(tmp_path)


def test_a_batch_is_its_samples(codec: VaeCodec) -> None:
    frames = random_frames(3, 5, 16, 16)
    together = codec.encode_batch(frames)
    for i in range(3):
        torch.testing.assert_close(together[i], codec.encode(frames[i]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 16, 16), (5, 12, 16), (5, 16, 20)])
def test_what_the_vae_would_drop_is_an_error(codec: VaeCodec, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="4n\\+1"):
        codec.encode(random_frames(*shape))


def test_a_missing_folder_and_a_missing_tensor_are_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no VAE"):
        VaeCodec.load(tmp_path, "cpu")
    shutil.copytree(tiny_pipeline / "vae", tmp_path / "vae")
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    state = load_file(file)
    del state["quant_conv.bias"]
    save_file(state, file)
    with pytest.raises(UserError, match=r"1 missing: quant_conv\.bias"):
        VaeCodec.load(tmp_path, "cpu")


def test_identity_follows_the_weights(tiny_pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pipeline / "vae", tmp_path / "vae")
    whole = folder_identity(tiny_pipeline / "vae")
    assert folder_identity(tmp_path / "vae") == whole
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    state = load_file(file)
    state["quant_conv.bias"] += 1e-3
    save_file(state, file)
    assert folder_identity(tmp_path / "vae") != whole


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_identity_covers_every_file_that_is_read(part: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    """Whatever is read of a folder, its bytes are part of the identity: what Python opens, and the weights."""
    shutil.copytree(tiny_pipeline, tmp_path / "model")
    folder = tmp_path / "model" / part
    if part == "tokenizer":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    opened: set[str] = set()
    real = io.open

    def watched(file, *words, **more):
        opened.add(str(file))
        return real(file, *words, **more)

    with pytest.MonkeyPatch.context() as patch:
        for place in ("builtins.open", "io.open"):
            patch.setattr(place, watched)
        (VaeCodec if part == "vae" else TextCodec).load(tmp_path / "model", "cpu")
    read = {path for path in folder.iterdir() if str(path) in opened} | set(folder.glob("*.safetensors"))
    assert len(read) >= (3 if part == "tokenizer" else 2)
    before = folder_identity(folder)
    for path in read:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert folder_identity(folder) != before, path
        path.write_bytes(data)
    assert folder_identity(folder) == before
