"""The cores there are, and one thread on the CPU for what more threads would make slower or other.

In: a block. Out: the block, run by the calling thread alone. The one decision: the number of threads of before comes
back however the block ends. Copies of many tensors become slower: memory bounds a copy, so more threads gain little,
but they meet after every tensor, and where the system runs two of them on one core each meeting takes a turn of its
scheduler: 4 ms a tensor were measured, eight times the copy. A model's results become other: it rounds otherwise with
another number of threads.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def count_cores() -> int:
    """How many cores this process may use, which may be fewer than the machine has; asked before torch is imported."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Operators of torch on the CPU by the calling thread alone."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
