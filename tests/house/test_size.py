"""The house stays small enough to read: what a command reaches, how long files and functions are, one class a name."""

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from sources import FILES, PACKAGE, ROOT, nodes_of

# lines of the files that a command imports, one through the other: how much must be read to know all that it does
MOST_LINES = {"train": 11_150, "generate": 9_160, "prepare": 10_270}
MOST_IN_ALL = 17_950
MOST_OF_FILE, MOST_OF_FUNCTION = 400, 45
# libraries that take seconds to load: what needs one is imported in a function by a file that does without
SLOW = {"torch", "diffusers", "transformers"}
EXTRAS = {"huggingface_hub", "megatron", "torch._inductor"}  # the last loads a compiler


@cache
def imports_of(text: str, inside: bool) -> set[str]:
    """What a file imports when it runs, `inside` functions or at its top; not what only types need."""
    nodes = nodes_of(text)
    checks = [node for node in nodes if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    for_types = {id(child) for node in checks for child in ast.walk(node)}
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    within = {id(child) for node in functions for child in ast.walk(node)}
    out = set()
    for node in nodes:
        if id(node) in for_types or (id(node) in within) != inside:
            continue
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            out |= {f"{node.module}"} | {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def modules_of(text: str) -> set[str]:
    """What a file imports of the package, wherever it does."""
    return {name for name in imports_of(text, True) | imports_of(text, False) if name.split(".")[0] == "wanloom"}


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def reach(start: Path) -> set[Path]:
    """The files that one file imports, and those that they import."""
    found, left = set[Path](), [start]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            if path == PACKAGE / "__init__.py":  # the door to all commands: nothing goes through it but a caller
                continue
            left += [file for module in modules_of(path.read_text()) if (file := file_of(module))]
    return found


def count_lines(paths: set[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


@pytest.mark.parametrize("command", MOST_LINES)
def test_a_command_reaches_few_lines(command):
    found = reach(PACKAGE / "cli" / f"{command}.py")
    assert count_lines(found) <= MOST_LINES[command], sorted(str(path.relative_to(PACKAGE)) for path in found)


def test_reached_files_are_found():
    """The count would be small as well if imports were not followed."""
    found = {str(path.relative_to(PACKAGE)) for path in reach(PACKAGE / "cli" / "train.py")}
    assert found >= {"cli/train.py", "train/loop.py", "parallel/context.py", "model/attention.py", "errors.py"}
    assert modules_of("if TYPE_CHECKING:\n    from wanloom.a import b\ndef f():\n    import wanloom.c") == {"wanloom.c"}


def test_the_package_does_not_grow():
    assert count_lines(set(FILES)) <= MOST_IN_ALL


def long_functions(text: str) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in nodes_of(text) if isinstance(node, kinds)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in nodes}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > MOST_OF_FUNCTION]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_OF_FILE, "longer than 400 lines: is it one room?"
    tree = nodes_of(text)[0]
    assert ast.get_docstring(tree) or not tree.body, "no docstring"
    assert long_functions(text) == []


def test_a_long_function_is_found():
    assert long_functions("def f():\n" + "    pass\n" * 45) == ["f has 46 lines"]


def test_one_class_of_a_name():
    """A word that means two things is looked up in the wrong file."""
    names = Counter(
        node.name for path in FILES for node in nodes_of(path.read_text()) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, number in names.items() if number > 1] == []


@cache
def slow_libraries(path: Path) -> frozenset[str]:
    """Those that importing a file loads, by its own imports and those of the files that it imports."""
    found, seen, left = set[str](), set[Path](), [path]
    while left:
        file = left.pop()
        if file in seen:
            continue
        seen.add(file)
        names = imports_of(file.read_text(), inside=False)
        found |= SLOW & {name.split(".")[0] for name in names}
        left += [other for name in names if (other := file_of(name)) and name != "wanloom"]
    return frozenset(found)


def hidden_imports(path: Path) -> list[str]:
    """Modules that a file imports inside functions, without a slow library that it would have to load at its top."""
    out = []
    for name in imports_of(path.read_text(), inside=True):
        target, library = file_of(name), name.split(".")[0]
        slow = slow_libraries(target) if target else SLOW & {library}
        is_module = target or library != "wanloom"  # and no name in one
        if is_module and not name.startswith(tuple(EXTRAS)) and not slow - slow_libraries(path):
            out.append(name)
    return sorted(out)


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.relative_to(PACKAGE).parts[0] not in ("cli", "__main__.py", "__init__.py")],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_imports_stand_at_the_top(path):
    assert hidden_imports(path) == []


def test_a_hidden_import_is_found(tmp_path):
    """What it does without at its top it may import where it is needed; what is quick, or there already, not."""
    path = tmp_path / "a.py"
    path.write_text("def f():\n    import torch, json\n    from wanloom.model.dit import WanDiT")
    assert hidden_imports(path) == ["json"]
    path = tmp_path / "b.py"
    path.write_text("import torch\ndef f():\n    from torch import nn\n    from wanloom.model.dit import WanDiT")
    assert hidden_imports(path) == ["torch", "torch.nn", "wanloom.model.dit"]
