"""What `wanloom generate` is asked for, complete and checked before anything is computed.

In: the arguments. Out: a `Plan`. The one decision: defaults belong to the model that is named, every mistake that can
be seen before the weights are read is found here, and several processes must have come to the same plan.
"""

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wanloom.config import build_config, expand_home
from wanloom.devices import check_device_name
from wanloom.errors import UserError, cut
from wanloom.formats.pipeline import check_name, find_pipeline, full_name
from wanloom.memory import check_memory
from wanloom.model.settings import check_kernel_name
from wanloom.runs.found import check_weights, is_published
from wanloom.terminal import note

if TYPE_CHECKING:  # torch is imported only when the command runs
    import torch

    from wanloom.model.settings import DiTConfig
    from wanloom.parallel.mesh import Layout
    from wanloom.runs.trained import Weights
    from wanloom.sample.prompts import Job, PromptLine
    from wanloom.sample.settings import Defaults, GenerateConfig

FPS = 16  # of the file, unless --fps says another rate
PARTS = ("text_encoder", "tokenizer", "vae")


class Plan(NamedTuple):
    """All that is decided before anything is computed."""

    pipeline: Path
    model_name: str
    checkpoint: Path | None  # whose weights they are, where they are not those of the pipeline
    weights: "Weights"
    ema: bool
    config: "GenerateConfig"
    jobs: "list[Job]"
    fps: int
    layout: "Layout"
    device: "torch.device"
    precision: str
    kernel: str
    out: Path

    @property
    def model_config(self) -> "DiTConfig":
        return self.weights.config

    @property
    def prompts(self) -> list[str]:
        """Every different prompt that is read, negative ones included where there is guidance."""
        own = dict.fromkeys(job.prompt for job in self.jobs)
        return list(own if self.config.guidance == 1 else own | dict.fromkeys(job.negative for job in self.jobs))

    @property
    def where(self) -> str:
        """What computes, in words."""
        world = self.layout.world
        return str(self.device) if world == 1 else f"{world} x {self.device.type} ({self.layout.describe()})"

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def check_words(arguments: argparse.Namespace) -> "list[PromptLine]":
    """The prompts. Raises UserError for what is wrong by the words alone: told at once, before torch is imported."""
    from wanloom.sample.prompts import MAX_SEED, PromptLine, read_prompts
    from wanloom.sample.settings import Defaults, check_frames, check_side

    if arguments.ema and not arguments.checkpoint:
        raise UserError("--ema asks for the averaged weights of a run: give the run with --checkpoint.")
    if arguments.fps < 1:
        raise UserError(f"--fps is {arguments.fps}, it must be at least 1.")
    if not 0 <= arguments.seed < MAX_SEED:
        raise UserError(f"--seed is {arguments.seed}, it must be at least 0 and below 2^63.")
    if not arguments.out.strip():
        raise UserError("--out is empty: give the folder for the videos, or leave it out for `generated`.")
    if (arguments.height is None) != (arguments.width is None):
        raise UserError("--height and --width belong together: give both or neither.")
    check_names(arguments)
    config = read_config_of(arguments, Defaults.model_construct(**vars(arguments)))
    lines = read_prompts(arguments.prompts) if arguments.prompts else [PromptLine(prompt=p) for p in arguments.prompt]
    check_negative(arguments, config, lines)
    for line in (arguments, *lines):
        try:
            for name in ("height", "width"):
                if (side := getattr(line, name)) is not None:
                    check_side(name, side)
            if line.frames is not None:
                check_frames(line.frames)
        except UserError as error:
            raise UserError(f"{line.where}: {error}" if getattr(line, "where", "") else str(error)) from error
    return lines


def check_names(arguments: argparse.Namespace) -> None:
    """Raises UserError for what is to compute and cannot, as far as its name tells."""
    if arguments.tp < 1:
        raise UserError(f"--tp is {arguments.tp}, it must be at least 1.")
    if arguments.device is not None:
        check_device_name(arguments.device)
    check_kernel_name(arguments.kernel)
    if arguments.checkpoint:
        check_weights(arguments.checkpoint, arguments.ema)
    if arguments.model and not Path(expand_home(arguments.model)).exists():
        check_name(arguments.model)


