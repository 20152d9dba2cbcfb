"""diffusers' transformer for what wanloom's is compared with.

In: a config of ours. Out: a WanTransformer3DModel. The one decision: its config and its dtypes are what its own loading
makes of the published files, and nothing of diffusers is written down a second time.
"""

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from wanloom.formats.published import config_json
from wanloom.model.settings import DiTConfig


def build_diffusers(config: DiTConfig) -> WanTransformer3DModel:
    """Untrained, in fp32, on torch's default device. Raises UserError for text slots other than 512."""
    model = WanTransformer3DModel.from_config(config_json(config, "diffusers"))
    assert isinstance(model, WanTransformer3DModel)  # its annotation says a tuple too
    return model


def cast_as_loaded(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the model, or a block of it, as `from_pretrained(torch_dtype=dtype)` does: some parameters stay in fp32."""
    for name, param in model.named_parameters():
        if not any(part in name for part in WanTransformer3DModel._keep_in_fp32_modules):
            param.data = param.data.to(dtype)
