"""What `wanloom generate` is asked for, complete and checked before anything is computed.

In: the arguments. Out: a `Plan`. The one decision: defaults belong to the model that is named, every mistake that can
be seen before the weights are read is found here, and several processes must have come to the same plan.
"""

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wanloom.config import UserError, build_config

if TYPE_CHECKING:  # torch is imported only when the command runs
    import torch

    from wanloom.model.settings import DiTConfig
    from wanloom.parallel.mesh import Layout
    from wanloom.recipes.trained import Trained
    from wanloom.sample.generate import GenerateConfig
    from wanloom.sample.prompts import Job, PromptLine


class Sizes(NamedTuple):
    """What a model makes when nothing else is asked for."""

    height: int
    width: int
    frames: int
    shift: float | None  # None is left to GenerateConfig


# by the name of the config in model/dit.py: tiny as the demo trains it, the others as Wan's own code has them
DEFAULTS = {
    "tiny": Sizes(64, 64, 17, 3.0),
    "wan2.1-t2v-1.3b": Sizes(480, 832, 81, 5.0),
    "wan2.1-t2v-14b": Sizes(720, 1280, 81, 5.0),
}
PARTS = ("text_encoder", "tokenizer", "vae")


class Plan(NamedTuple):
    """All that is decided before anything is computed."""

    pipeline: Path
    model_name: str
    trained: "Trained | None"
    ema: bool
    model_config: "DiTConfig"
    transformer: str  # fingerprint of its weights
    config: "GenerateConfig"
    jobs: "list[Job]"
    fps: int
    layout: "Layout"
    device: "torch.device"
    precision: str
    kernel: str
    out: Path

    @property
    def prompts(self) -> list[str]:
        """Every different prompt, negative ones included."""
        return list(dict.fromkeys(text for job in self.jobs for text in (job.prompt, job.negative)))

    @property
    def where(self) -> str:
        """What computes, in words."""
        world = self.layout.world
        return str(self.device) if world == 1 else f"{world} x {self.device.type} ({self.layout.describe()})"

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def build_plan(arguments: argparse.Namespace) -> Plan:
    """Read the prompts and fill in the defaults. Raises UserError for what can be seen to be wrong."""
    import torch

    from wanloom.assets import find_pipeline
    from wanloom.codecs.identity import folder_identity
    from wanloom.dist import pick_device
    from wanloom.model.kernels import resolve_kernel
    from wanloom.model.weights import read_config
    from wanloom.recipes.trained import open_trained
    from wanloom.sample.generate import latents_shape
    from wanloom.sample.prompts import PromptLine, build_jobs, read_prompts
    from wanloom.sample.solvers import build_solver

    check_arguments(arguments)
    trained = open_trained(arguments.checkpoint, arguments.ema) if arguments.checkpoint else None
    name = arguments.model or (trained.model if trained else "tiny")
    pipeline = find_pipeline(name, PARTS if trained else (*PARTS, "transformer"))
    model_config = trained.config if trained else read_config(pipeline)
    sizes = fill_sizes(arguments, model_config, name)
    config = read_config_of(arguments, sizes.shift)
    lines = read_prompts(arguments.prompts) if arguments.prompts else [PromptLine(prompt=p) for p in arguments.prompt]
    check_negative(arguments, config, lines)
    jobs = build_jobs(lines, arguments.negative or "", arguments.seed, sizes.height, sizes.width, sizes.frames)
    for job in jobs:
        latents_shape(model_config.in_channels, job.frames, job.height, job.width)
    build_solver(config.solver, config.steps, config.shift)
    device = pick_device(arguments.device)
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    return Plan(
        pipeline=pipeline,
        model_name=str(Path(name).resolve()) if name != "tiny" and Path(name).exists() else name,
        trained=trained,
        ema=arguments.ema,
        model_config=model_config,
        transformer=trained.identity if trained else folder_identity(pipeline / "transformer"),
        config=config,
        jobs=jobs,
        fps=arguments.fps,
        layout=build_layout(arguments, config.guidance, model_config),
        device=device,
        precision=precision,
        kernel=resolve_kernel(arguments.kernel, device.type, torch.bfloat16 if precision == "bf16" else torch.float32),
        out=arguments.out,
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    from wanloom.dist import world_size

    if arguments.ema and not arguments.checkpoint:
        raise UserError("--ema asks for the averaged weights of a run: give the run with --checkpoint.")
    if arguments.fps < 1:
        raise UserError(f"--fps is {arguments.fps}, it must be at least 1.")
    if world_size() > 1 and ":" in (arguments.device or ""):
        raise UserError(f"--device {arguments.device} is one device, and each process takes its own: leave it out.")


def build_layout(arguments: argparse.Namespace, guidance: float, model: "DiTConfig") -> "Layout":
    """How the processes share the work: the branches are data ranks, and what is left shares the tokens."""
    from wanloom.dist import world_size
    from wanloom.parallel.mesh import resolve_layout
    from wanloom.parallel.settings import ParallelConfig

    world, tp, branches = world_size(), arguments.tp, arguments.cfg_parallel
    if tp < 1:
        raise UserError(f"--tp is {tp}, it must be at least 1.")
    if world % tp:
        raise UserError(f"--tp {tp} does not divide the number of processes, which is {world}: --nproc changes it.")
    if branches == 2 and guidance == 1:
        raise UserError(
            "--cfg-parallel 2 has no effect with --guidance 1, which has one branch: leave one of them out."
        )
    ranks = world // tp
    if branches is None:
        branches = 1 if guidance == 1 or ranks % 2 else 2
    if ranks % branches:
        raise UserError(
            f"--cfg-parallel 2 needs two groups of equal size, which {world} processes with --tp {tp} are not: use "
            "another number of processes, or --cfg-parallel 1."
        )
    config = ParallelConfig(dp_shard=branches, cp=ranks // branches, tp=tp)
    try:
        return resolve_layout(config, world, model)
    except UserError as error:
        raise UserError(str(error).replace("parallel.tp=", "--tp ")) from error


def check_alike(plan: Plan) -> None:
    """Raises UserError unless all processes are about to make the same: each has read the files by itself."""
    from wanloom.dist import gather

    own = {
        "prompts": hashlib.sha256(repr(plan.jobs).encode()).hexdigest(),
        "weights of the transformer": plan.transformer,
        "devices": plan.device.type,
        "precisions": plan.precision,
        "kernels": plan.kernel,
    }
    for number, other in enumerate(found := gather(own)):
        differs = [name for name in own if other[name] != found[0][name]]
        if differs:
            raise UserError(
                f"Rank {number} would make something else than rank 0, its {' and '.join(differs)} differ: give all "
                "processes the same files, and one checkpoint by its own folder while its run goes on."
            )


def read_config_of(arguments: argparse.Namespace, shift: float | None) -> "GenerateConfig":
    """How to sample; what was not given keeps the default of the config."""
    from wanloom.sample.generate import GenerateConfig

    asked = {name: getattr(arguments, name) for name in ("solver", "steps", "guidance")} | {"shift": shift}
    return build_config(GenerateConfig, {name: value for name, value in asked.items() if value is not None})


def check_negative(arguments: argparse.Namespace, config: "GenerateConfig", lines: "list[PromptLine]") -> None:
    """Raises UserError when there is a negative prompt that nothing would read."""
    if config.guidance != 1:
        return
    if arguments.negative is not None:
        raise UserError("--negative has no effect with --guidance 1: leave one of them out.")
    given = [line.prompt for line in lines if line.negative is not None]
    if given:
        raise UserError(
            f"The `negative` of the prompt '{given[0][:60]}' has no effect with --guidance 1: leave one of them out."
        )


def fill_sizes(arguments: argparse.Namespace, model_config: "DiTConfig", name: str) -> Sizes:
    """Asked sizes, completed by the defaults of the model. Raises UserError where a model has none."""
    from wanloom.model.settings import CONFIGS

    known = next((DEFAULTS.get(key) for key, config in CONFIGS.items() if config == model_config), None)
    asked = (arguments.height, arguments.width, arguments.frames)
    if known is None and None in asked:
        raise UserError(
            f"'{name}' is of no known size, so nothing can be assumed: give --height, --width and --frames."
        )
    height, width, frames, shift = known or Sizes(*asked, None)
    if (arguments.height is None) != (arguments.width is None):
        raise UserError("--height and --width belong together: give both or neither.")
    return Sizes(
        height if arguments.height is None else arguments.height,
        width if arguments.width is None else arguments.width,
        frames if arguments.frames is None else arguments.frames,
        shift if arguments.shift is None else arguments.shift,
    )
