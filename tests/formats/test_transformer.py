import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from dit_reference import SMALL, build_model, build_reference
from safetensors.torch import load_file, save_file
from transformer_files import FILE, INDEX, NAME

from wanloom.errors import UserError
from wanloom.folders import StoredTensor
from wanloom.formats.published import config_json, parse_config
from wanloom.formats.transformer import (
    LAYOUTS,
    config_of,
    load_dit,
    read_config,
    rename,
    save_weights,
    shape_in_file,
    state_dict_as,
)
from wanloom.model.dit import WanDiT, keeps_fp32, materialise
from wanloom.model.settings import DiTConfig
from wanloom.variants import VARIANTS


def assert_same(found: WanDiT, expected: WanDiT) -> None:
    assert found.config == expected.config
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of the folder's file."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


# ---- round trips


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_equal(model, layout, tmp_path):
    save_weights(model.state_dict(), model.config, tmp_path / "model", layout)
    found = load_dit(tmp_path / "model")
    assert_same(found, model)
    assert all(param.requires_grad for param in found.parameters())
    assert read_config(tmp_path / "model") == SMALL
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", FILE, "model"]


def test_diffusers_loads_what_we_write(model, folder):
    loaded: Any = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    found, info = loaded
    assert not any(info.values()), info
    expected = build_reference(model)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    settings = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim")
    for key in (*settings, "ffn_dim", "num_layers", "eps", "qk_norm", "cross_attn_norm"):
        assert found.config[key] == expected.config[key], key


@pytest.mark.parametrize("shard_size", ["10GB", "60KB"])
def test_we_load_what_diffusers_writes(model, shard_size, tmp_path):
    build_reference(model).save_pretrained(tmp_path / "transformer", max_shard_size=shard_size)
    shards = len(list((tmp_path / "transformer").glob("*.safetensors")))
    assert (shards > 1) == (shard_size == "60KB")
    assert_same(load_dit(tmp_path / "transformer"), model)
    assert_same(load_dit(tmp_path), model)


def test_names_are_those_of_the_original(model):
    original = state_dict_as(model.state_dict(), "original")
    assert "blocks.1.modulation" in original
    assert "head.modulation" in original
    assert original["patch_embedding.weight"].shape == (48, 4, 1, 2, 2)
    assert original["blocks.0.modulation"].shape == (1, 6, 48)
    same = {name for name in model.state_dict() if "modulation" not in name}
    assert same <= original.keys()
    with pytest.raises(ValueError, match="no parameter"):
        state_dict_as({"blocks.0.self_attn.qq.weight": torch.zeros(1)}, "original")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "prefix",
    ["", "model.diffusion_model.", "diffusion_model.", "pipe.dit.", "module.", "_orig_mod.", "module._orig_mod."],
)
def test_a_single_file_loads_with_or_without_prefix(model, layout, prefix, tmp_path):
    state = state_dict_as(model.state_dict(), layout)
    save_file({prefix + key: value.contiguous() for key, value in state.items()}, tmp_path / "wan.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(SMALL, layout)))
    assert_same(load_dit(tmp_path / "wan.safetensors"), model)


def test_shards_load_with_and_without_their_index(model, tmp_path):
    folder = tmp_path / "model"
    save_weights(model.state_dict(), SMALL, folder, "original", shard_bytes=60_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"{NAME}-00001-of-{len(files):05d}.safetensors"
    assert all((folder / name).stat().st_size < 70_000 for name in files)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert_same(load_dit(folder), model)
    assert_same(load_dit(folder / INDEX), model)
    (folder / INDEX).unlink()
    assert_same(load_dit(folder), model)


def test_bf16_keeps_the_fp32_parts(model, folder):
    found = load_dit(folder, partial(materialise, dtype=torch.bfloat16)).state_dict()
    for name, value in model.state_dict().items():
        expected = value if keeps_fp32(name) else value.bfloat16()
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected), name
    assert {name for name in found if name.startswith("blocks.0") and keeps_fp32(name)} == {
        "blocks.0.modulation.weight",
        "blocks.0.norm3.weight",
        "blocks.0.norm3.bias",
        *(f"blocks.0.{a}_attn.norm_{b}.weight" for a in ("self", "cross") for b in "qk"),
    }


def test_half_precision_files_load_as_fp32(model, folder):
    rewrite(folder, lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}))
    for name, value in load_dit(folder).state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].half().float())


