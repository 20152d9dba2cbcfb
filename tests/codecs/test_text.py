"""The text codec against transformers and diffusers called directly."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from wanloom.codecs.text import TIED, TextCodec, clean_prompt
from wanloom.errors import UserError

PROMPTS = ["A red circle moves to the left.", "", "The cat  runs\n through snow, and the dog   too &amp;amp; so on"]


@pytest.fixture(scope="module")
def codec(tiny_pipeline: Path) -> TextCodec:
    return TextCodec.load(tiny_pipeline, "cpu")


def test_states_are_those_of_the_wan_pipeline(codec: TextCodec, tiny_pipeline: Path) -> None:
    pipeline = WanPipeline.from_pretrained(tiny_pipeline, transformer=None, vae=None)
    states = codec.encode(PROMPTS)
    for prompt, mine in zip(PROMPTS, states, strict=True):
        padded, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        torch.testing.assert_close(mine, padded[0, : len(mine)], rtol=1e-4, atol=1e-5)
        assert not padded[0, len(mine) :].any()  # nothing of the prompt was left out
        assert mine.shape == (codec.count_tokens(prompt), codec.dim)
    assert len(states[1]) == 1  # an empty prompt is its </s>
    assert not states[0].requires_grad


def test_a_long_prompt_is_cut_and_keeps_its_end_mark(codec: TextCodec) -> None:
    prompt = "A cat runs through snow. " * 90
    assert codec.count_tokens(prompt) > 512
    (states,) = codec.encode([prompt])
    assert len(states) == 512
    ids = codec.tokenizer(clean_prompt(prompt), truncation=True, max_length=512).input_ids
    assert ids[-1] == codec.tokenizer.eos_token_id
    assert len(codec.encode([prompt], max_length=20)[0]) == 20


def test_states_do_not_depend_on_the_other_prompts(codec: TextCodec) -> None:
    together = codec.encode(PROMPTS)
    for prompt, states in zip(PROMPTS, together, strict=True):
        assert torch.equal(codec.encode([prompt])[0], states)


def test_cleaning() -> None:
    assert clean_prompt(" caf&amp;eacute;\t\u201cquoted\u201d  text ") == 'caf\u00e9 "quoted" text'
    assert clean_prompt("sch\u00c3\u00b6n") == "sch\u00f6n"


def test_fp16_and_a_missing_folder_are_errors(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16"):
        TextCodec.load(tiny_pipeline, "cpu", torch.float16)
    with pytest.raises(UserError, match="no text encoder"):
        TextCodec.load(tmp_path, "cpu")


def test_zero_embeddings_of_a_checkpoint_are_an_error(tiny_pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pipeline, tmp_path / "p")
    file = tmp_path / "p" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    name = "shared.weight" if "shared.weight" in state else "encoder.embed_tokens.weight"
    state[name] = torch.zeros_like(state[name])
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="all zero"):
        TextCodec.load(tmp_path / "p", "cpu")


def test_tables_of_one_name_and_another_must_be_one(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Files have the embeddings once or twice; two that differ would give each prompt the states of some other one."""
    shutil.copytree(tiny_pipeline, tmp_path / "p")
    file = tmp_path / "p" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    table = state.pop(TIED[1], state.get(TIED[0]))
    save_file({**state, TIED[0]: table, TIED[1]: table.clone()}, file, metadata={"format": "pt"})
    assert TextCodec.load(tmp_path / "p", "cpu").encoder.encoder.embed_tokens.weight.equal(table)
    save_file({**state, TIED[0]: table, TIED[1]: table + 1}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="are one tensor of the model, but differ"):
        TextCodec.load(tmp_path / "p", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_is_that_of_the_library(tiny_pipeline: Path, dtype: torch.dtype) -> None:
    theirs = UMT5EncoderModel.from_pretrained(tiny_pipeline / "text_encoder", dtype=dtype).eval()
    codec = TextCodec.load(tiny_pipeline, "cpu", dtype)
    assert codec.encoder.config._attn_implementation == theirs.config._attn_implementation
    for (name, ours), (_, other) in zip(codec.encoder.named_parameters(), theirs.named_parameters(), strict=True):
        assert ours.dtype == other.dtype and torch.equal(ours, other), name
    ids = codec.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        want = theirs(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    assert torch.equal(codec.encode(PROMPTS[:1])[0], want)


def test_a_checkpoint_that_stores_only_shared_loads(tiny_pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pipeline, tmp_path / "p")
    file = tmp_path / "p" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    table = state.pop("shared.weight", None)
    other = state.pop("encoder.embed_tokens.weight", None)
    state["shared.weight"] = other if table is None else table
    save_file(state, file, metadata={"format": "pt"})
    codec = TextCodec.load(tmp_path / "p", "cpu")
    assert torch.equal(codec.encode(PROMPTS)[0], TextCodec.load(tiny_pipeline, "cpu").encode(PROMPTS)[0])
