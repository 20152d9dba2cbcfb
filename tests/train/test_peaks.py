"""The peak of a run is that of GPUs whose names are known, over all ranks."""

import pytest
import torch

from wanloom.train import peaks
from wanloom.train.peaks import Peak, find_peak

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA H20", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_a_peak_is_known_or_not_and_never_guessed(name, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert find_peak(GPU, bf16=True) == Peak(tera, () if tera else (name,))


def test_the_peak_is_that_of_all_gpus_or_none(monkeypatch):
    ranks = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    monkeypatch.setattr(peaks, "gather", lambda name: [name, *ranks])
    assert find_peak(GPU, bf16=True) == Peak(756, ())
    ranks[:] = ["NVIDIA H200", "NVIDIA H200"]
    assert find_peak(GPU, bf16=True) == Peak((756 + 2 * 989) / 3, ())
    ranks[:] = ["NVIDIA X1", "NVIDIA H200", "NVIDIA X2", "NVIDIA X1"]
    assert find_peak(GPU, bf16=True) == Peak(None, ("NVIDIA X1", "NVIDIA X2"))
    ranks[:] = [None]
    assert find_peak(GPU, bf16=False) == find_peak(torch.device("cpu"), bf16=True) == Peak(None, ())
