"""The files of `wanloom generate`: the media, and beside each a json with everything that repeats it.

In: a plan and decoded frames. Out: mp4, png and json. The one decision: each file appears whole, and the json last,
so where it is the others are. Of several processes one calls this.
"""

import json
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wanloom
from wanloom.config import UserError

if TYPE_CHECKING:  # torch is imported only when the command runs
    from torch import Tensor

    from wanloom.cli.generate_plan import Plan
    from wanloom.sample.prompts import Job


def check_outputs(plan: "Plan", overwrite: bool) -> None:
    """Raises UserError when a file that would be written is there, or the folder cannot be made."""
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder '{plan.out}' cannot be made: {error.strerror}.") from error
    there = [path for job in plan.jobs for path in outputs_of(plan, job) if path.exists()]
    if there and not overwrite:
        raise UserError(
            f"{len(there)} of the files are there already, such as {there[0]}: give another --out, or --overwrite."
        )


def outputs_of(plan: "Plan", job: "Job") -> list[Path]:
    suffixes = (".png", ".json") if job.frames == 1 else (".mp4", ".png", ".json")
    return [plan.out / f"{job.name}{suffix}" for suffix in suffixes]


def describe(plan: "Plan", text_identity: str, vae_identity: str) -> dict[str, Any]:
    """What all results of this call share, for their json."""
    from wanloom.keys import SCHEME

    trained = plan.trained
    packages = ("torch", "diffusers", "transformers", "av")
    return {
        **plan.config.model_dump(),
        "fps": plan.fps,
        "model": plan.model_name,
        "checkpoint": str(trained.path.resolve()) if trained else None,
        "step": trained.step if trained else None,
        "ema": plan.ema,
        "identity": {"transformer": plan.transformer, "text_encoder": text_identity, "vae": vae_identity},
        "precision": plan.precision,
        "kernel": plan.kernel,
        "device": plan.device.type if plan.layout.world > 1 else str(plan.device),
        "draws": SCHEME,
        "processes": {
            "number": plan.layout.world,
            "cfg_parallel": plan.layout.data_ranks,
            "cp_ring": plan.layout.cp_ring,
            "cp_ulysses": plan.layout.cp_ulysses,
            "tp": plan.layout.tp,
        },
        "versions": {
            "wanloom": wanloom.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
    }


def write_result(plan: "Plan", job: "Job", frames: "Tensor", facts: dict[str, Any]) -> None:
    """The files of one job, the json last: where it is, the others are whole."""
    from wanloom.files import write_atomic
    from wanloom.sample.media import write_mp4, write_png, write_sheet

    *media, note = outputs_of(plan, job)
    try:
        if job.frames == 1:
            write_png(media[0], frames[0])
        else:
            write_mp4(media[0], frames, plan.fps)
            write_sheet(media[1], frames)
        own = {key: value for key, value in vars(job).items() if key != "name"}
        content = {**own, **facts, "files": [path.name for path in media], "command": command_of(job, facts)}
        write_atomic(note, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"'{note.with_suffix('')}' cannot be written: {error.strerror or error}.") from error


def command_of(job: "Job", facts: dict[str, Any]) -> str:
    """The command line that makes this one result again, on as many processes, of which `--nproc` starts all here."""
    words = ["wanloom", "generate", "--model", facts["model"]]
    if facts["checkpoint"]:
        words += ["--checkpoint", facts["checkpoint"], *(["--ema"] if facts["ema"] else [])]
    words.append(f"--prompt={job.prompt}")
    if facts["guidance"] != 1:
        words.append(f"--negative={job.negative}")
    for key in ("seed", "height", "width", "frames"):
        words += [f"--{key}", str(getattr(job, key))]
    for key in ("fps", "solver", "steps", "shift", "guidance", "precision", "kernel", "device"):
        words += [f"--{key}", str(facts[key])]
    processes = facts["processes"]
    if processes["number"] > 1:
        words += ["--nproc", str(processes["number"]), "--tp", str(processes["tp"])]
        words += ["--cfg-parallel", str(processes["cfg_parallel"])]
    return shlex.join(words)
