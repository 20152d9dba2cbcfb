"""Prompts to text states, on transformers' UMT5 encoder.

In: strings. Out: one `(L, text_dim)` tensor each, unpadded, the trailing `</s>` included. The one decision: every
prompt goes through the encoder alone and without padding, so its states never depend on what it is encoded with, and
a short prompt costs little. Cleaning and length are Wan's: ftfy, HTML entities twice, white space; 512 tokens.
"""

import html
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from wanloom.codecs.identity import text_identity
from wanloom.config import UserError


def clean_prompt(text: str) -> str:
    """A prompt as Wan reads it: mended encoding, no HTML entities, single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


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

        Raises UserError for fp16 (UMT5 overflows to zeros), missing files or tensors, and embeddings that are zero.
        """
        if dtype == torch.float16:
            raise UserError("The text encoder does not work in fp16, its states overflow: use bf16 or fp32.")
        pipeline = Path(pipeline_folder)
        folder = pipeline / "text_encoder"
        for part in (folder / "config.json", pipeline / "tokenizer"):
            if not part.exists():
                raise UserError(f"There is no text encoder in '{pipeline}': {part} is missing.")
        transformers_logging.disable_progress_bar()  # it would tear our own
        try:
            tokenizer = AutoTokenizer.from_pretrained(pipeline / "tokenizer", local_files_only=True)
            loaded: Any = UMT5EncoderModel.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"The text encoder in {pipeline} cannot be loaded: {error}") from error
        encoder, info = loaded
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise UserError(f"The text encoder in {folder} lacks {len(missing)} tensors: {', '.join(missing)}.")
        check_embeddings(encoder)
        device = torch.device(device)
        return cls(encoder.to(device).eval().requires_grad_(False), tokenizer, pipeline, device)

    @property
    def dim(self) -> int:
        """Size of a text state."""
        return self.encoder.config.d_model

    @cached_property
    def identity(self) -> str:
        """Fingerprint of the encoder and the tokenizer."""
        return text_identity(self.folder)

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
            out.append(states.cpu())
        return out


def check_embeddings(encoder: UMT5EncoderModel) -> None:
    """Raise UserError when the token embeddings were not loaded.

    The checkpoints store the table once, as `shared.weight`. Some transformers 5 versions do not tie it to
    `encoder.embed_tokens`, which then stays zero or random, and every prompt gets the same or meaningless states
    (huggingface/transformers issue 43992).
    """
    used = encoder.encoder.embed_tokens.weight
    reason = ""
    if used.is_meta or not torch.isfinite(used).all():
        reason = "are not loaded"
    elif not used.any():
        reason = "are all zero"
    elif used.data_ptr() != encoder.shared.weight.data_ptr() and not torch.equal(used, encoder.shared.weight):
        reason = "are not those of the checkpoint"
    if reason:
        raise UserError(
            f"The text encoder's token embeddings {reason}: this version of transformers does not tie them to "
            "shared.weight. Install transformers 5.2 or newer, or save the encoder again with its embeddings."
        )
