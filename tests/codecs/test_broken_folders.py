"""Model folders that are broken or meant to harm: each ends in one sentence, at once, and takes no memory."""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.errors import UserError
from wanloom.formats.transformer import load_dit

pytestmark = pytest.mark.slow

DEEP = "[" * 100_000 + "]" * 100_000
LOADERS: dict[str, Callable[[Path], object]] = {
    "vae": lambda folder: VaeCodec.load(folder, "cpu"),
    "text_encoder": lambda folder: TextCodec.load(folder, "cpu"),
    "tokenizer": lambda folder: TextCodec.load(folder, "cpu"),
    "transformer": load_dit,
}
Change = Callable[[Path], object]


def config(**values: Any) -> Change:
    """Other values in the config of the part."""

    def change(part: Path) -> None:
        file = part / ("tokenizer_config.json" if part.name == "tokenizer" else "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def text(name: str, content: str | bytes) -> Change:
    """Another content of a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda part: (part / name).write_bytes(data)


def without(name: str) -> Change:
    return lambda part: (part / name).unlink()


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Other tensors in the file of weights."""

    def change(part: Path) -> None:
        (file,) = part.glob("*.safetensors")
        state = load_file(file)
        edit(state)
        save_file({name: value.contiguous() for name, value in state.items()}, file)

    return change


def vocabulary(**values: Any) -> Change:
    def change(part: Path) -> None:
        content = json.loads((part / "tokenizer.json").read_text())
        content["model"] |= {key: value for key, value in values.items() if key in ("vocab", "unk_id", "type")}
        content |= {key: value for key, value in values.items() if key not in ("vocab", "unk_id", "type")}
        (part / "tokenizer.json").write_text(json.dumps(content))

    return change


def as_pickle(part: Path) -> None:
    (file,) = part.glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))


def own_code(part: Path) -> None:
    """A tokenizer whose class is in the folder: it would leave a file behind if it ran."""
    (part / "evil.py").write_text(f"open({str(part / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config(auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")(part)


def as_pipe(name: str) -> Change:
    """A pipe in place of a file: who opens it waits for ever."""

    def change(part: Path) -> None:
        (part / name).unlink(missing_ok=True)
        os.mkfifo(part / name)

    return change


