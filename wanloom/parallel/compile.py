"""Compilation: every block through torch.compile, one graph for packs of any lengths.

In: a WanDiT and what to compile. Out: the same model, the forward of its blocks changed in place. The one decision: a
block is one whole graph (what would break it is an error) and all its sizes are symbols from the start, so that packs
of other lengths run the same code. FSDP's hooks run outside of it, recomputation inside. PyTorch has no symbol for a
size of 1: a pack of one sample is a graph of its own, and so is a pass without gradients. More graphs than PyTorch's
limit is an error, as for every whole graph, and no fallback.
"""

import torch

from wanloom.errors import UserError
from wanloom.model.dit import Block, WanDiT
from wanloom.parallel.settings import Compile
from wanloom.torch_private import find_cpp_compiler, has_triton, symbols


def apply_compile(model: WanDiT, compile: Compile, device: torch.device) -> None:
    """Compile the blocks at their first use, in place. Raises UserError when there is no compiler."""
    if compile == "none":
        return
    check_compiler(device)
    symbols.use_duck_shape = False  # else sizes that agree in the first pack would have to agree in all
    for block in model.blocks.values():
        assert isinstance(block, Block)
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Raises UserError when there is no compiler for the device."""
    if device.type == "cuda":
        if not has_triton():
            raise UserError(
                "compute.compile=block needs Triton: install it (pip install triton), or give compute.compile=none."
            )
        return
    try:
        find_cpp_compiler()
    except RuntimeError as error:
        raise UserError(
            "compute.compile=block needs a C++ compiler: install g++, or give compute.compile=none."
        ) from error
