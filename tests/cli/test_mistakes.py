"""What the system refuses is one sentence with the name of the file, in whichever command it happens."""

import pytest

from wanloom.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--out", "{file}"], "'{file}' cannot be used: Not a directory."),
        (["show", "{long}"], "cannot be used: File name too long."),
        (["train", "{file}/x", "run_dir=y"], "There is no recipe '{file}/x'."),
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
