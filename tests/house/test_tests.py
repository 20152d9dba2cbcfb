"""Tests mirror the package, can be read, and say once what they are: what is slow stays out of `make quick`."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PACKAGE = ROOT / "wanloom"
FILES = sorted(TESTS.rglob("test_*.py"))
OURS = sorted(path for name in ("tests", "tools", "benchmarks") for path in (ROOT / name).rglob("*.py"))
# tests of what is no room of code: the repository, many ranks against one process, files
OTHERS = {"house", "layouts", "tools", "benchmarks", "assets"}
# tests of several modules of their room, or of all of it
OF_SEVERAL = {
    "test_python_page",
    "test_many_ranks",
    "test_mistakes",
    "test_broken_folders",
    "test_fuzz",
    "test_opening",
}
MOST_OF_FILE = 400
# what is one file for a reason, and no longer than it is
LONGER = {"tools/same_run.py": 476, "tools/breaks.py": 411}  # its results are kept by its text; a table


def test_no_two_files_of_tests_have_one_name():
    """pytest cannot collect both, and a run of one folder does not show it."""
    names = [path.name for path in FILES]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def module_faults(path: Path, package: Path) -> list[str]:
    """A file of tests has a name of its room: test_MODULE or test_MODULE_subject, ROOM_ before it where needed."""
    if path.parent.name in OTHERS or path.stem in OF_SEVERAL:
        return []
    folder = package if path.parent.name == "tests" else package / path.parent.name
    if not folder.is_dir():
        return [f"there is no {folder.name} in the package"]
    words = path.stem.removeprefix("test_").removeprefix(f"{folder.name}_").split("_")
    modules = {file.stem for file in folder.glob("*.py")}
    found = any("_".join(words[: count + 1]) in modules for count in range(len(words)))
    return [] if found else [f"{path.name} names no module of {folder.name}"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TESTS)))
def test_a_file_of_tests_is_of_a_module(path):
    assert module_faults(path, PACKAGE) == []


def test_a_file_of_no_module_is_found(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "colour_space.py").touch()
    for name, faults in (
        ("media/test_colour_space", 0),
        ("media/test_colour_space_odd", 0),
        ("media/test_media_colour_space", 0),
        ("media/test_colour", 1),
        ("attic/test_box", 1),
        ("house/test_box", 0),
    ):
        assert len(module_faults(TESTS / f"{name}.py", tmp_path)) == faults, name


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_beside_the_package_can_be_read(path):
    assert len(path.read_text().splitlines()) <= LONGER.get(str(path.relative_to(ROOT)), MOST_OF_FILE)


def test_every_exception_of_names_and_lengths_is_used():
    assert {path.stem for path in FILES} >= OF_SEVERAL and {path.parent.name for path in FILES} >= OTHERS
    assert all(len((ROOT / name).read_text().splitlines()) > MOST_OF_FILE for name in LONGER)


def set_twice(text: str) -> list[str]:
    """Names that a file sets at its top, and sets again: of two `pytestmark` only the second counts."""
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    names = [target.id for node in nodes for target in node.targets if isinstance(target, ast.Name)]
    return sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TESTS)))
def test_a_file_of_tests_sets_a_name_once(path):
    assert set_twice(path.read_text()) == []


def test_a_name_set_twice_is_found():
    assert set_twice("pytestmark = 1\nX = 2\npytestmark = 3") == ["pytestmark"]
