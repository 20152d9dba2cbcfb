"""One self-contained HTML page about a run: commands and timings, loss curve, clips beside clips, scores.

In: plain values and paths of mp4 files. Out: the page as text; clips are embedded, so the page can be sent to someone.
Captions and commands come from outside and are escaped.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 860, 300, 60, 24, 36  # of the curve, in CSS pixels


@dataclass(frozen=True)
class Command:
    """A command that was run, as typed, and how long it took."""

    text: str
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """A prompt with what was generated for it, and a training clip of the same content where there is one."""

    prompt: str
    generated: Path
    training: Path | None
    verdict: str  # what the measurement saw
    right: bool


@dataclass(frozen=True)
class Score:
    """One line of the table of results: (right, out of) over all prompts, seen and held-out combinations."""

    name: str
    all: tuple[int, int]
    seen: tuple[int, int]
    held_out: tuple[int, int]
    target: float  # share of all that must be right

    @property
    def reached(self) -> bool:
        """Whether the target holds."""
        return self.all[0] >= self.target * self.all[1]


@dataclass(frozen=True)
class DemoReport:
    """Everything the page shows."""

    title: str
    machine: str
    commands: Sequence[Command]
    curves: dict[str, list[tuple[float, float]]]  # name -> (step, loss)
    scores: Sequence[Score]
    seen: Sequence[Comparison]
    held_out: Sequence[Comparison]
    settings: dict[str, str]


def build_page(report: DemoReport) -> str:
    """The page as HTML text. Raises FileNotFoundError when a clip is missing."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["video"] = _data_uri
    environment.filters["percent"] = lambda pair: f"{100 * pair[0] / pair[1]:.0f}%" if pair[1] else "-"
    template = environment.from_string(files("wanloom.demo").joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(report=report, curve=Markup(draw_curves(report.curves)), css=_css())


def _css() -> Markup:
    return Markup(files("wanloom.report").joinpath("page.css").read_text(encoding="utf-8"))


def _data_uri(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def draw_curves(curves: dict[str, list[tuple[float, float]]]) -> str:
    """The curves as SVG text, with axes from zero; each name gets a class `curve-0`, `curve-1`, ... for its colour."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return "<p>No losses were logged.</p>"
    top_x, top_y = max(x for x, _ in points) or 1, max(y for _, y in points) or 1
    scale_x, scale_y = (WIDTH - LEFT - RIGHT) / top_x, (HEIGHT - BOTTOM - 10) / top_y
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step">']
    for i in range(5):
        y, value = HEIGHT - BOTTOM - scale_y * top_y * i / 4, top_y * i / 4
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        x, step = LEFT + scale_x * top_x * i / 4, top_x * i / 4
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:.0f}</text>')
    for number, (name, curve) in enumerate((name, curve) for name, curve in curves.items() if curve):
        path = " ".join(f"{LEFT + scale_x * x:.1f},{HEIGHT - BOTTOM - scale_y * y:.1f}" for x, y in curve)
        place = f'x="{WIDTH - RIGHT - 4}" y="{24 + 18 * number}" text-anchor="end"'
        parts.append(f'<polyline class="curve-{number}" points="{path}"/>')
        parts.append(f'<text class="curve-{number}" {place}>{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])
