"""Files of published models are found, and their settings are read or named."""

import json
import shutil
from pathlib import Path

import pytest
from dit_reference import SMALL
from transformer_files import INDEX

from wanloom.errors import UserError
from wanloom.formats.published import config_json, parse_config
from wanloom.formats.transformer import (
    load_dit,
    save_weights,
)
from wanloom.variants import VARIANTS


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", ""])
def test_an_index_names_only_files_beside_it(model, name, tmp_path):
    save_weights(model.state_dict(), SMALL, tmp_path / "model", shard_bytes=60_000)
    shutil.copy(next((tmp_path / "model").glob("*.safetensors")), tmp_path / "secret.safetensors")
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    index["weight_map"]["proj_out.weight"] = name
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a safetensors file beside it"):
        load_dit(tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "gone.safetensors"}}'])
def test_a_broken_index_is_an_error(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        load_dit(folder)


def test_where_there_is_no_model(tmp_path):
    with pytest.raises(UserError, match="There is no model at"):
        load_dit(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no safetensors files: it holds no model"):
        load_dit(tmp_path)
    (tmp_path / "model.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_dit(tmp_path / "model.pth")
    for name in ("transformer", "transformer_2"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="two transformers"):
        load_dit(tmp_path)


# ---- configs


@pytest.mark.parametrize(
    "values",
    [
        {"_class_name": "WanVACETransformer3DModel"},
        {"image_dim": 1280},
        {"added_kv_proj_dim": 5120},
        {"in_channels": 36},
        {"patch_size": [1, 1, 1]},
        {"cross_attn_norm": False},
        {"qk_norm": None},
        {"num_layers": "two"},
        {"attention_head_dim": 12.5},
        {"num_attention_heads": 0},
        {"attention_head_dim": 3},
        {"ffn_dim": None},
    ],
)
def test_a_config_of_another_network_is_an_error(folder, values):
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config\.json"):
        load_dit(folder)


def test_published_configs_are_read():
    diffusers = {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.33.0.dev0",
        "added_kv_proj_dim": None,
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": 8960,
        "freq_dim": 256,
        "image_dim": None,
        "in_channels": 16,
        "num_attention_heads": 12,
        "num_layers": 30,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    }
    original = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": 5120,
        "eps": 1e-06,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": 40,
        "num_layers": 40,
        "out_dim": 16,
        "text_len": 512,
    }
    assert parse_config(diffusers, Path("config.json")) == VARIANTS["wan2.1-t2v-1.3b"].shape
    assert parse_config(original, Path("config.json")) == VARIANTS["wan2.1-t2v-14b"].shape


def test_settings_that_are_not_read_are_named(capsys):
    values = config_json(SMALL, "diffusers") | {"new_thing": 3, "_name_or_path": "x"}
    assert parse_config(values, Path("config.json")) == SMALL
    assert capsys.readouterr().err == "note: config.json: not read: new_thing\n"
