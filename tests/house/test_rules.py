"""The rules of the house: imports go down, nothing unsafe is loaded, no failure is swallowed, docs name real things."""

import ast
import re
import resource
import shlex
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml
from sources import FILES, PACKAGE, ROOT, nodes_of

from wanloom.cli import COMMANDS

TOOLS = sorted((ROOT / "tools").glob("*.py"))
FLOORS = (
    {"errors", "torch_private"},
    {
        "",
        "config",
        "devices",
        "dist",
        "files",
        "folders",
        "geometry",
        "keys",
        "memory",
        "options",
        "signals",
        "suffixes",
        "tensors",
        "terminal",
        "threads",
    },
    {"model", "codecs", "objective", "media", "data"},
    {"formats", "prepare", "variants"},
    {"parallel"},
    {"checkpoint", "train", "sample", "evaluate"},
    {"runs"},
    {"report", "demo", "cli", "__main__"},
)
# rooms of one floor do not know each other, but for these
SIDEWAYS = {
    ("dist", "devices"),
    ("dist", "signals"),
    ("folders", "files"),
    ("folders", "terminal"),
    ("options", "config"),
    ("tensors", "files"),
    ("data", "model"),
    ("objective", "model"),
    ("train", "checkpoint"),
    ("cli", "demo"),
    ("cli", "report"),
    ("__main__", "cli"),
}
# the door for Python, whose functions import the composition when they are called
UPWARD = {("", "runs"), ("", "dist")}
SHARED_MODEL_FILES = {"wanloom.model.sequence"}
FIELD_LIBRARIES = {"diffusers", "transformers"}
MAY_USE_FIELD_LIBRARIES = ("codecs/", "sample/solvers.py")
RUN_OR_LOAD = {"eval", "exec", "os.system", "yaml.load", "yaml.safe_load"}  # config.load_yaml has bounds
BANNED_NAMES = {"utils", "misc", "common", "helpers", "base", "manager"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


@cache
def imports(path: Path) -> list[str]:
    """Every module a file imports, also inside functions."""
    out = []
    for node in nodes_of(path.read_text()):
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            out += [f"{node.module}.{alias.name}" for alias in node.names]
    return out


def floor_faults(here: str, modules: list[str]) -> list[str]:
    """The imports of a file in room `here` that go up, or sideways where they may not."""
    faults = []
    for module in modules:
        if not module.startswith("wanloom."):
            continue
        there = module.split(".")[1]
        if not any(there in rooms for rooms in FLOORS):
            faults.append(f"{module}: the room '{there}' is on no floor")
            continue
        if there == here or floor(there) < floor(here) or (here, there) in UPWARD:
            continue
        sideways = floor(there) == floor(here) and (here, there) in SIDEWAYS
        if sideways and there == "model":
            sideways = ".".join(module.split(".")[:3]) in SHARED_MODEL_FILES
        if not sideways:
            faults.append(module)
    return faults


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    assert floor_faults(room(path), imports(path)) == []


def test_the_floor_check_can_fail():
    assert floor_faults("model", ["wanloom.train.loop"]) == ["wanloom.train.loop"]
    assert floor_faults("data", ["wanloom.model.dit.WanDiT"]) == ["wanloom.model.dit.WanDiT"]
    assert floor_faults("data", ["wanloom.model.sequence.Pack", "wanloom.config.Config"]) == []
    assert floor_faults("train", ["wanloom.sample.generate"]) == ["wanloom.sample.generate"]
    assert floor_faults("cli", ["wanloom.attic.box"]) == ["wanloom.attic.box: the room 'attic' is on no floor"]


def test_every_exception_is_used():
    """A row that nothing needs any more would let an import in unseen."""
    used = {path: imports(path) for path in FILES}
    pairs = {(room(path), module.split(".")[1]) for path in FILES for module in used[path] if "wanloom." in module}
    assert pairs >= SIDEWAYS | UPWARD
    for name in MAY_USE_FIELD_LIBRARIES:
        files = [path for path in FILES if str(path.relative_to(PACKAGE)).startswith(name)]
        assert any(module.split(".")[0] in FIELD_LIBRARIES for path in files for module in used[path]), name
    shared = {
        ".".join(module.split(".")[:3])
        for path in FILES
        if room(path) in ("data", "objective")
        for module in used[path]
    }
    assert shared >= SHARED_MODEL_FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_unsafe_or_silent_code(path):
    text = path.read_text()
    name = str(path.relative_to(PACKAGE))
    used = {module.split(".")[0] for module in imports(path)}
    assert not used & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}, "no pickle"
    if not name.startswith(MAY_USE_FIELD_LIBRARIES):
        assert not used & FIELD_LIBRARIES, "diffusers and transformers stay in the codecs and solvers"
    if room(path) in {"model", "objective"}:
        assert "torch.distributed" not in text, "the model knows nothing of parallelism"
    for node in nodes_of(text):
        if isinstance(node, ast.ExceptHandler):
            types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            caught = {ast.unparse(kind) if kind else "everything" for kind in types}
            assert not caught & {"everything", "Exception", "BaseException"}, f"line {node.lineno} catches {caught}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "np.load", "numpy.load"}:
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert safe.get("weights_only") == "True", f"line {node.lineno}: load tensors with weights_only=True"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in RUN_OR_LOAD:
            pytest.fail(f"line {node.lineno} runs or loads what may come from outside")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"print", "Console"} and name != "terminal.py":
            pytest.fail(f"line {node.lineno}: what is printed goes through wanloom.terminal: say or Terminal")
        if isinstance(node, ast.Attribute) and node.attr == "expanduser" and name != "config.py":
            pytest.fail(f"line {node.lineno}: config.expand_home leaves `~nobody` as it is, pathlib raises")
        if isinstance(node, ast.keyword) and node.arg == "shell":
            pytest.fail(f"line {node.value.lineno} starts a shell")


