"""What the system refuses is one sentence with the name of the file, in whichever command it happens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wanloom.cli import main
from wanloom.cli.words import Parser

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--out", "{file}"], "'{file}' cannot be used: Not a directory."),
        (["show", "{long}"], "cannot be used: File name too long."),
        (["train", "{file}/x", "run_dir=y"], "There is no file '{file}/x' (in "),
        (["train", "tiny", "--mock=1x64x64", "run_dir={file}/x"], "cannot be written: Not a directory."),
    ],
)
def test_a_refused_file_is_one_sentence(tmp_path, capsys, arguments, message):
    names = {"file": str(tmp_path / "file"), "long": "x" * 5000}
    (tmp_path / "file").write_text("mine")
    assert main([word.format(**names) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wanloom: ") and message.format(**names) in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_reason_without_a_file_is_said_too(capsys, monkeypatch):
    def refuse(arguments):
        raise ConnectionError("the disk far away does not answer")

    monkeypatch.setattr("wanloom.cli.show.run", refuse)
    assert main(["show", "tiny"]) == 2
    assert capsys.readouterr().err == "wanloom: the disk far away does not answer.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "clips", "d1", "--hieght", "64"], "There is no option '--hieght'. Did you mean '--height'?"),
        (
            ["prepare", "clips", "d1", "--heig", "64"],
            "There is no option '--heig'. Did you mean '--height'?",
        ),
        (["train", "tiny", "--steps", "10"], "'--steps': settings are words without dashes, train.steps=10"),
        (["train", "tiny", "--steps=10"], "'--steps': settings are words without dashes, train.steps=10"),
        (["train", "tiny", "--lr", "x=1"], "'--lr': settings are words without dashes, optimizer.lr=..."),
        (["train", "tiny", "--data", "d", "--run_dir", "r"], "settings are words without dashes, data.path=d"),
        (["train", "tiny", "--run-dir", "r"], "settings are words without dashes, run_dir=r"),
        (["train", "tiny", "--wandb"], "There is no option '--wandb'. There is no wandb"),
        (["train"], "`wanloom train` needs RECIPE, a shipped recipe or a YAML file, for example: wanloom train tiny"),
        (["show"], "`wanloom show` needs TARGET, a recipe, a YAML file, a run folder"),
        (["generate", "--prompt", "x", "--steps", "many"], "--steps: invalid int value: 'many'."),
        (["convert", "run", "out", "more"], "'more' is one word too many"),
        (["--nproc", "2", "train"], "There is no option '--nproc'"),
        (["help", "trian"], "There is no command 'trian'. Did you mean 'train'?"),
    ],
)
def test_a_mistake_in_the_words_names_what_was_meant(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("wanloom: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [["help", "train"], ["train", "--help"], ["help"], ["--help"]])
def test_help_is_asked_for_as_elsewhere(capsys, words):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0 and ("RECIPE" in (out := capsys.readouterr().out) or "commands:" in out)


def test_the_home_folder_is_meant_in_options_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    parser = Parser("x", None)
    group = parser.add_argument_group("more")
    group.add_argument("--out", type=Path)
    parser.add_argument("name", type=Path)
    found = parser.parse_words(["--out=~/videos", "a~b"])
    assert (found.out, found.name) == (Path("/home/u/videos"), Path("a~b"))


WRONG = """
train tiny run_dir=x data.path=nowhere
train tiny run_dir=x --mock optimizer.lr=-1
train tiny run_dir=x --mock --nproc 2 init=pretraned
train tiny run_dir=x --mock --nproc 0
train tiny run_dir=x --mock model=nowhere
show tiny train.steps=0
show tiny model=nowhere
show tiny data.path=nowhere
show tiny --world 0
show nowhere
show clips seed=1
show --explain nowhere
show --explain --world 2
prepare clips out --hieght 64
prepare clips out --height 50 --width 64
prepare clips out --frames 16
prepare clips out --fps fast
prepare clips out --keep-aspect
prepare clips out --val-fraction 1
prepare clips out --crop middle
prepare clips out --clips-per-video 2
prepare clips out --val-fraction 0 --seed 3
prepare clips out --model nowhere
prepare clips out --nproc -1
prepare nowhere out
prepare clips clips
convert nowhere out
convert clips out
convert clips clips
convert clips out --layout other
demo --seed -1
demo --sed 1
demo --out clips
generate --prompt x --device cud
generate --prompt x --device cuda:0 --nproc 2
generate --prompt x --kernel flsh
generate --prompt x --model nowhere
generate --prompt x --checkpoint clips
generate --prompt x --tp 0
generate --prompt x --height 50 --width 64
generate --prompt x --frames 16
generate --prompt x --guidance 1 --negative y
"""
# each on a line of its own: its exit code, whether torch is loaded by now, and what it said
TRY = """
import contextlib, io, json, sys
from wanloom.cli import main
for line in sys.stdin.read().splitlines():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(line.split())
    print(json.dumps([line, code, "torch" in sys.modules, said.getvalue()]))
"""


def test_a_mistake_is_told_before_torch_is_loaded(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.txt").write_text("mine")
    words = [sys.executable, "-c", TRY]
    done = subprocess.run(words, cwd=tmp_path, input=WRONG.strip(), capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line, *_ in told] == WRONG.strip().splitlines()
    for line, code, has_torch, said in told:
        assert code == 2 and not has_torch and said.startswith("wanloom: ") and said.count("\n") == 1, (line, said)
    assert [path.name for path in tmp_path.rglob("*")] == ["clips", "a.txt"]


def test_a_valid_command_shows_a_sign_of_life_before_torch_is_loaded(tmp_path):
    (tmp_path / "clips").mkdir()
    code = """
import sys, wanloom.cli as cli
cli._run_one = lambda run: print(run.func.__module__, "torch" in sys.modules, file=sys.stderr) or 0
for line in sys.stdin.read().splitlines():
    assert cli.main(line.split()) == 0
"""
    lines = ["train tiny --mock run_dir=x", "prepare clips out", "demo", "show tiny", "generate --prompt x"]
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, input="\n".join(lines), capture_output=True, text=True, timeout=120)
    names = [line.split()[0] for line in lines]
    assert done.stderr.splitlines() == [
        said
        for name in names
        for said in (f"wanloom {name}: loading PyTorch takes some seconds.", f"wanloom.cli.{name} False")
    ]


SWALLOWS = """
import os, signal, sys
import wanloom.cli.show
from wanloom.__main__ import run

def show(arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
    print("went on")
    raise AttributeError("module 'numpy' has no attribute 'ma'")

wanloom.cli.show.run = show
sys.argv = ["wanloom", "show", "tiny"]
sys.exit(run())
"""


def test_ctrl_c_inside_of_an_import_is_no_traceback(tmp_path):
    """C code may lose the exception, and what fails after it is another one, or nothing is."""
    done = subprocess.run([sys.executable, "-c", SWALLOWS], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "wanloom show: loading PyTorch takes some seconds.\n\nwanloom: Stopped.\n"


def test_ctrl_c_while_the_words_are_read_is_no_traceback(capsys, monkeypatch):
    def check(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("wanloom.cli.show.check", check)
    assert main(["show", "tiny"]) == 130
    assert capsys.readouterr().err == "wanloom: Stopped.\n"
