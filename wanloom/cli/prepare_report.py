"""What prepare prints: how far it is, and the report of a folder as a table."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from wanloom.options import find_options, name_options
from wanloom.prepare.encode import Progress
from wanloom.prepare.settings import PrepareConfig
from wanloom.signals import StopSignal
from wanloom.terminal import plural, printable

NAMES = 5  # file names shown for one line of the table; report.json has all
SETTINGS = {option.name for option in find_options(PrepareConfig)}


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as a table; long lists of names are cut, report.json has them whole."""
    files, samples = report["files"], report["samples"]
    table = Table(title="prepared", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    table.add_row(
        "files in", str(files["found"]), f"{plural(files['videos'], 'video')}, {plural(files['images'], 'image')}"
    )
    table.add_row("samples out", str(samples["total"]), f"{samples['train']} train, {samples['val']} val")
    for size, number in sorted(report["sizes"].items()):
        table.add_row("", str(number), f"{size} (width x height)")
    for kind, number in sorted(report["dropped_by_kind"].items()):
        drops = [drop for drop in report["dropped"] if drop["kind"] == kind]
        lines = [f"{d['file']}: {d['reason']}{_partly(d)}" for d in drops]
        table.add_row(Text(f"dropped, {kind}", style="red"), str(number), _shorten(lines))
    for name, title in (
        ("captions_truncated", "captions cut"),
        ("captions_in_conflict", "captions disagree"),
        ("captions_shared", "captions shared"),
        ("bent_by_rounding", "bent by rounding"),
        ("resampled_in_time", "resampled in time"),
        ("cropped", "cropped"),
        ("enlarged", "enlarged"),
        ("colours_guessed", "colours guessed"),
    ):
        if report.get(name):  # folders of before have fewer
            lines = [f"{file}: {what}" for file, what in sorted(report[name].items())]
            table.add_row(title, str(len(lines)), _shorten(lines))
    for name, title in (
        ("captions_without_file", "captions without file"),
        ("ignored", "other files, ignored"),
        ("links_not_followed", "links to other folders (--follow-links)"),
    ):
        if report.get(name):
            table.add_row(title, str(len(report[name])), _shorten(report[name]))
    for note, names in sorted(report["notes"].items()):
        table.add_row(note, str(len(names)), _shorten(names))
    console.print(table)
    for line in report.get("advice", []):
        console.print(name_options(line, SETTINGS), soft_wrap=True)


def _partly(drop: dict[str, Any]) -> str:
    return f" ({plural(drop['samples'], 'sample')} of it kept)" if drop["samples"] else ""


def _shorten(lines: list[str]) -> Text:
    more = f"\nand {len(lines) - NAMES} more in report.json" if len(lines) > NAMES else ""
    return Text(printable(name_options("\n".join(lines[:NAMES]), SETTINGS)) + more)


class Bar:
    """Shows `Progress` as a bar with rate and time left; in a log file as a line every half minute."""

    def __init__(self, console: Any, stop: StopSignal) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("files{task.fields[samples]}"),
            TimeRemainingColumn(),
        )
        self.console = console
        self.stop = stop
        self.progress = ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task("reading", total=None, samples="")
        self.stage = ""
        self.first = (0.0, 0, 0)  # time, files and samples when the stage began
        self.said = time.monotonic()

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, state: Progress) -> None:
        """Called after every file and sample."""
        self.stop.is_patient = state.stage == "encoding"
        if self.stop.received:
            raise KeyboardInterrupt
        now = time.monotonic()
        if state.stage != self.stage:
            self.stage, self.first = state.stage, (now, state.done, state.samples)
            self.progress.reset(self.task, total=state.total, completed=state.done, description=state.stage)
        seconds = max(now - self.first[0], 1e-3)
        rate = (state.samples - self.first[2]) / seconds
        text = f", {state.samples} samples, {rate:.2g} per second" if state.samples else ""
        self.progress.update(self.task, completed=state.done, total=state.total, samples=text)
        if not self.console.is_terminal and now - self.said > 30:
            self.said = now
            made = state.done - self.first[1]
            left = f", about {seconds / made * (state.total - state.done) / 60:.0f} min left" if made else ""
            self.console.print(f"{state.stage}: {state.done} of {state.total} files{text}{left}")