def loading_faults(text: str) -> list[str]:
    """Calls that let a library read a model folder without being told to run none of its code.

    Of what is imported from these libraries a class may be made of values; all else that is called reads files.
    """
    nodes = nodes_of(text)
    names, faults = set[str](), list[str]()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FIELD_LIBRARIES:
            names |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Import) and {alias.name.split(".")[0] for alias in node.names} & FIELD_LIBRARIES:
            faults.append(f"line {node.lineno}: import what is used, by its name")
    loads = re.compile(r"from_pretrained|from_single_file|load_config|pipeline|load_\w+_weights")
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        path = ast.unparse(node.func).split(".")
        made = path[0] in names and len(path) == 1 and path[0][:1].isupper()
        if made or not (path[0] in names or (len(path) > 1 and loads.fullmatch(path[-1]))):
            continue
        told = {word.arg: ast.unparse(word.value) for word in node.keywords}
        wanted = {"trust_remote_code": "False", "use_safetensors": "True", "local_files_only": "True"}
        if path[-1] != "from_pretrained" or not told.items() >= wanted.items():
            faults.append(f"line {node.lineno}: {'.'.join(path)}")
    return faults


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_model_folder_runs_no_code(path):
    assert loading_faults(path.read_text()) == []


def test_the_check_of_model_folders_can_fail():
    assert loading_faults("AutoTokenizer.from_pretrained(x, trust_remote_code=False)") != []
    assert (
        loading_faults("M.from_pretrained(x, trust_remote_code=y, use_safetensors=True, local_files_only=True)") != []
    )
    safe = "trust_remote_code=False, use_safetensors=True, local_files_only=True"
    for text in (
        "from transformers import pipeline\npipeline('x')",
        "import transformers\ntransformers.AutoModel.from_config(x)",
        f"from diffusers import Model\nModel.from_config(x, {safe})",
        "from diffusers import Model as M\nM.load_lora(x)",
        f"kind.from_single_file(x, {safe})",
    ):
        assert loading_faults(text) != [], text
    assert loading_faults(f"from diffusers import Model\nModel(3)\nModel.from_pretrained(x, {safe})") == []
    found = [path.name for path in FILES if "from_pretrained(" in path.read_text()]
    assert "text.py" in found, "the call that reads tokenizers is looked at"


def named_options(text: str) -> list[str]:
    """Strings that name an option of the command line."""
    strings = [node for node in nodes_of(text) if isinstance(node, ast.Constant)]
    return [
        f"line {node.lineno}: {node.value}"
        for node in strings
        if isinstance(node.value, str) and re.search(r"(?<![\w-])--[a-z]", node.value)
    ]


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) != "cli"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_a_message_below_the_command_line_names_settings(path):
    """In backticks, such as `frames=17`; the command line prints those that are its options as --frames 17."""
    assert named_options(path.read_text()) == []


def test_the_check_of_named_options_can_fail():
    assert named_options('f"leave out --max-area {x}"') == ["line 1: leave out --max-area "]
    assert named_options("x = 'such as `--mock`'") != []
    assert named_options("'`max_area` -- or so, 3--a'") == []


