"""What the system refuses is one sentence with the name of the file, in whichever command it happens."""

import subprocess
import sys
from pathlib import Path

import pytest

from wanloom.cli import main
from wanloom.cli.words import Parser


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


@pytest.mark.parametrize(
    "words",
    [
        ["train", "tiny", "run_dir=x", "data.path=nowhere"],
        ["train", "tiny", "run_dir=x", "--mock", "optimizer.lr=-1"],
        ["train", "tiny", "run_dir=x", "--mock", "--nproc", "2", "init=pretraned"],
        ["show", "tiny", "train.steps=0"],
        ["prepare", "nowhere", "out"],
        ["prepare", ".", "out", "--frames", "80"],
        ["prepare", ".", "out", "--height", "481", "--width", "832"],
        ["prepare", ".", "out", "--keep-aspect"],
        ["prepare", ".", "out", "--val-fraction", "1"],
    ],
)
def test_a_mistake_is_told_before_torch_is_loaded(tmp_path, words):
    code = "import sys; from wanloom.cli import main; sys.exit(main(sys.argv[1:]) + 40 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "loading" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_valid_command_shows_a_sign_of_life_before_torch_is_loaded(tmp_path):
    code = (
        "import sys, wanloom.cli.train as train; from wanloom.cli import main;"
        "train.run = lambda arguments: 40 * ('torch' in sys.modules); sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", "tiny", "--mock", "run_dir=x"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "wanloom train: loading PyTorch takes some seconds.\n"


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
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nwanloom: Stopped.\n")


def test_ctrl_c_while_the_words_are_read_is_no_traceback(capsys, monkeypatch):
    def check(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("wanloom.cli.show.check", check)
    assert main(["show", "tiny"]) == 130
    assert capsys.readouterr().err == "wanloom: Stopped.\n"
