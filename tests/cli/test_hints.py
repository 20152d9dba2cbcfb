"""Every command that wanloom prints can be pasted: those that a command ends with run, all others are parsed."""

import argparse
import ast
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from wanloom.cli import COMMANDS, main
from wanloom.cli.hints import find_recipe, free_run_dir, generate_command, setting, train_command
from wanloom.cli.words import Parser
from wanloom.config import parse_overrides
from wanloom.data.shards import Dataset
from wanloom.data.tar import END, tar_pair
from wanloom.geometry import WAN_21
from wanloom.runs.layers import recipe_names
from wanloom.runs.recipe import build_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIZE = ["--height", "32", "--width", "32", "--frames", "5"]
NAME = "my data: it's #1 $(x) ü"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures with captions in a folder that a shell and YAML would take apart; it is the current one."""
    monkeypatch.chdir(tmp_path)
    media = tmp_path / "in"
    media.mkdir()
    for i in range(2):
        Image.new("RGB", (32, 48), (90 * i, 0, 40)).save(media / f"{i}.png")
        (media / f"{i}.txt").write_text(f'it\'s "number"\n{i}; rm -rf *')
    return media


def paste(text: str, after: str) -> list[str]:
    """The words that a shell makes of what is printed after `after`, without the name of the program."""
    lines = [line for line in text.splitlines() if after in line]
    assert len(lines) == 1, text
    words = shlex.split(lines[0].partition(after)[2])
    assert words[0] == "wanloom"
    return words[1:]


@pytest.mark.parametrize("model", ["tiny", "a model's folder"])
def test_what_a_command_ends_with_runs(folder, tiny_pipeline, capsys, model):
    if model != "tiny":
        shutil.copytree(tiny_pipeline, model)
    assert main(["prepare", str(folder), NAME, "--model", model, *SIZE]) == 0
    train = paste(capsys.readouterr().out, "Train on it with: ")
    assert main([*train, "train.steps=1", "batch.samples=2"]) == 0
    generate = paste(capsys.readouterr().out, "To make a video: ")
    assert generate[generate.index("--prompt") + 1].startswith('it\'s "number" ')
    assert main([*generate, "--steps", "1"]) == 0
    assert main(["prepare", str(folder), NAME, "--model", model, *SIZE]) == 0
    again = paste(capsys.readouterr().out, "Train on it with: ")
    assert [(a, b) for a, b in zip(train, again, strict=True) if a != b] == [
        (setting("run_dir", f"runs/{NAME}"), setting("run_dir", f"runs/{NAME}-1"))
    ]


def test_without_a_model_prepare_says_for_which_one_it_encodes(folder, capsys):
    assert main(["prepare", str(folder), "out", *SIZE]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("Without --model the samples are for `tiny`") and "--model Wan-AI/" in first
    assert main(["prepare", str(folder), "named", "--model", "tiny", *SIZE]) == 0
    assert "Without --model" not in capsys.readouterr().out


def test_a_pipeline_without_a_transformer_has_no_command(folder, tiny_pipeline, capsys):
    shutil.copytree(tiny_pipeline, "codecs", ignore=shutil.ignore_patterns("transformer"))
    assert main(["prepare", str(folder), "out", "--model", "codecs", *SIZE]) == 0
    printed = capsys.readouterr().out
    assert "wanloom train" not in printed and "has the VAE and the text encoder of codecs" in printed


@pytest.mark.parametrize(
    "value", ["data", "1e3", "null", "5", "a: b", "#x", "[x", "- x", "ü 'x' \"y\"", "x\\n", "yes", "", 7]
)
def test_a_setting_is_read_back(value):
    assert parse_overrides([setting("data.path", value)]) == {"data": {"path": value}}


def test_the_recipe_fits_the_model(tiny_pipeline, tmp_path):
    for name in recipe_names():
        model = build_run(name, []).model
        found = find_recipe(model, 4096)
        assert found is not None
        recipe, words = found
        assert build_run(recipe, []).model == model and words == []
    assert find_recipe(str(tiny_pipeline), 64) == ("tiny", [f"model={tiny_pipeline}", "init=pretrained"])
    found = find_recipe("someone/a-wan-of-mine", 4096)
    assert found is not None
    recipe, words = found
    assert build_run(recipe, words).model == "someone/a-wan-of-mine" and "1.3b" in recipe
    assert find_recipe("someone/a-wan-of-mine", 77) is None


def test_a_sample_that_is_larger_than_a_pack_raises_it(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    budget = build_run("tiny", []).batch.tokens_per_pack
    latents = torch.zeros(16, 21, 60, 104)
    for name, values in (("small", latents[:, :1, :32, :32]), ("large", latents)):
        Path(name).mkdir()
        Path(name, "x.tar").write_bytes(tar_pair("a", {"latents": values, "text": torch.zeros(2, 64)}, {}) + END)
    small = train_command(Path("small"), "tiny")
    assert small is not None and "tokens_per_pack" not in small
    words = shlex.split(train_command(Path("large"), "tiny"))
    assert words[-1] == "batch.tokens_per_pack=32760" and budget < 32760


def test_generate_is_offered_what_was_trained_on(prepared):
    row = Dataset.open(prepared[0]).rows("train")[0]
    words = shlex.split(generate_command(Path("-x"), row, WAN_21, False))
    assert words[2:4] == ["--checkpoint", "./-x"] and words[-1] == row.caption == "clip 0"
    assert words[4:10] == ["--frames", "17", "--height", "64", "--width", "64"]
    for caption in ("", " \n", "--help", "x" * 1000):
        words = shlex.split(generate_command(Path("run"), row._replace(caption=caption), None, True))
        assert words == ["wanloom", "generate", "--checkpoint", "run", "--ema", "--prompt", "a cat that runs"]


def test_a_run_dir_is_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_run_dir(Path("a/data")) == Path("runs/data")
    (tmp_path / "runs/data").mkdir(parents=True)
    assert free_run_dir(Path("a/data")) == Path("runs/data-1")


def texts(path: Path) -> list[str]:
    """Every string in a file of Python as it would be printed; what is put in is the word X."""
    tree = ast.parse(path.read_text())
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            out.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            out.append("".join(str(p.value) if isinstance(p, ast.Constant) else "X" for p in node.values))
    return out


def find_commands() -> list[str]:
    """The commands of messages (in backticks), of --help and docs (lines that begin with the name)."""
    found = []
    for path in sorted((ROOT / "wanloom").rglob("*.py")):
        for text in texts(path):
            found += re.findall(r"`(wanloom [^`]*)`", text)
            found += [line.strip().partition("   ")[0] for line in re.findall(r"^  +wanloom .*$", text, re.MULTILINE)]
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.startswith("wanloom ")]
    return sorted(set(found))


@pytest.mark.parametrize("command", find_commands())
def test_a_command_that_is_shown_can_be_given(command):
    words = shlex.split(command, comments=True)[1:]
    words = words[: words.index("|")] if "|" in words else words
    name, rest = words[0], [word for word in words[1:] if word != "..."]
    assert name in COMMANDS or name in ("COMMAND", "X", "--help")
    if name not in COMMANDS or not rest or "--help" in rest:  # only the command is meant
        return
    module = importlib.import_module(f"wanloom.cli.{name}")
    parser = Parser(f"wanloom {name}", module.HELP)
    module.add_arguments(parser)
    arguments = parser.parse_words(rest)
    assert isinstance(arguments, argparse.Namespace)
    if name == "train" and arguments.recipe in recipe_names():
        build_run(arguments.recipe, arguments.settings)


def test_the_commands_are_found():
    found = find_commands()
    assert len(found) > 15
    assert {"wanloom prepare X OUT", "wanloom show RECIPE"} < set(found), "of messages, filled in, and of help"
    assert any(command.startswith("wanloom train tiny") for command in found), "of docs"


def test_every_environment_of_the_readme_is_activated():
    """What wanloom prints begins with `wanloom`, which is a command in an activated environment alone."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert ".venv/bin/wanloom" not in "".join(blocks)
    made = [block for block in blocks if re.search(r"^(uv|python3 -m) venv\b", block, re.MULTILINE)]
    installed = [block for block in blocks if "pip install" in block]
    assert len(made) == 2 and made == installed
    assert all(".venv\n. .venv/bin/activate\n" in block or "uv venv\n. .venv/bin/activate\n" in block for block in made)