def note_unused(arguments: argparse.Namespace, lines: "list[PromptLine]", jobs: "list[Job]") -> None:
    """Say which options no prompt is left for; a file of prompts may be meant to be complete."""
    for name in ("seed", "height", "width", "frames", "negative"):
        if getattr(arguments, name) and all(getattr(line, name) is not None for line in lines):
            note(f"--{name} has no effect: every prompt in {arguments.prompts} has its own.")
    if arguments.fps != FPS and all(job.frames == 1 for job in jobs):
        note(f"--fps {arguments.fps} has no effect on images.")


def build_plan(arguments: argparse.Namespace, lines: "list[PromptLine]") -> Plan:
    """Fill in the defaults. Raises UserError for what can be seen to be wrong; `lines` are those of `check_words`."""
    import torch

    from wanloom.dist import pick_device
    from wanloom.model.kernels import resolve_kernel
    from wanloom.sample.prompts import build_jobs
    from wanloom.sample.settings import read_defaults
    from wanloom.sample.solvers import build_solver

    check_arguments(arguments)
    name, pipeline, weights = find_weights(arguments)
    settings = fill_settings(arguments, read_defaults(pipeline, weights.config), name)
    config = read_config_of(arguments, settings)
    check_negative(arguments, config, lines)  # the guidance may be the model's
    sizes = (settings.height or 0, settings.width or 0, settings.frames or 0)
    jobs = build_jobs(lines, arguments.negative or "", arguments.seed, *sizes)
    check_jobs(lines, jobs)
    note_unused(arguments, lines, jobs)
    if name == "tiny" and weights.path == pipeline:
        note_unknown(jobs)
    build_solver(config.solver, config.steps, config.shift)
    device = pick_device(arguments.device)
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    plan = Plan(
        pipeline=pipeline,
        model_name=full_name(name),
        checkpoint=None if weights.path == pipeline else weights.path,
        weights=weights,
        ema=arguments.ema,
        config=config,
        jobs=jobs,
        fps=arguments.fps,
        layout=build_layout(arguments, config.guidance, weights.config),
        device=device,
        precision=precision,
        kernel=resolve_kernel(arguments.kernel, device.type, torch.bfloat16 if precision == "bf16" else torch.float32),
        out=Path(expand_home(arguments.out)),
    )
    check_sizes(plan)
    return plan