def adapter(part: Path) -> None:
    (part / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/etc", "peft_type": "LORA"}))
    config(num_heads=-1)(part)


VAE: dict[str, Change] = {
    "deep": text("config.json", DEEP),
    "deep value": text("config.json", f'{{"base_dim": {DEEP}}}'),
    "a list": text("config.json", "[]"),
    "half": text("config.json", '{"base_dim": 8,'),
    "no text": text("config.json", b"\xff\xfe\x00"),
    "long number": text("config.json", '{"base_dim": ' + "9" * 10_000 + "}"),
    "base_dim 10^15": config(base_dim=10**15),
    "base_dim 10^6": config(base_dim=10**6),
    "base_dim negative": config(base_dim=-8),
    "base_dim zero": config(base_dim=0),
    "base_dim text": config(base_dim="8"),
    "base_dim float": config(base_dim=8.5),
    "base_dim list": config(base_dim=[8]),
    "base_dim other": config(base_dim=16),
    "blocks": config(num_res_blocks=10**9),
    "dim_mult empty": config(dim_mult=[]),
    "dim_mult long": config(dim_mult=[1] * 10_000),
    "dim_mult huge": config(dim_mult=[1, 2, 4, 10**9]),
    "dim_mult zero": config(dim_mult=[1, 2, 0, 4]),
    "z_dim": config(z_dim=0),
    "z_dim other": config(z_dim=48),
    "downsample": config(temperal_downsample=[True, True, True]),
    "downsample text": config(temperal_downsample="yes"),
    "mean one": config(latents_mean=[0.5]),
    "mean nan": config(latents_mean=[float("nan")] * 16),
    "std zero": config(latents_std=[0.0] * 16),
    "std negative": config(latents_std=[-1.0] * 16),
    "std dict": config(latents_std={}),
    "dropout": config(dropout=7),
    "residual": config(is_residual=True, patch_size=2),
    "scale": config(scale_factor_spatial=16),
    "class": config(_class_name="AutoencoderKL"),
    "quantised": config(quantization_config={"quant_method": "bitsandbytes"}),
    "no weights": without("diffusion_pytorch_model.safetensors"),
    "no config": without("config.json"),
    "pickle": as_pickle,
    "nan": tensors(lambda state: next(iter(state.values())).view(-1)[:1].fill_(float("nan"))),
    "int8": tensors(lambda state: state.update({k: v.to(torch.int8) for k, v in state.items()})),
    "another": tensors(lambda state: (state.clear(), state.update(x=torch.zeros(2)))),
    "config pipe": as_pipe("config.json"),
    "weights pipe": as_pipe("diffusion_pytorch_model.safetensors"),
    "index out": text("diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}'),
}
TEXT: dict[str, Change] = {
    "deep": text("config.json", DEEP),
    "vocab": config(vocab_size=10**15),
    "vocab other": config(vocab_size=10),
    "d_model": config(d_model=10**12),
    "d_model negative": config(d_model=-64),
    "layers": config(num_layers=10**9),
    "layers other": config(num_layers=3),
    "heads text": config(num_heads="4"),
    "d_kv": config(d_kv=None, num_heads=0),
    "buckets": config(relative_attention_num_buckets=10**12),
    "buckets one": config(relative_attention_num_buckets=1),
    "activation": config(feed_forward_proj="gated-exec"),
    "activation list": config(feed_forward_proj=["relu"]),
    "eps": config(layer_norm_epsilon="small"),
    "class": config(architectures=["LlamaForCausalLM"]),
    "class deep": config(architectures=[["UMT5EncoderModel"]]),
    "bitsandbytes": config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "gptq": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "scaled fp8": tensors(lambda state: state.update(scaled_fp8=torch.zeros(2))),
    "inf": tensors(lambda state: state["encoder.final_layer_norm.weight"].fill_(float("inf"))),
    "pickle": as_pickle,
    "adapter": adapter,
}
TOKENIZER: dict[str, Change] = {
    "own code": own_code,
    "pipe": as_pipe("added_tokens.json"),
    "vocabulary pipe": as_pipe("tokenizer.json"),
    "deep config": text("tokenizer_config.json", DEEP),
    "deep": text("tokenizer.json", DEEP),
    "deep other": text("special_tokens_map.json", DEEP),
    "list": text("tokenizer.json", "[]"),
    "half": text("tokenizer.json", '{"version": "1.0"'),
    "no vocabulary": without("tokenizer.json"),
    "no config": without("tokenizer_config.json"),
    "empty vocabulary": vocabulary(vocab=[]),
    "vocabulary text": vocabulary(vocab="x"),
    "unknown": vocabulary(unk_id=10**9),
    "model": vocabulary(type="Nothing"),
    "normalizer": vocabulary(normalizer={"type": "Nope"}),
    "panic": vocabulary(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "token far away": vocabulary(
        added_tokens=[
            {"id": 10**9, "content": "zz", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ]
    ),
    "extra ids": config(extra_ids=10**9),
    "special": config(eos_token=5),
    "class": config(tokenizer_class="GPT2Tokenizer"),
    "class list": config(tokenizer_class=["T5Tokenizer"]),
}
TRANSFORMER: dict[str, Change] = {
    "deep": text("config.json", DEEP),
    "layers": config(num_layers=10_000_000),
    "layers negative": config(num_layers=-1),
    "heads": config(num_attention_heads=10**12),
    "heads true": config(num_attention_heads=True),
    "ffn": config(ffn_dim=10**15),
    "text": config(text_dim=[4096]),
    "eps": config(eps=-1.0),
    "patch": config(patch_size=DEEP[:50]),
}
CASES = [
    pytest.param(part, change, id=f"{part}: {name}")
    for part, changes in (("vae", VAE), ("text_encoder", TEXT), ("tokenizer", TOKENIZER), ("transformer", TRANSFORMER))
    for name, change in changes.items()
]


@pytest.mark.parametrize(("part", "change"), CASES)
def test_a_broken_folder_is_one_sentence_at_once(part, change, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("vae", "text_encoder", "tokenizer", "transformer"):
        if name == part:
            shutil.copytree(tiny_pipeline / name, folder / name)
        else:
            (folder / name).symlink_to(tiny_pipeline / name)
    change(folder / part)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        LOADERS[part](folder)
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 + 3 * len(str(folder)), message
    assert not (folder / part / "ran").exists()


@pytest.mark.parametrize("part", LOADERS)
def test_the_folder_before_it_is_broken_loads(part, tiny_pipeline):
    assert LOADERS[part](tiny_pipeline)


def test_a_tokenizer_with_code_beside_a_known_class_is_read_without_it(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    shutil.copytree(tiny_pipeline, tmp_path / "model")
    part = tmp_path / "model" / "tokenizer"
    own_code(part)
    config(tokenizer_class="T5Tokenizer")(part)
    want = TextCodec.load(tiny_pipeline, "cpu").count_tokens("a cat in snow")
    assert TextCodec.load(tmp_path / "model", "cpu").count_tokens("a cat in snow") == want
    assert not (part / "ran").exists()
