"""Tests say once what they are: what is slow stays out of `make quick`."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("test_*.py"))


def test_no_two_files_of_tests_have_one_name():
    """pytest cannot collect both, and a run of one folder does not show it."""
    names = [path.name for path in FILES]
    assert sorted({name for name in names if names.count(name) > 1}) == []


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
