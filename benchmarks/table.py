"""The table of benchmarks/README.md, made from the json of `results/`.

python -m benchmarks.table
"""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, Row
from wanloom.files import write_atomic

PAGE = Path(__file__).parent / "README.md"
START, END = "<!-- table -->", "<!-- end of table -->"
HEAD = ("claim", "what", "peer", "peer's", "wanloom's", "peer / wanloom: least, median", "target", "limit on paper")


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """By the name of the benchmark."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("[ce][0-9]*.json"))}


def rows_of(result: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in result["rows"]]


def amount(value: float, unit: str) -> str:
    """A number as one reads it."""
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "bytes" and value >= 1e6:
        return f"{value / 1e6:.3g} MB"
    return f"{value:,.0f} {unit}".strip() if value >= 1000 else f"{value:.4g} {unit}".strip()


def cells(row: Row) -> list[str]:
    """One line of the table; amounts are medians."""
    theirs = amount(statistics.median(row.theirs), row.unit) if row.theirs else ""
    ratio = f"{row.ratio():.2f}x, {row.ratio(statistics.median):.2f}x" if row.theirs else ""
    if len(row.ours) == 1 and row.theirs:
        ratio = f"{row.ratio():.2f}x"
    target = ""
    if row.target is not None:
        bound = f"{'at most' if row.at_most else 'at least'} {amount(row.target, row.unit if row.at_most else '')}"
        target = f"{bound}{'x' if row.theirs and not row.at_most else ''}: {'met' if row.is_met() else '**missed**'}"
        if row.at_most and row.is_met() and statistics.median(row.ours) > row.target:
            target += f" by the least, {amount(min(row.ours), row.unit)}"
    what = row.what if row.is_steady() else f"{row.what} (unsteady)"
    return [row.claim, what, row.peer, theirs, amount(statistics.median(row.ours), row.unit), ratio, target, row.limit]


def build_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: the table, the notes of its rows, and where each comes from."""
    machines = {json.dumps([result["machine"], result["versions"]]) for result in results.values()}
    if len(machines) > 1:
        raise ValueError("the results are of several machines or versions of packages: measure all of them again")
    machine, packages = json.loads(machines.pop())
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    notes, sources = [], []
    for result in results.values():
        found = rows_of(result)
        lines += ["| " + " | ".join(cells(row)) + " |" for row in found]
        notes += [f"- {row.claim}, {row.what}: {row.note}" for row in found if row.note]
        sources.append(
            f"| `{result['command']}` | {', '.join(dict.fromkeys(row.claim for row in found))} | {result['date']} | "
            f"{result['threads']} | {result['seconds']:.0f} s | {result['load'][0]}, {result['load'][1]} |"
        )
    facts = ", ".join(f"{name} {number}" for name, number in packages.items())
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {facts}.",
            "",
            *lines,
            "",
            *notes,
            "",
            "| command | claims | date | threads | took | load before, after |",
            "|---|---|---|---|---|---|",
            *sources,
        ]
    )


def main() -> None:
    """Write the table into the page."""
    text = PAGE.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    write_atomic(PAGE, f"{before}{START}\n{build_table(read_results())}\n{END}{after}".encode())


if __name__ == "__main__":
    main()