# ---- what is not as it should be


def test_every_missing_unexpected_and_misshapen_tensor_is_named(folder):
    def change(tensors):
        del tensors["blocks.1.attn2.to_q.weight"], tensors["scale_shift_table"]
        tensors["blocks.2.attn1.to_q.weight"] = torch.zeros(2)
        tensors["lora.alpha"] = torch.zeros(1)
        tensors["proj_out.weight"] = torch.zeros(3, 48)
        tensors["patch_embedding.weight"] = torch.zeros(48, 16)

    rewrite(folder, change)
    with pytest.raises(UserError) as caught:
        load_dit(folder)
    message = str(caught.value)
    assert "2 missing: blocks.1.attn2.to_q.weight, scale_shift_table." in message
    assert "2 unexpected: blocks.2.attn1.to_q.weight, lora.alpha." in message
    assert "proj_out.weight ([3, 48] in the file, [16, 48] in the model)" in message
    assert "patch_embedding.weight ([48, 16] in the file, [48, 4, 1, 2, 2] in the model)" in message
    assert "2 of another shape" in message


@pytest.mark.parametrize(
    ("key", "variant"),
    [
        ("blocks.0.attn2.add_k_proj.weight", "image-to-video"),
        ("blocks.0.cross_attn.k_img.weight", "image-to-video"),
        ("vace_blocks.0.before_proj.weight", "VACE"),
        ("face_adapter.fuser_blocks.0.linear1_q.weight", "Animate"),
    ],
)
def test_variants_are_named(folder, key, variant):
    rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(2)}))
    with pytest.raises(UserError, match=f"Wan {variant} model"):
        load_dit(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
def test_a_truncated_file_is_named(folder, keep):
    data = (folder / FILE).read_bytes()
    end = int(len(data) * keep) if isinstance(keep, float) else keep
    (folder / FILE).write_bytes(data[:end])
    with pytest.raises(UserError, match=f"{FILE} is not a whole safetensors file"):
        load_dit(folder)


def test_a_file_that_is_something_else_is_named(folder):
    (folder / FILE).write_bytes(b"PK\x03\x04" + bytes(range(256)) * 40)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_dit(folder)


def test_two_copies_of_a_tensor_are_an_error(folder):
    shutil.copy(folder / FILE, folder / f"{NAME}.fp16.safetensors")
    with pytest.raises(UserError, match=r"is in .* and in .*: give the path of one file"):
        load_dit(folder)


def test_quantised_weights_are_an_error(folder):
    rewrite(folder, lambda tensors: tensors.update({"proj_out.bias": tensors["proj_out.bias"].to(torch.int8)}))
    with pytest.raises(UserError, match=r"'proj_out.bias' is of type I8, and quantised weights are not read"):
        load_dit(folder)


def add(changes):
    """A change of a file that gives it further tensors, or renames all of them."""
    return lambda tensors: tensors.update({key: torch.zeros(2) for key in changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add(["scaled_fp8", "proj_out.scale_weight"]), "holds scaled fp8 weights"),
        (add(["proj_out.weight_scale"]), "holds scaled fp8 weights"),
        (add(["proj_out.weight.absmax"]), "holds quantised weights \\(it has 'proj_out.weight.absmax'\\)"),
        (add(["blocks.0.ffn.qweight"]), "holds quantised weights"),
        (add([f"blocks.{i}.attn1.to_q.lora_A.weight" for i in range(99)]), "is a LoRA \\(99 tensors\\)"),
        (add([f"lora_unet_blocks_{i}_ffn.lora_down.weight" for i in range(99)]), "is a LoRA"),
        (add([f"blocks.{i}.ffn.0.lokr_w1" for i in range(99)]), "is a LoRA"),
        (add(["module.proj_out.bias"]), "1 unexpected: module.proj_out.bias"),
    ],
)
def test_what_is_no_model_of_its_own_is_one_short_sentence(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        load_dit(folder)
    assert len(str(caught.value)) < 500 + len(str(folder))


def test_a_checkpoint_of_several_models_is_named_as_such(folder):
    def change(tensors):
        renamed = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
        tensors.clear()
        tensors.update(renamed | {"first_stage_model.conv1.weight": torch.zeros(2)})

    rewrite(folder, change)
    with pytest.raises(UserError, match=r"has several models in one: give .* 'model\.diffusion_model\.' alone"):
        load_dit(folder)


@pytest.mark.parametrize(
    "names", [["encoder.block.0.layer.0.SelfAttention.q.weight"], [f"decoder.x{i}.weight" for i in range(900)]]
)
def test_another_model_is_named_in_one_short_sentence(folder, names):
    save_file({name: torch.zeros(2) for name in names}, folder / FILE)
    with pytest.raises(
        UserError, match=f"holds another model: of its {len(names)} tensors .* none is expected"
    ) as caught:
        load_dit(folder)
    assert len(str(caught.value)) < 400 + len(str(folder))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named_where_it_is_read(folder, bad):
    rewrite(folder, lambda tensors: tensors["blocks.1.ffn.net.2.weight"].view(-1)[-1:].fill_(bad))
    with pytest.raises(UserError, match=r"'blocks.1.ffn.net.2.weight' holds NaN or infinity"):
        load_dit(folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda key, value: value.half(), "are 69 in fp16."),
        (lambda key, value: value.to(torch.float8_e4m3fn), "are 69 in fp8: in fp8 most of their precision is gone."),
        (lambda key, value: value.bfloat16() if "ffn" in key else value, "are 8 in bf16 and 61 in fp32."),
        (lambda key, value: value.bfloat16(), None),
        (lambda key, value: value, None),
    ],
)
def test_unusual_types_are_read_and_named_in_a_line(model, folder, capsys, change, line):
    tensors = {key: change(key, value) for key, value in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE)
    found = load_dit(folder).state_dict()
    want = state_dict_as({k: v for k, v in found.items()}, "diffusers")
    assert all(torch.equal(want[key], value.float()) for key, value in tensors.items())
    assert capsys.readouterr().err == ("" if line is None else f"note: the tensors of {folder} {line}\n")


