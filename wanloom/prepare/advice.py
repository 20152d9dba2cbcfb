"""What to ask for so that less is left out: the lines under prepare's report.

In: what was dropped, what was taken of each video, the settings. Out: sentences that name an option and what it would
take. The one decision: one line for a reason, whatever the number of files, and only where an option mends it.
"""

from typing import Any

from wanloom.geometry import Geometry
from wanloom.terminal import plural

FEWEST = 5  # frames of a clip that is no picture


def advise(
    dropped: list[dict[str, Any]],
    taken: dict[str, tuple[float, float]],
    settings: dict[str, Any],
    geometry: Geometry,
) -> list[str]:
    """`taken` holds, by file, the seconds up to where samples reach and those of the whole video by its header."""
    lines = []
    if settings.get("mode") == "video":
        lines += advise_frames([drop["frames"] for drop in dropped if "frames" in drop], settings["frames"], geometry)
        if settings["clips"] == "first":
            lines += advise_clips(taken, settings["frames"] / settings["fps"])
    return lines


def advise_short(frames: int, geometry: Geometry) -> str:
    """With which setting a video of so many frames would give a sample."""
    fits = geometry.most_frames(frames)
    return f"`frames={fits}` takes it" if fits > 1 else "`mode=frames` takes single pictures of it"


def advise_frames(found: list[int], asked: int, geometry: Geometry) -> list[str]:
    """The number of frames with which most of the videos that are too short would give a clip: nine of ten."""
    if not found:
        return []
    fits = sorted(map(geometry.most_frames, found), reverse=True)
    usable = [number for number in fits if number >= FEWEST]
    many = len(found) > 1
    start = f"{plural(len(found), 'video')} {'are' if many else 'is'} too short for `frames={asked}`"
    if not usable:
        return [f"{start}: `mode=frames` takes single pictures of {'them' if many else 'it'}."]
    best = usable[min(len(usable), -(-9 * len(found) // 10)) - 1]
    kept = sum(number >= best for number in usable)
    return [f"{start}: `frames={best}` takes {f'{kept} of them' if many else 'it'}."]


def advise_clips(taken: dict[str, tuple[float, float]], length: float) -> list[str]:
    """What `clips=first` leaves of videos from which more clips could be taken."""
    left = [whole - reached for reached, whole in taken.values() if whole - reached >= length]
    if not left:
        return []
    return [
        f"`clips=first` takes one clip from the start of a video and leaves {sum(left) / 60:.1f} minutes of "
        f"{plural(len(left), 'video')} out, by their headers: `clips=all` takes them, `clips=uniform` a "
        "few clips spread over each."
    ]
