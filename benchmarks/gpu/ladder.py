"""P2, P5 and P7: a block of the model, from what a plain PyTorch trainer does to what wanloom does, step by step.

Rows: A eager, full recomputation: diffusers' model with weights in bf16 and PyTorch's choice of attention where
diffusers is here, else ours with `flash`; C ours compiled with `flash`, full recomputation; D the same with `cudnn`; E
attention kept; F all matrix products kept too; G nothing recomputed. Ours has fp32 weights under autocast, as in
training. Every row has the same weights and data; its loss, the norm of its gradient and values of the gradients of
twelve matrices are compared with those of row A, within 0.5%, 3% and 15% (bf16; a missing rotation is 70%). One pass
forward and backward, without an optimizer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from benchmarks.gpu.instruments import (
    Bench,
    Case,
    Line,
    difference_problem,
    kernel_problem,
    left_out,
    rate,
    ratio,
)
from benchmarks.gpu.models import (
    DiffusersModel,
    build_model,
    config_of,
    draw_input,
    grid_of,
    has,
    measure_step,
    size_of,
)
from wanloom.model.flops import train_flops


class Row(NamedTuple):
    """How the model runs."""

    kernel: str
    recompute: str
    compiles: bool


class Shape(NamedTuple):
    """What is run."""

    model: str
    layers: int
    tokens: int


ROWS = {
    "A": Row("flash", "full", False),
    "C": Row("flash", "full", True),
    "D": Row("cudnn", "full", True),
    "E": Row("cudnn", "attention", True),
    "F": Row("cudnn", "cheap", True),
    "G": Row("cudnn", "none", True),
}
SHAPES = (Shape("14b", 4, 37440), Shape("1.3b", 30, 32760), Shape("14b", 4, 8190), Shape("14b", 4, 32760))
LEFT_OUT = {SHAPES[3]: "CDF"}  # they lie where those of the first shape do
EXPECT = {  # TFLOP/s
    SHAPES[0]: {"A": 263, "C": 296, "D": 411, "E": 472, "F": 522, "G": 527},
    SHAPES[1]: {"A": 227, "C": 262, "D": 381, "E": 450, "F": 479, "G": 486},
    SHAPES[2]: {"A": 301, "C": 386, "D": 454, "E": 483, "F": 584, "G": 594},
    SHAPES[3]: {"A": 267, "C": 303, "D": 414, "E": 473, "F": 528, "G": 533},
}
GATES = {(SHAPES[0], "E"): 425, (SHAPES[0], "G"): 470}
GAINS = {SHAPES[0]: 1.6, SHAPES[1]: 1.8}  # A to E
FP8_GATES = {8190: (1.10, "1.23"), 32760: (1.05, "1.12")}
SPREAD = 1.03


def name_of(shape: Shape, row: str) -> str:
    return f"P2 {shape.model} x{shape.layers} {shape.tokens} {row}"


def cost(bench: Bench, shape: Shape, row: str) -> float:
    """Seconds on an H200: eight passes, and compilation; a width's graphs are on the disk after its first shape."""
    flops = train_flops(config_of(bench, shape.model, shape.layers), shape.tokens)
    overhead = 5 if not ROWS[row].compiles else 20 if shape in SHAPES[:2] else 8
    return 8 * flops / 1e12 / EXPECT[shape][row] + overhead


def cases(bench: Bench) -> Iterator[Case]:
    """P2."""
    for shape in SHAPES[:1] if bench.toy else SHAPES:
        for row in (row for row in ROWS if row not in LEFT_OUT.get(shape, "")):
            run = partial(climb, bench, shape, row, name_of(shape, row))
            yield Case(name_of(shape, row), cost(bench, shape, row), run)


def ratios(bench: Bench) -> list[Line]:
    """Each row over row A."""
    out = []
    for shape in SHAPES:
        expect = EXPECT[shape]
        for row in "CDEFG":
            out += ratio(
                bench,
                f"{name_of(shape, row)} / A",
                name_of(shape, row),
                name_of(shape, "A"),
                at_least=GAINS.get(shape) if row == "E" else None,
                expect=f"{expect[row] / expect['A']:.2f}",
            )
    return out


