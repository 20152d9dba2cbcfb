"""What a layout of one process makes of a model."""

import torch
from small_model import SMALL, build_model, draw_pack

from wanloom.parallel.apply import apply_layout
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.parallel.settings import ComputeConfig


def test_a_model_in_bf16_is_one_under_autocast():
    plain, model = build_model(SMALL), build_model(SMALL)
    apply_layout(model, Mesh(ONE_PROCESS, torch.device("cpu")), ComputeConfig(precision="bf16"))
    pack, sigma, weight = draw_pack([(1, 2, 3), (3, 2, 2)], [5, 0], seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        expected, kept = plain(pack, sigma), plain.text_kv(pack)
    found = model(pack, sigma)
    assert torch.equal(found, expected) and not torch.equal(found, plain(pack, sigma))
    for out in (expected, found):
        (out * weight).sum().backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name
    for name, (k, v) in model.text_kv(pack).items():
        assert k.dtype == torch.bfloat16 and torch.equal(k, kept[name].k) and torch.equal(v, kept[name].v)
    assert model.compute_dtype("cpu") == torch.bfloat16 and plain.compute_dtype("cpu") == torch.float32
    assert not torch.is_autocast_enabled("cpu"), "it is on within the model alone"
