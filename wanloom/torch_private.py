"""What is used of torch that it does not promise, and why: where a new torch differs, this is the file to change.

A test holds the signatures, and a house test that no other file has a private name of torch.
"""

import torch
from torch.distributed import ProcessGroup, Store, distributed_c10d  # pyright: ignore[reportPrivateImportUsage]
from torch.fx.experimental import _config as symbols
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils._triton import has_triton

# `symbols.use_duck_shape`: whether sizes that agree are one symbol. Dispatch modes and trees: what selective
# recomputation of torch keeps stays on the device. Triton: that it is missing is said before the first step
__all__ = ["TorchDispatchMode", "has_triton", "symbols", "tree_map_only"]

# scaled_dot_product_attention hides the log-sum-exp, without which keys cannot be attended to in parts
aten = torch.ops.aten
flash_cpu = aten._scaled_dot_product_flash_attention_for_cpu
flash_cpu_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
cudnn = aten._scaled_dot_product_cudnn_attention
cudnn_backward = aten._scaled_dot_product_cudnn_attention_backward
flash = aten._scaled_dot_product_flash_attention
flash_backward = aten._scaled_dot_product_flash_attention_backward
efficient = aten._scaled_dot_product_efficient_attention
efficient_backward = aten._scaled_dot_product_efficient_attention_backward


def default_store() -> Store:
    """The store of the run; whoever started it has made it, torchrun too."""
    return distributed_c10d._get_default_store()


def resolve_group(name: str) -> ProcessGroup:
    """Operators take names: a compiled graph can hold them."""
    return distributed_c10d._resolve_process_group(name)  # pyright: ignore


def has_bf16_instructions() -> bool:
    """Whether the CPU computes in bf16; the public torch.cpu.get_capabilities is not documented for torch 2.11."""
    return torch.cpu._is_avx512_bf16_supported()


def find_cpp_compiler() -> str:
    """The C++ compiler that torch.compile would take: it says that there is none only in the first step.

    Raises RuntimeError when there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # 300 modules, for compute.compile=block alone

    return get_cpp_compiler()
