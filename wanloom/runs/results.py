"""The files of a video or image: the media, and beside them a json with everything that repeats it.

In: decoded frames and their facts. Out: mp4, png and json. The one decision: all files of a result are written under
other names and then take theirs together, the json first; so no video is ever without its json, and one whose json says
what is asked for now, and whose files are there, is done. Of several processes one calls this.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wanloom.errors import UserError, sentence_of
from wanloom.files import parse_json, temporary_name, written
from wanloom.media.write import write_mp4, write_png, write_sheet

Facts = dict[str, Any]


def find_done(out: Path, facts: Sequence[Facts], overwrite: bool) -> list[int]:
    """Which results this very command has made already, when it was stopped before, say.

    Raises UserError when another file is where one would be written.
    """
    if overwrite:
        return []
    same = [says_this(out, one) for one in facts]
    files = [outputs_of(out, one) for one in facts]
    there = [
        path for of_one, is_same in zip(files, same, strict=True) if not is_same for path in of_one if path.exists()
    ]
    if there:
        raise UserError(
            f"{len(there)} of the files are there already, made otherwise, such as {there[0]}: give another `seed` or "
            "`out`, or `overwrite`."
        )
    return [i for i, of_one in enumerate(files) if same[i] and all(path.is_file() for path in of_one)]


def says_this(out: Path, facts: Facts) -> bool:
    """Whether the json of a result is there and says just what is asked for now."""
    try:
        found = parse_json(outputs_of(out, facts)[-1].read_bytes())
    except (OSError, ValueError):
        return False
    return found == json.loads(json.dumps(content_of(out, facts)))


def outputs_of(out: Path, facts: Facts) -> list[Path]:
    suffixes = (".png", ".json") if facts["frames"] == 1 else (".mp4", ".png", ".json")
    return [out / f"{facts['name']}{suffix}" for suffix in suffixes]


def content_of(out: Path, facts: Facts) -> Facts:
    """What the json of a result says."""
    media = [path.name for path in outputs_of(out, facts)[:-1]]
    told = {key: value for key, value in facts.items() if key != "name"}
    return {**told, "files": media, "command": command_of(facts)}


def write_result(out: Path, frames: Tensor, facts: Facts) -> Path:
    """The files of one result, all of them or none; returns the first. Raises UserError when they cannot be written."""
    *media, note = outputs_of(out, facts)
    waiting = {path: temporary_name(path) for path in (note, *reversed(media))}
    text = json.dumps(content_of(out, facts), indent=2, ensure_ascii=False) + "\n"
    try:
        if facts["frames"] == 1:
            write_png(waiting[media[0]], frames[0])
        else:
            write_mp4(waiting[media[0]], frames, facts["fps"])
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


def command_of(facts: Facts) -> str:
    """The command line that makes this one result again, on as many processes, all of them started here."""
    words = ["wanloom", "generate", *option("model", facts["model"])]
    if facts["checkpoint"]:
        words += [*option("checkpoint", facts["checkpoint"]), *(option("ema") if facts["ema"] else [])]
    for key in ("prompt", "negative") if facts["guidance"] != 1 else ("prompt",):
        words.append("=".join(option(key, facts[key])))  # may begin with a dash
    keys = ("seed", "height", "width", "frames", "fps", "solver", "steps", "shift", "guidance", "precision", "kernel")
    for key in (*keys, "device"):
        words += option(key, facts[key])
    processes = facts["processes"]
    if processes["number"] > 1:
        words += option("nproc", processes["number"])
        words += [*option("tp", processes["tp"]), *option("cfg-parallel", processes["cfg_parallel"])]
    return shlex.join(words)


def option(name: str, *value: object) -> list[str]:
    """As the command line has it."""
    return [f"--{name}", *map(str, value)]
