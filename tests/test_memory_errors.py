"""Memory that is not enough is one sentence with what helps, before or after it was tried."""

import resource
import subprocess
import sys

import pytest
import torch

from wanloom import memory
from wanloom.errors import UserError
from wanloom.memory import GIB, check_memory, enough_memory, free_bytes

HELPS = ("a smaller --height", "fewer --frames", "--precision bf16")
SENTENCE = "The memory of {} is not enough to {}. What helps, the best first: " + "; ".join(HELPS) + "."


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "the GPU (cuda)"),
        (MemoryError(), "this machine"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            "this machine",
        ),
    ],
)
def test_what_allocators_raise_is_a_sentence(error, where):
    with pytest.raises(UserError) as caught, enough_memory("decode 801 frames", HELPS):
        raise error
    assert str(caught.value) == SENTENCE.format(where, "decode 801 frames")


def test_the_host_allocator_really_says_so():
    with pytest.raises(UserError, match="The memory of this machine is not enough"), enough_memory("x", HELPS):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("decode", HELPS):
        raise RuntimeError("shapes do not fit")


def test_the_impossible_is_refused_beforehand(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 24 * GIB)
    check_memory(24 * GIB, "cpu", "decode", HELPS)
    with pytest.raises(UserError) as caught:
        check_memory(2000 * GIB, "cuda:1", "decode", HELPS)
    doing = "decode, which takes at least 2,000 GiB of 24 GiB"
    assert str(caught.value) == SENTENCE.format("the GPU (cuda:1)", doing)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    check_memory(2000 * GIB, "cpu", "decode", HELPS)


def test_free_memory_is_that_of_the_machine_and_its_limits(monkeypatch, tmp_path):
    free = free_bytes("cpu")
    assert free is not None and GIB // 16 < free < 1 << 50
    code = "from wanloom.memory import free_bytes; print(free_bytes('cpu'))"
    limit = 3 * GIB
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert 0 < int(result.stdout) < limit
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {2 * GIB}\nfile {GIB}\n")
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path if name == "/sys/fs/cgroup" else memory.Path)
    assert memory._of_cgroup() == 2 * GIB
