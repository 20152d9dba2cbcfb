"""Whether prepared data belongs to the model of a run: it was encoded by some VAE and some text encoder.

In: a run and what prints a note. Out: nothing, notes, or a UserError. The one decision: latents of another VAE are an
error, because nothing later would show it and the run's own VAE cannot decode what it learns; captions of another text
encoder are a note, because a fine-tune may be meant so. What cannot be compared is said, never skipped quietly.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fsspec.core import url_to_fs

from wanloom.codecs.identity import ENCODERS, encoder_identity
from wanloom.data.places import DONE
from wanloom.data.shards import Dataset
from wanloom.errors import UserError, cut
from wanloom.files import parse_json
from wanloom.formats.pipeline import find_local
from wanloom.geometry import WAN_21, Geometry
from wanloom.runs.recipe import Run
from wanloom.terminal import plural

NAMES = {"vae": "VAE", "text-encoder": "text encoder"}  # how to call what prepare.json has under these keys


def check_origins(run: Run, say: Callable[[str], None]) -> None:
    """Compare what every source was prepared with to the model's own. Raises UserError for another VAE."""
    if run.data.mock:
        return
    own = {key: identify(run.model, key) for key in NAMES}
    for source in run.data.resolved():
        stored = read_settings(source.path)
        for key, name in NAMES.items():
            if stored.get(key) is None or own[key] is None:
                reason = "that is not on this machine" if own[key] is None else f"there is no {DONE} that says"
                say(
                    f"note: whether {source.path} was prepared with the {name} of {run.model} is not checked: {reason}."
                )
            elif stored[key] != own[key] and key == "vae":
                raise UserError(
                    f"{source.path} was prepared with another VAE than that of {run.model}, which cannot decode what "
                    f"this run would learn: prepare it with the model {run.model}, or train the model that it is for."
                )
            elif stored[key] != own[key]:
                say(
                    f"note: {source.path} was prepared with other {name} files than those of {run.model}. If they are "
                    "another encoder, this run learns captions that the model's own encoder does not speak."
                )


def note_unhashed(sources: Sequence[object], say: Callable[[str], None]) -> None:
    """Say where it cannot be checked that the samples stay what they are from one start to the next."""
    for source in sources:
        if isinstance(source, Dataset) and (count := source.count_unhashed()):
            say(
                f"note: {plural(count, 'sample')} of {source.path} without a sha256, as in folders that others made: "
                "whether the content stays the same is not checked, only names and lengths are."
            )


def identify(model: str, encoder: str) -> str | None:
    """The identity of an encoder of a pipeline, as prepare writes it; None when it is not on this machine."""
    pipeline = find_local(model, ENCODERS[encoder])
    return pipeline and encoder_identity(pipeline, encoder)


def read_settings(path: str) -> dict[str, Any]:
    """What a folder was prepared with; empty for a folder that others made. Raises UserError when it is damaged."""
    found = _read_done(path)
    return found["settings"] if found else {}


def read_geometry(path: str) -> Geometry:
    """How the latents of a folder divide a video; one that does not say is of Wan 2.1.

    Raises UserError when it is damaged.
    """
    found = _read_done(path).get("geometry")
    try:
        return Geometry(**found) if found else WAN_21
    except TypeError as error:
        raise UserError(f"{path}/{DONE} is damaged (its geometry is {cut(str(found))}): restore it.") from error


def _read_done(path: str) -> dict[str, Any]:
    fs, root = url_to_fs(path)
    try:
        found = parse_json(fs.cat_file(f"{root}/{DONE}"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}/{DONE} is damaged ({error}): restore it, or delete it to train unchecked.") from error
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise UserError(
            f"{path}/{DONE} is damaged (it holds no settings): restore it, or delete it to train unchecked."
        )
    return found
