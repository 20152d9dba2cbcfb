"""Memory of the host and of GPUs: how much is free, and one sentence when it is not enough.

In: what is done, a lower bound of the bytes it takes, and the settings that make it less, the best first. Out: a
UserError. The one decision: what can be known beforehand is refused before anything is loaded, and what the allocators
raise later is the same sentence; the settings are the caller's, who knows what was asked for.
"""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from wanloom.errors import UserError

GIB = 1 << 30
OF_HOST = ("can't allocate memory", "not enough memory")  # how torch's allocator of host memory says it


@contextmanager
def enough_memory(doing: str, helps: Sequence[str]) -> Iterator[None]:
    """Raises UserError with what helps when memory runs out inside: `doing` goes after "not enough to"."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        where = out_of(error)
        if where is None:
            raise
        raise UserError(short_of(where, doing, helps)) from error


def check_memory(needed: int, device: str, doing: str, helps: Sequence[str]) -> None:
    """Raises UserError when `needed` bytes, which it takes at least, are more than a device has free."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise UserError(short_of(device, f"{doing}, which takes at least {in_gib(needed)} of {in_gib(free)}", helps))


def short_of(where: str, doing: str, helps: Sequence[str]) -> str:
    """The sentence."""
    place = "this machine" if where == "cpu" else f"the GPU ({where})"
    return f"The memory of {place} is not enough to {doing}. What helps, the best first: {'; '.join(helps)}."


def out_of(error: MemoryError | RuntimeError) -> str | None:
    """Which memory an error means, `cpu` or `cuda`; None when it is another error."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; it is a RuntimeError
        return "cuda"
    return "cpu" if isinstance(error, MemoryError) or any(words in str(error) for words in OF_HOST) else None


def in_gib(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / GIB:,.0f} GiB" if count >= 10 * GIB else f"{count / GIB:.1f} GiB"


def free_bytes(device: str) -> int | None:
    """What can still be had on a device such as `cpu` or `cuda:1`; None where the system does not tell."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return min((size for size in (_of_system(), _of_cgroup(), _of_process()) if size is not None), default=None)


def _of_system() -> int | None:
    found = _numbers(Path("/proc/meminfo"))
    return found["MemAvailable"] * 1024 if "MemAvailable" in found else None


def _of_cgroup() -> int | None:
    """What a container may still take; files that can be given back count as free, as the system counts them."""
    folder = Path("/sys/fs/cgroup")
    try:
        most = (folder / "memory.max").read_text().strip()
        now = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    cached = _numbers(folder / "memory.stat").get("file", 0)
    return max(0, int(most) - now + cached) if most.isdigit() else None


def _of_process() -> int | None:
    """What `ulimit -v` leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _numbers(Path("/proc/self/status")).get("VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else max(0, limit - used * 1024)


def _numbers(path: Path) -> dict[str, int]:
    """Lines such as `MemFree: 12 kB`; empty where there is no such file."""
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
