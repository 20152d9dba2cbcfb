"""How peak memory is measured, and that both sides take the same step."""

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import c16_memory as module
from wanloom.parallel import compile as compile_module

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the compiler warns of what it does itself, and diffusers of a norm
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux keeps the peak of a process there"),
]
MIB = 2**20


def test_the_peak_is_of_the_function_alone():
    def use(mib: int) -> int:
        return len(b"x" * (mib * MIB))

    use(256)  # what was before does not count
    before, peak, value = module.peak_of(partial(use, 64))
    assert value == 64 * MIB
    assert 60 * MIB <= peak - before < 128 * MIB  # the kernel counts pages in batches, thread by thread


def test_the_rows_are_those_of_the_claim(monkeypatch):
    """All in this process, the compiler's graphs run as they are; losses and gradients of all sides are compared."""
    monkeypatch.setattr(module, "in_a_fresh_process", module.measure_side)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    with torch.random.fork_rng(), compile_module.symbols.patch(use_duck_shape=True):
        rows = module.measure(toy=True)
    torch._dynamo.reset()
    assert [row.target is not None for row in rows] == [True, False, False]
    assert all("every gradient" in row.checked and "gradients alone" in row.limit for row in rows)
    assert rows[0].target == module.TARGET * rows[0].theirs[0]
