"""The held-out loss against a plain loop over diffusers."""

import pytest
import torch

from wanloom.data.mock import MockDataset
from wanloom.evaluate import validation
from wanloom.evaluate.validation import SIGMAS, build_validation
from wanloom.formats.transformer import load_dit
from wanloom.geometry import WAN_21
from wanloom.keys import draw_noise
from wanloom.parallel.mesh import ONE_PROCESS, Mesh

ALONE = Mesh(ONE_PROCESS, torch.device("cpu"))


@pytest.mark.parametrize("budget", [1, 60, 4000])
def test_it_is_the_mean_error_over_samples_and_levels(tiny_pipeline, budget):
    from diffusers import WanTransformer3DModel

    source = MockDataset("5x64x64,1x64x32", 64, WAN_21, size=2, val_size=3)
    validate = build_validation(load_dit(tiny_pipeline), ALONE, [source], budget)
    assert validate is not None
    found = validate()
    assert validate() == found

    transformer = WanTransformer3DModel.from_pretrained(tiny_pipeline / "transformer")
    total, count, index = 0.0, 0, source.rows("val")
    for i in range(len(index)):
        sample = source.read(index[i])
        clean, text = sample.tensors["latents"].float(), torch.zeros(1, 512, 64)
        text[0, : len(sample.tensors["text"])] = sample.tensors["text"]
        for sigma in SIGMAS:
            noise = draw_noise(tuple(clean.shape), 0, f"validation/{sample.key}/{sigma}", 0)
            noisy = (1 - sigma) * clean + sigma * noise
            with torch.no_grad():
                velocity = transformer(noisy[None], torch.tensor([1000 * sigma]), text, return_dict=False)[0][0]
            total += (velocity - (noise - clean)).square().sum().item()
            count += clean.numel()
    assert found == pytest.approx(total / count, rel=1e-5)


def test_it_is_absent_without_a_val_split(tiny_pipeline):
    model = load_dit(tiny_pipeline)
    assert build_validation(model, ALONE, [MockDataset("1x64x64", 64, WAN_21, val_size=0)], 100) is None


def test_it_reads_a_bounded_number_of_samples_from_the_start_of_each_split(tiny_pipeline, monkeypatch):
    read = []

    class Watched(MockDataset):
        def read(self, row):
            read.append((self.path, row.key))
            return super().read(row)

    monkeypatch.setattr(validation, "MAX_SAMPLES", 2)
    sources = [Watched("1x32x32", 64, WAN_21, size=2, val_size=5), Watched("1x32x48", 64, WAN_21, size=2, val_size=1)]
    validate = build_validation(load_dit(tiny_pipeline), ALONE, sources, 100)
    assert validate is not None
    validate()
    first = [(source.path, key) for source in sources for key in source.rows("val").texts["key"][:2].to_pylist()]
    assert len(first) == 3 and sorted(read) == sorted(first * len(SIGMAS))