def unused_names(texts: dict[str, str]) -> list[str]:
    """What is defined and never named again; libraries call what is decorated or overrides something of theirs."""
    words = Counter(word for text in texts.values() for word in re.findall(r"\w+", text))
    unused = []
    for name, text in texts.items():
        nodes = nodes_of(text)
        foreign = [node.body for node in nodes if isinstance(node, ast.ClassDef) and node.bases]
        allowed = {child.name for body in foreign for child in body if isinstance(child, ast.FunctionDef)}
        for node in nodes:
            found = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list else []
            if isinstance(node, ast.Assign | ast.AnnAssign) and node in nodes[0].body:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            unused += [
                f"{name}: {word}" for word in found if words[word] == 1 and word not in allowed and word[:2] != "__"
            ]
    return unused


def test_every_name_has_a_user():
    texts = {str(path): path.read_text() for path in (*FILES, *(ROOT / "benchmarks").rglob("*.py"), *TOOLS)}
    assert [name for name in unused_names(texts) if name.startswith(str(PACKAGE))] == []


def test_the_check_of_users_can_fail():
    assert unused_names({"a": "A, B = 1, 2\ndef f(): return B\nf()\nclass C:\n    def g(self): return C"}) == [
        "a: A",
        "a: g",
    ]


def test_files_are_named_by_nouns_of_the_field():
    for path in FILES:
        assert not set(path.relative_to(PACKAGE).with_suffix("").parts) & BANNED_NAMES, path


def documents() -> list[Path]:
    pages = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
    return [*(ROOT / page for page in pages), *sorted((ROOT / "docs").glob("*.md"))]


def shown_commands(path: Path) -> list[list[str]]:
    """The words of every `wanloom ...` line in the fenced blocks of a page."""
    out = []
    for block in re.findall(r"```(?:sh|console|bash)\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if re.match(r"(\.venv/bin/)?wanloom\b", line):
                out.append(shlex.split(line, comments=True))
    return out


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.name)
def test_documented_commands_exist(path):
    """Every command in the pages is one, and every option of it is in that command's --help."""
    for words in shown_commands(path):
        if len(words) < 2 or words[1].startswith("-"):
            continue
        assert words[1] in COMMANDS, f"{path.name}: {words}"
        options = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        assert options <= known_options(words[1]) | {"--help"}, f"{path.name}: {words}"


def fenced(path: Path, kind: str) -> list[str]:
    """The blocks of a page that are of one kind."""
    return re.findall(rf"```{kind}\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.name)
def test_documented_files_can_be_read(path):
    """YAML is YAML, and a shell finds no fault with scripts and commands."""
    for block in fenced(path, "yaml"):
        assert all(isinstance(part, dict) for part in yaml.safe_load_all(block)), path.name
    for block in fenced(path, "sh"):
        result = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert result.returncode == 0 and not result.stderr, f"{path.name}: {result.stderr}"


def known_options(command: str) -> set[str]:
    import argparse
    import importlib

    parser = argparse.ArgumentParser()
    importlib.import_module(f"wanloom.cli.{command}").add_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings}


def test_links_lead_somewhere():
    for path in documents():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} points at {target}"


def test_the_map_names_what_is_there():
    """The files that the map and the guide name, and the floors as they are held here."""
    text = (ROOT / "docs" / "design.md").read_text()
    for file in re.findall(r"`([\w/]+/\w+\.(?:py|yaml))`", text + (ROOT / "CONTRIBUTING.md").read_text()):
        assert any((folder / file).is_file() for folder in (PACKAGE, ROOT)), f"the pages name {file}"
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", text, re.MULTILINE)
    rooms = {int(number): set(re.findall(r"`(\w+)`", row)) for number, row in rows}
    folders = [{name for name in rooms_ if (PACKAGE / name).is_dir() and name} for rooms_ in FLOORS]
    assert rooms == {number: folders[number] for number in range(len(FLOORS))} | {0: {"errors"}}


def test_make_targets_and_scripts_in_documents_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(path.read_text() for path in documents())
    named = set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE))
    assert {"demo", "test", "bench"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"the pages name make {target}"
    scripts = set(re.findall(r"\b((?:tools|benchmarks)/\w+\.py)", text))
    scripts |= {f"{module.replace('.', '/')}.py" for module in re.findall(r"-m (benchmarks\.\w+)", text)}
    assert scripts
    for script in scripts:
        path = ROOT / script
        assert path.is_file() or (path.with_suffix("") / "__main__.py").is_file(), f"the pages name {script}"


def test_help_is_quick():
    """The command line answers without loading torch, by the processor's time, which a busy machine does not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "wanloom", "--help"], check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    code = "import sys, wanloom.cli, wanloom.runs.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_assets_stay_small():
    total = sum(f.stat().st_size for f in (PACKAGE / "assets" / "tiny").rglob("*") if f.is_file())
    assert 0 < total < 8_000_000
