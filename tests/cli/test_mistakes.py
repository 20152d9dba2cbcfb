"""What the system refuses is one sentence with the name of the file, in whichever command it happens."""

import pytest

from wanloom.cli import main


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
    assert main(["show", "x"]) == 2
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