def build(bench: Bench, shape: Shape, row: str) -> tuple[nn.Module, set[str] | None]:
    """The model of a row, and the attention kernels that must run (None: whatever PyTorch takes)."""
    config, (kernel, recompute, compiles) = config_of(bench, shape.model, shape.layers), ROWS[row]
    if row == "A" and has("diffusers"):
        return DiffusersModel(bench, build_model(bench, config, kernel), recompute=True), None
    options: dict[str, Any] = {"recompute": recompute, "compile": bench.compile if compiles else "none"}
    model = build_model(bench, config, kernel, **options)
    # the folded text key has a bias, which one kernel alone takes
    return model, {bench.kernel(kernel), bench.kernel("efficient")}


def climb(bench: Bench, shape: Shape, row: str, name: str) -> Sequence[Line]:
    """One row of one shape."""
    config = config_of(bench, shape.model, shape.layers)
    model, wanted = build(bench, shape, row)
    data = draw_input(bench, config, [grid_of(bench, shape.tokens)])
    found, seconds, names = measure_step(bench, model, [data])
    problems = [kernel_problem(names, wanted)] if wanted is not None else []
    others = [bench.found[other] for other in (name_of(shape, r) for r in ROWS) if other in bench.found]
    if plain := next((other for other in others if other.value), None):  # row A, or the first that ran
        problems.append(difference_problem(found, plain.facts))
    flops = train_flops(config, size_of(bench, shape.tokens))
    return [
        rate(
            name,
            flops,
            seconds,
            expect=f"{EXPECT[shape][row]}",
            at_least=GATES.get((shape, row)) if name == name_of(shape, row) else None,
            facts=found | {"by": type(model).__name__},
            problem=", ".join(filter(None, problems)),
            note="wanloom's own model, eager: diffusers is not here" if row == "A" and wanted else "",
        )
    ]


def fp8_cases(bench: Bench) -> Iterator[Case]:
    """P5: row G with the Linears of the blocks in fp8, over row G. (Row F would not know what to keep of them.)"""
    for tokens in FP8_GATES:
        yield Case(f"P5 fp8 {tokens}", 40 if has("torchao") else 0, partial(fp8, bench, Shape("14b", 4, tokens)))


def fp8_ratios(bench: Bench) -> list[Line]:
    """Over bf16."""
    out = []
    for tokens, (gate, expect) in FP8_GATES.items():
        names = f"P5 fp8 {tokens}", name_of(Shape("14b", 4, tokens), "G")
        out += ratio(bench, f"P5 fp8 {tokens} / bf16", *names, at_least=gate, expect=expect)
    return out


def fp8(bench: Bench, shape: Shape) -> Sequence[Line]:
    """torchao's scaling row by row."""
    name = f"P5 fp8 {shape.tokens}"
    if not has("torchao"):
        return left_out(name, "torchao is not here")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyright: ignore[reportMissingImports]

    from wanloom.parallel.compile import apply_compile

    config = config_of(bench, shape.model, shape.layers)
    model, data = build_model(bench, config, "cudnn"), draw_input(bench, config, [grid_of(bench, shape.tokens)])
    recipe = replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True)  # 8190 is no multiple of 16
    convert_to_float8_training(model.blocks, config=recipe)
    apply_compile(model, bench.compile, bench.device)
    found, seconds, _ = measure_step(bench, model, [data])
    return [rate(name, train_flops(config, size_of(bench, shape.tokens)), seconds, facts=found)]


def again_cases(bench: Bench) -> Iterator[Case]:
    """P7: row E once more, in its own time, for the spread."""
    shape = SHAPES[0]
    yield Case("P7 row E again", cost(bench, shape, "E") - 12, partial(climb, bench, shape, "E", "P7 row E again"))


def again_ratios(bench: Bench) -> list[Line]:
    """How far the repeats are apart."""
    out = []
    for name, first, second in (
        ("P7 spread of row E", name_of(SHAPES[0], "E"), "P7 row E again"),
        ("P7 spread of cudnn", "P1 14b 37440 cudnn both", "P7 14b 37440 cudnn both"),
    ):
        found = ratio(bench, name, first, second)
        out += [Line(name, max(x, 1 / x), "x", at_most=SPREAD) for x in (line.value for line in found) if x]
    return out