def test_files_that_could_run_code_are_named_and_not_read(folder):
    (folder / FILE).rename(folder / f"{NAME}.bin")
    with pytest.raises(UserError, match=f"has no safetensors files, only {NAME}.bin: such files can run code"):
        load_dit(folder)


@pytest.mark.parametrize("eps", [3e-2, 1e-9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_eps_of_a_file_reaches_every_norm(layout, eps, tmp_path):
    saved = build_model(SMALL.model_copy(update={"eps": eps}))
    save_weights(saved.state_dict(), saved.config, tmp_path / "model", layout)
    loaded = load_dit(tmp_path / "model")
    found = [module.eps for module in loaded.modules() if hasattr(module, "eps")]
    assert found == [eps] * (6 * SMALL.num_layers + 1)
    without = json.loads((tmp_path / "model" / "config.json").read_text())
    del without["eps"]
    assert parse_config(without, tmp_path).eps == 1e-6  # what the published models have


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b"])
def test_a_lone_file_of_a_published_size_needs_no_config(name, layout):
    with torch.device("meta"):
        params = dict(WanDiT(VARIANTS[name].shape).named_parameters())
    stored = {
        rename(ours, layout): StoredTensor(Path("x"), "", shape_in_file(ours, tuple(param.shape)))
        for ours, param in params.items()
    }
    assert config_of([Path("nowhere/wan.safetensors")], stored) == VARIANTS[name].shape


def test_a_lone_file_of_another_size_needs_its_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"width 48.*config\.json"):
        load_dit(folder)


def test_a_lone_file_that_is_no_transformer_is_an_error(tmp_path):
    save_file({"encoder.conv_in.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match="is not a Wan transformer"):
        load_dit(tmp_path / "vae.safetensors")


# ---- writing


def test_a_save_that_fails_is_one_sentence(model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
    with pytest.raises(UserError, match="No space left"):
        save_weights(model.state_dict(), model.config, tmp_path / "model")


def test_diffusers_cannot_hold_another_number_of_text_slots(tmp_path):
    model = build_model(DiTConfig(**SMALL.model_dump() | {"text_slots": 77}))
    with pytest.raises(UserError, match="77 text slots"):
        save_weights(model.state_dict(), model.config, tmp_path / "model")
    save_weights(model.state_dict(), model.config, tmp_path / "model", "original")
    assert load_dit(tmp_path / "model").config.text_slots == 77
