"""The files of `wanloom generate`: the media, and beside each a json with everything that repeats it.

In: a plan and decoded frames. Out: mp4, png and json. The one decision: all files of a job are written under other
names and then take theirs together, the json first; so no video is ever without its json, and a job whose json says
what is asked for now, and whose files are there, is done. Of several processes one calls this.
"""

import json
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wanloom
from wanloom.errors import UserError, sentence_of
from wanloom.files import parse_json, temporary_name, written

if TYPE_CHECKING:  # torch is imported only when the command runs
    from torch import Tensor

    from wanloom.cli.generate_plan import Plan
    from wanloom.sample.prompts import Job


def find_done(plan: "Plan", overwrite: bool, facts: dict[str, Any]) -> list[int]:
    """Which jobs this very command has made already, when it was stopped before, say.

    Raises UserError when another file is where one would be written.
    """
    if overwrite:
        return []
    same = [says_this(plan, job, facts) for job in plan.jobs]
    there = [
        path
        for job, is_same in zip(plan.jobs, same, strict=True)
        for path in outputs_of(plan, job)
        if not is_same and path.exists()
    ]
    if there:
        raise UserError(
            f"{len(there)} of the files are there already, made otherwise, such as {there[0]}: give another --seed or "
            "--out, or --overwrite."
        )
    whole = [all(path.is_file() for path in outputs_of(plan, job)) for job in plan.jobs]
    return [index for index, found in enumerate(zip(same, whole, strict=True)) if all(found)]


def says_this(plan: "Plan", job: "Job", facts: dict[str, Any]) -> bool:
    """Whether the json of a job is there and says just what is asked for now."""
    try:
        found = parse_json(outputs_of(plan, job)[-1].read_bytes())
    except (OSError, ValueError):
        return False
    return found == json.loads(json.dumps(content_of(plan, job, facts)))


def outputs_of(plan: "Plan", job: "Job") -> list[Path]:
    suffixes = (".png", ".json") if job.frames == 1 else (".mp4", ".png", ".json")
    return [plan.out / f"{job.name}{suffix}" for suffix in suffixes]


def describe(plan: "Plan") -> dict[str, Any]:
    """What all results of this call share, for their json."""
    from wanloom.codecs.identity import encoder_identity

    packages = ("torch", "diffusers", "transformers", "av")
    identity = {
        "transformer": plan.weights.identity,
        "text_encoder": encoder_identity(plan.pipeline, "text-encoder"),
        "vae": encoder_identity(plan.pipeline, "vae"),
    }
    return {
        **plan.config.model_dump(),
        "fps": plan.fps,
        "model": plan.model_name,
        "checkpoint": str(plan.checkpoint.resolve()) if plan.checkpoint else None,
        "step": plan.weights.step,
        "ema": plan.ema,
        "identity": identity,
        "precision": plan.precision,
        "kernel": plan.kernel,
        "device": plan.device.type if plan.layout.world > 1 else str(plan.device),
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


def content_of(plan: "Plan", job: "Job", facts: dict[str, Any]) -> dict[str, Any]:
    """What the json of a job says."""
    own = {key: value for key, value in vars(job).items() if key != "name"}
    media = [path.name for path in outputs_of(plan, job)[:-1]]
    return {**own, **facts, "files": media, "command": command_of(job, facts)}


def write_result(plan: "Plan", job: "Job", frames: "Tensor", facts: dict[str, Any]) -> Path:
    """The files of one job, all of them or none; returns the first. Raises UserError when they cannot be written."""
    from wanloom.media.write import write_mp4, write_png, write_sheet

    *media, note = outputs_of(plan, job)
    waiting = {path: temporary_name(path) for path in (note, *reversed(media))}
    text = json.dumps(content_of(plan, job, facts), indent=2, ensure_ascii=False) + "\n"
    try:
        if job.frames == 1:
            write_png(waiting[media[0]], frames[0])
        else:
            write_mp4(waiting[media[0]], frames, plan.fps)
            write_sheet(waiting[media[1]], frames)
        with written(waiting[note]) as temporary:
            temporary.write_text(text, encoding="utf-8")
        media[0].unlink(missing_ok=True)  # an older one must not be seen beside the new json
        for path, part in waiting.items():
            part.replace(path)
    except OSError as error:
        raise UserError(
            f"'{note.with_suffix('')}' cannot be written: {error.strerror or sentence_of(error)}."
        ) from error
    finally:
        for part in waiting.values():
            part.unlink(missing_ok=True)
    return media[0]


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
