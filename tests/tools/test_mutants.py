"""The list of deliberate breaks fits the code; that each is noticed takes `python tools/mutants.py`."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # as when the file is run
mutants = importlib.import_module("mutants")


def test_every_break_is_one_place_of_the_code_and_leaves_python():
    places = [(mutant.file, mutant.text, mutant.replacement) for mutant in mutants.MUTANTS]
    assert len(set(places)) == len(places) >= 30
    for mutant in mutants.MUTANTS:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.text) == 1, f"{mutant.file}: {mutant.text}"
        broken = text.replace(mutant.text, mutant.replacement)
        assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(text)), f"{mutant.file}: {mutant.text}"
        assert bool(mutant.tests) != bool(mutant.same), f"{mutant.file}: name tests, or say why there are none"


def test_every_named_test_exists():
    for name in {test for mutant in mutants.MUTANTS for test in mutant.tests}:
        file, _, function = name.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f"\ndef {function.partition('[')[0]}" in text, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_break_that_no_test_names_is_not_taken_for_noticed(tmp_path):
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "test_code.py").write_text("def test_nothing():\n    pass\n")
    mutant = mutants.Mutant("code.py", "x = 1", "x = 2", ("test_code.py",))
    assert mutants.apply(tmp_path, mutant) == "x = 1\n" and (tmp_path / "code.py").read_text() == "x = 2\n"
    assert mutants.run_tests(tmp_path, mutant.tests)[0]
    with pytest.raises(SystemExit, match="is 0 times in code"):
        mutants.apply(tmp_path, mutant)
    with pytest.raises(SystemExit, match="cannot be run"):
        mutants.run_tests(tmp_path, ("test_code.py::test_that_is_not_there",))
