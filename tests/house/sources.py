"""The package's files, and their nodes, which all rules look through and which are found once."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "wanloom"
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def nodes_of(text: str) -> tuple[ast.AST, ...]:
    """All nodes of a file's tree, the module first."""
    return tuple(ast.walk(ast.parse(text)))
