"""The shipped pipeline is what it says: it loads in diffusers and reconstructs clips that it was not trained on."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from wanloom.cli.demo import SAMPLING
from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.demo import shapes
from wanloom.demo.demo import FRAMES, SIZE
from wanloom.errors import UserError
from wanloom.formats.pipeline import TINY, find_local, find_pipeline, full_name
from wanloom.formats.transformer import load_dit, read_config
from wanloom.sample.settings import read_defaults
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.slow

SEED = 4711  # neither of the seeds of tools/build_tiny.py


def clips(count: int, frames: int) -> torch.Tensor:
    """Demo clips of scenes spread over all combinations."""
    picked = [shapes.build_clip(SEED, (i * 7) % 72, shapes.SCENES, frames)[0] for i in range(count)]
    return torch.from_numpy(np.stack(picked))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).div(255).square().mean()
    return float(-10 * torch.log10(error))


@pytest.fixture(scope="module")
def vae() -> VaeCodec:
    return VaeCodec.load(TINY, "cpu")


def test_its_settings_are_how_the_demo_samples():
    """What `wanloom generate` makes without options is measured by the demo, not some default of large models."""
    found = read_defaults(TINY, VARIANTS["tiny"].shape)
    assert f"--steps {found.steps} --guidance {found.guidance:g}" == SAMPLING
    assert (found.height, found.width, found.frames, found.shift) == (SIZE, SIZE, FRAMES, 3.0)


@pytest.mark.parametrize("name", ["Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-14B"])
def test_the_original_repository_is_told_from_the_one_that_is_read(name):
    """Before anything is fetched: there is no network here, and its files are pickles."""
    with pytest.raises(UserError, match=f"whose VAE and text encoder are pickles: give {name}-Diffusers"):
        find_pipeline(name, ("vae",))


def test_a_folder_in_the_original_layout_says_what_it_is(tmp_path):
    with pytest.raises(UserError, match="has no vae, tokenizer: give a whole pipeline in diffusers layout"):
        find_pipeline(str(tmp_path), ("vae", "tokenizer", "transformer"))
    (tmp_path / "Wan2.1_VAE.pth").touch()
    with pytest.raises(
        UserError, match=r"is in the layout of Wan's own code, .*: give the same model in diffusers layout"
    ):
        find_pipeline(str(tmp_path), ("vae", "tokenizer"))
    assert find_pipeline(str(tmp_path), ("transformer",)) == tmp_path, "its transformer can be read"


def test_diffusers_loads_it_whole():
    pipeline = WanPipeline.from_pretrained(TINY)
    assert pipeline.vae.config.z_dim == 16
    assert pipeline.vae_scale_factor_temporal == 4 and pipeline.vae_scale_factor_spatial == 8
    assert pipeline.transformer.config.num_layers == VARIANTS["tiny"].shape.num_layers


def test_our_config_is_its_config():
    assert read_config(find_pipeline("tiny")) == VARIANTS["tiny"].shape
    model = load_dit(find_pipeline("tiny"))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("frames", "least"), [(17, 30.0), (1, 30.0), (33, 29.0)])
def test_held_out_clips_come_back(vae, frames, least):
    """The mean over clips of the PSNR of the posterior mean's reconstruction, in dB."""
    values = [psnr(clip, vae.decode(vae.encode(clip))) for clip in clips(12, frames)]
    assert np.mean(values) >= least, values


def test_latents_are_normalised_by_their_own_statistics(vae):
    latents = torch.stack([vae.encode(clip) for clip in clips(24, 17)])
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.25
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.25


def test_text_states_differ_by_every_word():
    codec = TextCodec.load(TINY, "cpu")
    captions = [scene.caption(0) for scene in shapes.SCENES]
    states = codec.encode(captions)
    pooled = torch.stack([state.mean(0) for state in states])
    distances = torch.cdist(pooled, pooled) + torch.eye(len(captions)) * 9
    assert distances.min() > 0.05
    assert codec.encode(["kein Wort davon \u20ac"])[0].isfinite().all()


def test_unknown_models_are_one_sentence():
    with pytest.raises(UserError, match="There is no model 'tyni'"):
        find_pipeline("tyni")
    with pytest.raises(UserError, match="There is no model"):
        find_pipeline("./not/here")


def test_the_home_of_nobody_is_a_model_that_is_not_there():
    with pytest.raises(UserError, match="There is no model '~nobody-of-this-name/wan'"):
        find_pipeline("~nobody-of-this-name/wan")
    assert find_local("~nobody-of-this-name/wan", ("vae",)) is None


def test_the_full_name_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "wan").mkdir()
    assert full_name("~/wan") == str(tmp_path / "wan")
    assert (full_name("tiny"), full_name("Wan-AI/none")) == ("tiny", "Wan-AI/none")
