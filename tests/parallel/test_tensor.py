"""The table of tensor parallelism is of this model: a row that names nothing would leave a layer whole unseen."""

from small_model import build_model

from wanloom.parallel.tensor import GATHERING, TABLE, row_of, split_dim


def test_every_row_is_a_layer_of_the_model():
    model = build_model()
    modules = {row_of(name): module for name, module in model.named_modules()}
    assert TABLE.keys() | GATHERING <= modules.keys()
    for name, split in TABLE.items():
        params = dict(modules[name].named_parameters())
        assert all(dim < params[param].dim() for param, dim in split.dims.items()), name


def test_parameters_are_cut_by_outputs_inputs_or_not_at_all():
    dims = {name: split_dim(name) for name, _ in build_model().named_parameters()}
    names = ("cross_attn.norm_k", "ffn.0", "ffn.2", "norm3", "modulation")
    found = [(dims[f"blocks.1.{name}.weight"], dims.get(f"blocks.1.{name}.bias")) for name in names]
    assert found == [(0, None), (0, 0), (1, None), (None, None), (None, None)]
    for attention in ("blocks.0.self_attn", "blocks.1.cross_attn"):
        assert all(dims[f"{attention}.{name}.weight"] == dims[f"{attention}.{name}.bias"] == 0 for name in "qkv")
        assert (dims[f"{attention}.o.weight"], dims[f"{attention}.o.bias"]) == (1, None)
    assert dims["text_embedding.2.weight"] == 1 and dims["head.head.weight"] is None
