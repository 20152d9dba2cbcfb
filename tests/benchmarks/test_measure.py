"""How rows are judged and become a table; that the page says what the results say."""

import json
import time
from importlib.machinery import ModuleSpec

import pytest

from benchmarks import __main__ as together
from benchmarks import measure, table
from benchmarks.__main__ import NAMES
from benchmarks.measure import Row, describe, main, take_turns

pytestmark = pytest.mark.slow


def test_a_target_is_judged_by_the_least():
    row = Row("C0", "x", "s", ours=[2.0, 1.0], peer="p", theirs=[9.0, 3.0], target=3.0)
    assert row.ratio() == 3.0 and row.is_met() and not Row(**{**vars(row), "target": 3.1}).is_met()
    assert row.ratio(max) == 4.5
    bound = Row("C0", "x", "bytes", ours=[10], peer="p", theirs=[100], target=10, at_most=True)
    assert bound.is_met() and not Row(**{**vars(bound), "target": 9.9}).is_met()
    assert (
        Row("C0", "x", "", ours=[1.2], target=1.1).is_met() and not Row("C0", "x", "", ours=[1.0], target=1.1).is_met()
    )
    assert Row("C0", "x", "", ours=[1.0]).is_met() is None


def test_a_drifting_peer_is_unsteady():
    assert Row("C0", "x", "s", ours=[1.0], theirs=[1.0, 1.3, 1.04, 1.5]).is_steady()
    assert not Row("C0", "x", "s", ours=[1.0], theirs=[1.0, 1.3, 1.06, 1.5]).is_steady()
    assert "unsteady" in describe(Row("C0", "x", "s", ours=[1.0], theirs=[1.0, 2.0]))


def test_turns_are_taken(monkeypatch):
    said = []
    taken = take_turns({"a": lambda: said.append("a"), "b": lambda: (said.append("b"), time.sleep(0.01))}, rounds=4)
    assert said[:4] == ["a", "b", "a", "b"] and len(said) == 2 + 2 * len(taken["a"]) and len(taken["b"]) >= 4
    assert min(taken["b"]) >= 0.01 > min(taken["a"])
    now = iter(range(1000))  # a clock by which every later call is slower
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now) ** 2)
    monkeypatch.setattr(measure, "PATIENCE", 1e9)
    assert len(take_turns({"a": lambda: None}, rounds=4)["a"]) == 12
    monkeypatch.setattr(measure, "PATIENCE", 0.0)
    assert len(take_turns({"a": lambda: None}, rounds=4)["a"]) == 4


def test_a_result_is_kept_and_a_toy_is_not(tmp_path, monkeypatch, capsys):
    def rows(toy: bool) -> list[Row]:
        """Nothing of use."""
        return [Row("C0", "a thing", "s", ours=[1.0], peer="p", theirs=[2.5], target=2.0, limit="3x", note="why")]

    monkeypatch.setattr(measure.torch, "set_num_threads", lambda count: None)  # other tests want one thread
    spec = ModuleSpec("benchmarks.c00_thing", None)
    monkeypatch.setattr("sys.argv", ["x", "--toy", "--out", str(tmp_path)])
    main(spec, rows)
    assert list(tmp_path.iterdir()) == [] and "2.500x" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path)])
    main(spec, rows)
    result = json.loads((tmp_path / "c00_thing.json").read_text())
    assert {"machine", "versions", "load", "date", "threads", "seconds"} <= result.keys()
    assert result["command"] == "python -m benchmarks.c00_thing"
    page = table.build_table(table.read_results(tmp_path))
    assert "| C0 | a thing | p | 2.5 s | 1 s | 2.50x | at least 2x: met | 3x |" in page and "- C0, a thing: why" in page


def test_a_bound_that_the_median_misses_says_what_met_it():
    """The amount beside it is the median: it would stand there above the bound, and be called met."""
    target = table.HEAD.index("target")
    assert table.cells(Row("C0", "a thing", "s", [0.01, 0.002, 0.03], target=0.005, at_most=True))[target] == (
        "at most 5 ms: met by the least, 2 ms"
    )
    assert table.cells(Row("C0", "a thing", "s", [0.004], target=0.005, at_most=True))[target] == "at most 5 ms: met"
    assert table.cells(Row("C0", "a thing", "s", [0.006], target=0.005, at_most=True))[target].endswith("**missed**")


def test_mistakes_are_told_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    def rows(toy: bool) -> list[Row]:
        """Nothing of use."""
        raise AssertionError("measured")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit):
        main(ModuleSpec("benchmarks.c00_thing", None), rows)
    monkeypatch.setattr("sys.argv", ["x", "--tpy"])
    with pytest.raises(SystemExit):
        together.main()
    assert "cannot be a folder" in (errors := capsys.readouterr().err) and "--tpy" in errors


def test_no_table_is_made_where_one_failed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setattr(together, "NAMES", ["c00_thing"])  # there is none
    monkeypatch.setattr(table, "main", lambda: pytest.fail("a table of old numbers"))
    assert together.main() == 1 and "c00_thing" in capsys.readouterr().out


def test_the_page_is_made_from_the_results():
    results = table.read_results()
    assert sorted(results) == NAMES, "a benchmark without a result, or a result without a benchmark"
    assert table.PAGE.read_text().split(table.START)[1].split(table.END)[0].strip() == table.build_table(results)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_of_this_benchmark(name):
    result = table.read_results()[name]
    assert result["command"] == f"python -m benchmarks.{name}" and result["rows"]
