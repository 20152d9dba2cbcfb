"""What happened to every file: counts, reasons and names, as report.json has them.

In: the plan, the drops found while decoding, and the json members of all samples. Out: a dict. The one
decision: the report is made from what is in the shards, not from counters kept on the way, so it is also right after
any number of kills and restarts. Every media file is in it: as samples or as a drop. One line of advice for a reason,
whatever the number of files, and only where an option mends it.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from wanloom.geometry import Geometry
from wanloom.media.clock import JUMPS
from wanloom.prepare.listing import InputPlan
from wanloom.terminal import plural

FEWEST = 5  # frames of a clip that is no picture


class Report:
    """Collects the report of a prepared folder, one sample's record after the other."""

    def __init__(
        self, plan: InputPlan, late: list[dict[str, Any]], settings: dict[str, Any], geometry: Geometry
    ) -> None:
        self.plan = plan
        self.geometry = geometry
        self.settings = settings
        self.late = late  # the drops found while decoding
        self.samples: Counter[str] = Counter()  # by file
        self.taken: dict[str, tuple[float, float]] = {}  # by video: seconds up to its last clip, and of all of it
        self.splits: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        self.facts: dict[str, dict[str, str]] = {name: {} for name in FACTS}  # what -> file -> how
        self.notes: dict[str, set[str]] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Count one sample."""
        file = record["source"]
        self.samples[file] += 1
        if record["fps"] and record.get("source_s") and JUMPS not in record["notes"]:
            self.taken[file] = (record["end_s"] + 1 / record["fps"], record["source_s"])  # clips come in order of time
        self.splits[record["split"]] += 1
        self.sizes[f"{plural(record['frames'], 'frame')} of {record['size'][0]}x{record['size'][1]}"] += 1
        for name, tell in FACTS.items():
            if text := tell(record):
                self.facts[name][file] = text
        for note in record["notes"]:
            self.notes.setdefault(note, set()).add(file)

    def to_dict(self) -> dict[str, Any]:
        """What is written to report.json."""
        entries = self.plan.entries
        early = [{"file": entry.source, "kind": entry.drop, "reason": entry.reason} for entry in entries if entry.drop]
        dropped = [{**drop, "samples": self.samples[drop["file"]]} for drop in early + self.late]
        kinds = Counter(entry.kind for entry in entries)
        return {
            "files": {"found": len(entries), "videos": kinds["video"], "images": kinds["image"]},
            "samples": {"total": self.splits.total(), "train": self.splits["train"], "val": self.splits["val"]},
            "sizes": self.sizes,
            "dropped": sorted(dropped, key=lambda drop: drop["file"]),
            "dropped_by_kind": Counter(drop["kind"] for drop in dropped),
            "captions_in_conflict": self.plan.conflicts,
            "captions_shared": self.plan.shared,
            "captions_without_file": self.plan.missing,
            **self.facts,
            "notes": {note: sorted(files) for note, files in self.notes.items()},
            "ignored": self.plan.ignored,
            "links_not_followed": self.plan.links,
            "advice": advise(dropped, self.taken, self.settings, self.geometry),
        }


def _truncation(record: dict[str, Any]) -> str:
    tokens, kept = record["caption_tokens"], record["text_len"]
    return f"{tokens} tokens, {kept} kept" if tokens > kept else ""


def _rate(record: dict[str, Any]) -> str:
    if record["fps"] is None or record["source_fps"] is None or abs(record["source_fps"] - record["fps"]) < 0.01:
        return ""
    return f"{record['source_fps']:g} to {record['fps']:g} frames per second"


def _cut(record: dict[str, Any]) -> str:
    kept = record["size"][0] * record["size"][1] / (record["resized"][0] * record["resized"][1])
    return f"{1 - kept:.1%} of the picture" if kept < 1 else ""


def _growth(record: dict[str, Any]) -> str:
    factor = record["resized"][0] / record["display_size"][0]
    return f"{factor:.2f} times" if factor > 1.005 else ""


def _bend(record: dict[str, Any]) -> str:
    # resizing to whole pixels alone bends by up to half a pixel of the shorter side
    return f"{record['aspect_change']:+.1%}" if abs(record["aspect_change"]) > 1 / min(record["resized"]) else ""


def _guess(record: dict[str, Any]) -> str:
    return record["colour"] if record["colour_guessed"] else ""


FACTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "captions_truncated": _truncation,
    "resampled_in_time": _rate,
    "cropped": _cut,
    "enlarged": _growth,
    "bent_by_rounding": _bend,
    "colours": lambda record: record["colour"],
    "colours_guessed": _guess,
}


def summarise(report: dict[str, Any]) -> str:
    """What became of the files, in a few words."""
    samples, files = report["samples"]["total"], report["files"]["found"]
    lost = sum(not drop["samples"] for drop in report["dropped"])
    text = f"{plural(samples, 'sample')} from {files - lost:,} of {plural(files, 'file')}"
    return f"{text}, {lost:,} dropped" if lost else text


def explain_nothing(report: dict[str, Any]) -> str:
    """Why there is no sample: how many files for each reason, one of the most frequent in full, and what helps."""
    kinds = Counter(report["dropped_by_kind"]).most_common()
    numbers = ", ".join(f"{number:,} {kind}" for kind, number in kinds)
    first = next(drop for drop in report["dropped"] if drop["kind"] == kinds[0][0])
    sentences = [f"{numbers}. {first['file']}: {first['reason']}.", *report.get("advice", [])]
    if kinds[0][0] == "captionless":
        sentences.append("A caption is a text beside its file, such as clip.txt beside clip.mp4.")
    return " ".join(sentences)


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
