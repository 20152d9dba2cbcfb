"""Prompts to text states, on transformers' UMT5 encoder.

In: strings. Out: one `(L, text_dim)` tensor each, unpadded, the trailing `</s>` included. The one decision: every
prompt goes through the encoder alone and without padding, so its states never depend on what it is encoded with, and
a short prompt costs little. Cleaning and length are Wan's: ftfy, HTML entities twice, white space; 512 tokens.
"""

import html
import re
from pathlib import Path
from typing import Literal

import ftfy
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from wanloom.codecs.parts import Foreign, ForeignError, fill_part
from wanloom.codecs.settings import PartConfig, read_part
from wanloom.errors import UserError, cut
from wanloom.files import read_json

TIED = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor, which files have under either name or both
VOCABULARIES = ("tokenizer.json", "spiece.model")
TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")


def clean_prompt(text: str) -> str:
    """A prompt as Wan reads it: mended encoding, no HTML entities, single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class EncoderConfig(PartConfig):
    """A UMT5 encoder; the defaults are the library's."""

    vocab_size: int = Field(250_112, gt=0, le=4_000_000)
    d_model: int = Field(512, gt=0, le=32_768)
    d_kv: int = Field(64, gt=0, le=4096)
    d_ff: int = Field(1024, gt=0, le=262_144)
    num_layers: int = Field(8, gt=0, le=256)
    num_heads: int = Field(6, gt=0, le=1024)
    relative_attention_num_buckets: int = Field(32, gt=1, le=4096)
    relative_attention_max_distance: int = Field(128, gt=1, le=1_000_000)
    dropout_rate: float = Field(0.1, ge=0, lt=1)
    layer_norm_epsilon: float = Field(1e-6, gt=0, lt=1)
    feed_forward_proj: Literal["gated-gelu", "gated-silu", "relu"] = "gated-gelu"


class TokenizerConfig(PartConfig):
    """What decides how long reading a tokenizer takes; the rest is the library's."""

    extra_ids: int = Field(0, ge=0, le=1000)
    additional_special_tokens: tuple[str, ...] = Field((), max_length=1000)
    model_max_length: float = Field(512, gt=0)


class TextCodec:
    """A UMT5 encoder with its tokenizer."""

    def __init__(
        self, encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, folder: Path, device: torch.device
    ) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.folder = folder
        self.device = device

    @classmethod
    def load(
        cls, pipeline_folder: str | Path, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> "TextCodec":
        """Read the `text_encoder` and `tokenizer` folders of a pipeline.

        Raises UserError for fp16 (UMT5 overflows to zeros), and for a part that is missing, of another kind or broken.
        """
        if dtype == torch.float16:
            raise UserError("The text encoder does not work in fp16, its states overflow: use bf16 or fp32.")
        pipeline, device = Path(pipeline_folder), torch.device(device)
        folder = pipeline / "text_encoder"
        config = read_part(EncoderConfig, folder, "text encoder", "UMT5EncoderModel")
        tokenizer = load_tokenizer(pipeline / "tokenizer", config.vocab_size)
        with torch.device("meta"):
            encoder = UMT5EncoderModel(UMT5Config(**config.model_dump(mode="json")))
        fill_part(encoder, folder, "model", dtype, device, ("decoder.", "lm_head."), TIED)
        encoder.encoder.embed_tokens.weight = encoder.shared.weight
        if not encoder.shared.weight.any():
            raise UserError(f"The token embeddings of the text encoder in {folder} are all zero.")
        return cls(encoder, tokenizer, pipeline, device)

    @property
    def dim(self) -> int:
        """Size of a text state."""
        return self.encoder.config.d_model

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt before any cut, `</s>` included."""
        return len(self.tokenizer(clean_prompt(text), verbose=False)["input_ids"])

    @torch.no_grad()
    def encode(self, texts: list[str], max_length: int = 512) -> list[Tensor]:
        """States `(L_i, text_dim)` of every prompt on the CPU, in the encoder's dtype; L_i is at most `max_length`."""
        out = []
        for text in texts:
            ids = self.tokenizer(
                clean_prompt(text), truncation=True, max_length=max_length, return_tensors="pt", verbose=False
            ).input_ids.to(self.device)
            states = self.encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            if not states.isfinite().all():
                raise UserError(f"The text encoder in {self.folder} gives NaN or infinity for: {cut(text)}")
            out.append(states.cpu())
        return out


def load_tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, which gives ids below `vocabulary`. No code of the folder is run, nothing is asked.

    Raises UserError when it is missing, of another kind or broken.
    """
    read_part(TokenizerConfig, folder, "tokenizer", *TOKENIZERS, name="tokenizer_config.json")
    if not any((folder / name).is_file() for name in VOCABULARIES):  # the library would make an empty one
        raise UserError(f"The tokenizer in {folder} has neither of {' and '.join(VOCABULARIES)}.")
    for other in folder.glob("*.json"):  # the library reads several of them, and a deep one would exhaust its stack
        read_json(other)
    try:
        with Foreign():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
            size = max(tokenizer.get_vocab().values()) + 1
    except ForeignError as error:
        raise UserError(f"The tokenizer in {folder} cannot be read: {error}.") from error
    if size > vocabulary:
        raise UserError(
            f"The tokenizer in {folder} has ids up to {size - 1}, the text encoder beside it knows {vocabulary}: they "
            "do not belong together."
        )
    return tokenizer
