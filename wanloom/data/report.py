"""What happened to every file: counts, reasons and names, as report.json and as a table to read.

In: the plan, the drops found while decoding, and the json members of all samples. Out: a dict, and its printed form.
The one decision: the report is made from what is in the shards, not from counters kept on the way, so it is also right
after any number of kills and restarts. Every media file is in it: as samples or as a drop.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wanloom.data.plan import Plan

NAMES = 5  # file names shown for one line of the table; report.json has all


def build_report(plan: Plan, late: list[dict[str, Any]], records: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of a prepared folder. `late` are the drops found while decoding."""
    early = [{"file": e.source, "kind": e.drop, "reason": e.reason, "samples": 0} for e in plan.entries if e.drop]
    late = [drop | {"samples": sum(r["source"] == drop["file"] for r in records)} for drop in late]
    dropped = sorted(early + late, key=lambda drop: drop["file"])
    kinds = Counter(entry.kind for entry in plan.entries)
    splits = Counter(record["split"] for record in records)
    return {
        "files": {"found": len(plan.entries), "videos": kinds["video"], "images": kinds["image"]},
        "samples": {"total": len(records), "train": splits["train"], "val": splits["val"]},
        "sizes": _count(f"{r['frames']} frames {r['size'][0]}x{r['size'][1]}" for r in records),
        "dropped": dropped,
        "dropped_by_kind": _count(drop["kind"] for drop in dropped),
        "captions_truncated": _files(
            records,
            lambda r: (
                f"{r['caption_tokens']} tokens, {r['text_len']} kept" if r["caption_tokens"] > r["text_len"] else ""
            ),
        ),
        "captions_in_conflict": dict(sorted(plan.conflicts.items())),
        "captions_without_file": plan.missing,
        "resampled_in_time": _files(records, _rate),
        "cropped": _files(records, _cut),
        "enlarged": _files(records, _growth),
        "bent_by_rounding": _files(records, lambda r: f"{r['aspect_change']:+.1%}" if _is_bent(r) else ""),
        "notes": {
            note: sorted({r["source"] for r in records if note in r["notes"]})
            for note in sorted({note for r in records for note in r["notes"]})
        },
        "ignored": plan.ignored,
    }


def _count(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))


def _files(records: list[dict[str, Any]], tell: Any) -> dict[str, str]:
    """File -> what happened, for those for which `tell(record)` is not empty."""
    return dict(sorted({r["source"]: text for r in records if (text := tell(r))}.items()))


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


def _is_bent(record: dict[str, Any]) -> bool:
    # resizing to whole pixels alone bends by up to half a pixel of the shorter side
    return abs(record["aspect_change"]) > 1 / min(record["resized"])


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as a table; long lists of names are cut, report.json has them whole."""
    files, samples = report["files"], report["samples"]
    table = Table(title="prepared", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    table.add_row("files in", str(files["found"]), f"{files['videos']} videos, {files['images']} images")
    table.add_row("samples out", str(samples["total"]), f"{samples['train']} train, {samples['val']} val")
    for size, number in report["sizes"].items():
        table.add_row("", str(number), size)
    for kind, number in report["dropped_by_kind"].items():
        drops = [drop for drop in report["dropped"] if drop["kind"] == kind]
        lines = [f"{d['file']}: {d['reason']}{_partly(d)}" for d in drops]
        table.add_row(f"[red]dropped, {kind}[/red]", str(number), _shorten(lines))
    for name, title in (
        ("captions_truncated", "captions cut"),
        ("captions_in_conflict", "captions disagree"),
        ("bent_by_rounding", "bent by rounding"),
        ("resampled_in_time", "resampled in time"),
        ("cropped", "cropped"),
        ("enlarged", "enlarged"),
    ):
        if report[name]:
            lines = [f"{file}: {what}" for file, what in report[name].items()]
            table.add_row(title, str(len(lines)), _shorten(lines))
    for name, title in (("captions_without_file", "captions without file"), ("ignored", "other files, ignored")):
        if report[name]:
            table.add_row(title, str(len(report[name])), _shorten(report[name]))
    for note, names in report["notes"].items():
        table.add_row(note, str(len(names)), _shorten(names))
    console.print(table)


def _partly(drop: dict[str, Any]) -> str:
    return f" ({drop['samples']} samples before that are kept)" if drop["samples"] else ""


def _shorten(lines: list[str]) -> str:
    more = f"\nand {len(lines) - NAMES} more in report.json" if len(lines) > NAMES else ""
    return escape("\n".join(lines[:NAMES])) + more