def find_weights(arguments: argparse.Namespace) -> "tuple[str, Path, Weights]":
    """The name of the pipeline, its folder, and the weights of the transformer, which may be elsewhere."""
    from wanloom.runs.trained import open_published, open_trained

    given, name = arguments.checkpoint, arguments.model
    if not given and name and (folder := Path(expand_home(name))).exists() and not (folder / "transformer").is_dir():
        given, name = folder, None  # a transformer alone, as the original layout has it: its parts are elsewhere
        if not is_published(given):
            raise UserError(f"'{given}' holds no model: a pipeline has the folders transformer, {', '.join(PARTS)}.")
    if not given:
        pipeline = find_pipeline(name or "tiny", (*PARTS, "transformer"))
        return name or "tiny", pipeline, open_published(pipeline)
    weights = open_trained(given, arguments.ema)
    name = name or weights.model
    if not name:
        raise UserError(
            f"'{given}' is a transformer alone: give the pipeline that its VAE and text encoder are of too, such as "
            f"--checkpoint {given} --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    return name, find_pipeline(name, PARTS), weights


def check_arguments(arguments: argparse.Namespace) -> None:
    from wanloom.dist import world_size

    if world_size() > 1 and ":" in (arguments.device or ""):
        raise UserError(f"--device {arguments.device} is one device, and each process takes its own: leave it out.")


def check_jobs(lines: "list[PromptLine]", jobs: "list[Job]") -> None:
    """Raises UserError for a size that cannot be, with the line that asks for it; notes a prompt that says nothing."""
    from wanloom.dist import rank
    from wanloom.sample.settings import latents_shape

    for line, job in zip(lines, jobs, strict=True):
        try:
            latents_shape(1, job.frames, job.height, job.width)  # some may come from the model's own settings
        except UserError as error:
            raise UserError(f"{line.where}: {error}" if line.where else str(error)) from error
        if not job.prompt.strip() and rank() == 0:
            note(f"the prompt of '{job.name}' is empty, so it shows anything.")


def note_unknown(jobs: "list[Job]") -> None:
    """A line on prompts that the shipped transformer was not trained on: their clips look broken, and are not."""
    from wanloom.demo.shapes import SCENES, TEMPLATES

    known = [scene.caption(template) for scene in SCENES for template in range(len(TEMPLATES))]
    strange = [job.prompt for job in jobs if job.prompt not in known]
    if strange:
        which = "this prompt" if len(strange) == len(jobs) == 1 else f"{len(strange)} of these prompts"
        note(
            f"tiny was trained on small shapes in the six sentences of the demo alone, such as '{known[0]}': with "
            f"{which} it may miss motion, colour and shape."
        )


def check_sizes(plan: Plan) -> None:
    """Raises UserError when the largest video cannot be made in the memory there is: nothing is loaded yet."""
    job = max(plan.jobs, key=lambda job: job.frames * job.height * job.width)
    doing = f"make {job.frames} frames of {job.width}x{job.height}"
    check_memory(least_bytes(plan, job), str(plan.device), doing, helps_of(plan))


def helps_of(plan: Plan) -> list[str]:
    """What makes a video take less memory, the best first."""
    job = max(plan.jobs, key=lambda job: job.frames * job.height * job.width)
    helps = ["a smaller --height and --width"]
    if job.frames > 1:
        helps.insert(job.height * job.width > 1280 * 720, f"fewer --frames than {job.frames}")
    if plan.precision == "fp32" and plan.device.type == "cuda":
        helps.append("--precision bf16")
    elif plan.config.guidance != 1:
        helps.append("--guidance 1, which is half of the work")
    if plan.device.type == "cuda":
        helps.append("--nproc to spread it over several GPUs")
    return helps[:3]


def least_bytes(plan: Plan, job: "Job") -> int:
    """A lower bound of what a video takes beside the weights, on the fullest device."""
    from wanloom.sample.settings import SPATIAL_STEP, TEMPORAL_STEP

    config, half = plan.model_config, plan.precision == "bf16"
    frames, rows, cols = (job.frames - 1) // TEMPORAL_STEP + 1, job.height // SPATIAL_STEP, job.width // SPATIAL_STEP
    tokens = frames * rows * cols * (1 if plan.config.guidance == 1 else 2)
    # the residual stream, its normed copy, and the hidden layer of the feed-forward
    denoising = tokens * (8 * config.dim + (2 if half else 4) * config.ffn_dim) // plan.layout.world
    decoding = job.frames * job.height * job.width * 3 * (4 + 4 + 1)  # fp32 pixels, those before they grew, bytes
    return max(denoising, decoding)


def build_layout(arguments: argparse.Namespace, guidance: float, model: "DiTConfig") -> "Layout":
    """How the processes share the work: the branches are data ranks, and what is left shares the tokens."""
    from wanloom.dist import world_size
    from wanloom.parallel.mesh import resolve_layout
    from wanloom.parallel.settings import ParallelConfig

    world, tp, branches = world_size(), arguments.tp, arguments.cfg_parallel
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
        "weights of the transformer": plan.weights.identity,
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


def read_config_of(arguments: argparse.Namespace, settings: "Defaults") -> "GenerateConfig":
    """How to sample; what neither was given nor is the model's keeps the default of the config."""
    from wanloom.sample.settings import GenerateConfig

    own = {"steps": settings.steps, "guidance": settings.guidance, "shift": settings.shift}
    asked = own | {"solver": arguments.solver}
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
            f"The `negative` of the prompt '{cut(given[0])}' has no effect with --guidance 1: leave one of them out."
        )


def fill_settings(arguments: argparse.Namespace, own: "Defaults", name: str) -> "Defaults":
    """What is asked for, completed by what the model has. Raises UserError where it has no sizes of its own."""
    asked = {key: getattr(arguments, key) for key in ("height", "width", "frames", "steps", "guidance", "shift")}
    filled = own.model_copy(update={key: value for key, value in asked.items() if value is not None})
    if None in (filled.height, filled.width, filled.frames):
        raise UserError(
            f"'{name}' is of no known size, so nothing can be assumed: give --height, --width and --frames."
        )
    return filled
