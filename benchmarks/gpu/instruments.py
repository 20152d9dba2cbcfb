"""How the GPU script measures: time by events, kernels by the profiler, memory by the allocator.

In: a function to call. Out: seconds of each call, and a `Line` for the table. The one decision: a line says itself
what was expected of it, what bound it must keep and what was wrong with it, so that the table and the exit code need
nothing else. On a CPU (the toy) the clock is perf_counter and the kernels are PyTorch's operators.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WARM_UP, TIMED = 3, 5
SHORTEST = 0.01  # seconds of one timed piece; shorter calls are repeated in it
MOST = 100  # repeats
# relative, against the plain model: bf16 and another order of sums; diffusers rounds the residual stream too. Loss and
# norm of random models hardly feel a missing rotation; the values of the gradient do
LOSS_BOUND, NORM_BOUND, GRADIENT_BOUND = 5e-3, 3e-2, 0.15
LONG = 30.0  # seconds of calls after which there is no more warming up
SLOW = 7.0  # seconds of a call of which three are enough


@dataclass(frozen=True)
class Line:
    """One number of the table."""

    name: str
    value: float | None  # the median; None where nothing was measured, and `note` says why
    unit: str
    seconds: Sequence[float] = ()  # of each timed call
    expect: str = ""
    at_least: float | None = None
    at_most: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # peak memory, loss, kernels ...
    problem: str = ""  # another kernel ran, or the numbers differ
    note: str = ""

    def passes(self) -> bool | None:
        """Whether the bound is kept; None without one, or without a number."""
        if self.value is None or (self.at_least is None and self.at_most is None):
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )


@dataclass(frozen=True)
class Case:
    """What is measured in one go: about so many `seconds` on an H200, compilation too."""

    name: str
    seconds: float
    run: Callable[[], Sequence[Line]]


class Bench:
    """The device, the scale, and the lines found so far (earlier calls' too), by name."""

    def __init__(self, device: torch.device, toy: bool) -> None:
        self.device, self.toy = device, toy
        self.on_gpu = device.type == "cuda"
        self.is_h200 = self.on_gpu and not toy and "H200" in torch.cuda.get_device_name(device)
        self.found: dict[str, Line] = {}

    def kernel(self, name: str) -> str:
        """The attention kernel of this name, or the only one there is on a CPU."""
        return name if self.on_gpu else "flash"

    @property
    def compile(self) -> Any:
        """Blocks are compiled on a GPU; the toy on a CPU has no time for it."""
        return "block" if self.on_gpu else "none"

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal numbers drawn on the device. (Products of zeros are faster than those of numbers.)"""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

    def wait(self) -> None:
        """Until the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Give back what the last case left behind."""
        if self.on_gpu:
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()

    def time(self, function: Callable[[], object], warm_up: int = WARM_UP) -> list[float]:
        """Seconds of each timed call."""
        began = time.perf_counter()
        taken = math.inf
        for _ in range(1 if self.toy else warm_up):
            called = time.perf_counter()
            function()
            self.wait()
            taken = time.perf_counter() - called
            if time.perf_counter() - began > LONG:
                break
        repeats = 1 if self.toy else max(1, min(MOST, math.ceil(SHORTEST / taken)))
        rounds = 1 if self.toy else 3 if taken > SLOW else TIMED
        return [self._stopwatch(function, repeats) / repeats for _ in range(rounds)]

    def _stopwatch(self, function: Callable[[], object], repeats: int) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            for _ in range(repeats):
                function()
            return time.perf_counter() - began
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(repeats):
            function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def reset_peak(self) -> None:
        """Count the peak of memory from here on."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """The most memory in use since then; None on a CPU."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.on_gpu else None

    def kernels(self, function: Callable[[], object]) -> list[str]:
        """Names of what ran on the device in one call, the longest first; operators on a CPU."""
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]) as found:
            function()
            self.wait()
        kind = DeviceType.CUDA if self.on_gpu else DeviceType.CPU
        spent: dict[str, float] = {}
        for event in found.events() or ():
            if event.device_type == kind:
                spent[event.name] = spent.get(event.name, 0) + event.time_range.elapsed_us()
        return sorted(spent, key=lambda name: -spent[name])


def attention_kinds(names: Sequence[str]) -> set[str]:
    """Which attention kernels are among these names of what ran; cuDNN's own have "flash" in their names too."""
    kinds = set()
    for name in (n.lower() for n in names):
        if "cudnn" in name and any(word in name for word in ("sdpa", "flash", "fmha", "attention")):
            kinds.add("cudnn")
        elif "fmha_cutlass" in name:
            kinds.add("efficient")
        elif any(word in name for word in ("flash_fwd", "flash_bwd", "flash_attention_for_cpu")):
            kinds.add("flash")
        elif "flex_attention" in name or "triton_tem" in name:
            kinds.add("flex")
    return kinds


def kernel_facts(names: Sequence[str]) -> dict[str, Any]:
    """What to keep of the names: those that took longest, and whose attention it was."""
    return {"attention": sorted(attention_kinds(names)), "kernels": list(names[:6])}


def kernel_problem(names: Sequence[str], wanted: set[str]) -> str:
    """What to say when other attention kernels ran than those that should have."""
    kinds = attention_kinds(names)
    if not names:
        return "the profiler saw no kernels, so it is not known which ran"
    return "" if kinds == wanted else f"attention by {sorted(kinds) or 'no known kernel'}, not {sorted(wanted)}"


def difference_problem(facts: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """What to say when loss, gradient norm or values of the gradient are not those of the plain model."""
    problems = []
    for key, bound in (("loss", LOSS_BOUND), ("grad_norm", NORM_BOUND)):
        off = abs(facts[key] / plain[key] - 1)
        if not off <= bound:
            problems.append(f"{key} {facts[key]:.6g} differs from {plain[key]:.6g} by {off:.1%}")
    for name, values in plain["gradient"].items():
        off = distance(torch.tensor(facts["gradient"][name]), torch.tensor(values))
        if not off <= GRADIENT_BOUND:
            problems.append(f"the gradient of {name} differs by {off:.1%}")
    return ", ".join(problems)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Of two tensors, relative to the second, by norm."""
    wanted = wanted.float()
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def left_out(name: str, why: str) -> list[Line]:
    """A line for what cannot be measured here."""
    return [Line(name, None, "", note=f"left out: {why}")]


def rate(name: str, amount: float, seconds: Sequence[float], unit: str = "TFLOP/s", **more: Any) -> Line:
    """A line of an amount (FLOPs, bytes) per second, in units of 10^12."""
    return Line(name, amount / statistics.median(seconds) / 1e12, unit, seconds, **more)


def taken(name: str, seconds: Sequence[float], **more: Any) -> Line:
    """A line of seconds."""
    return Line(name, statistics.median(seconds), "s", seconds, **more)


def ratio(bench: Bench, name: str, over: str, under: str, **more: Any) -> list[Line]:
    """A line of the first line's value over the second's, where both were measured."""
    a, b = bench.found.get(over), bench.found.get(under)
    if a is None or b is None or not a.value or not b.value:
        return []
    return [Line(name, a.value / b.value, "x", **more)]


def as_dict(line: Line) -> dict[str, Any]:
    """For json, what is empty left out."""
    needed = ("name", "value", "unit")
    return {key: value for key, value in asdict(line).items() if key in needed or value not in ("", None, (), {})}
