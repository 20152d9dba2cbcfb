"""What names and prompts hold never commands the terminal, on whatever way it is printed."""

import io
import logging
import os
import sys

import pytest
from rich.logging import RichHandler
from rich.table import Table

from wanloom.cli import main
from wanloom.terminal import Terminal, printable, say
from wanloom.train.progress import ProgressLine

EVIL = "a\x1b[2J\x1b]0;title\x07\x9b31m\rb\x7f\u202ec\u2028d\udce9e"
SHOWN = "a\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\rb\\x7f\\u202ec\\u2028d\\xe9e"


def test_control_characters_are_shown_and_text_is_left_alone():
    assert printable(EVIL) == SHOWN
    assert printable("Ünïcödé 猫 🦜\tx\ny") == "Ünïcödé 猫 🦜\tx\ny"


def test_every_way_of_printing_shows_them(capsys):
    out = io.StringIO()
    say(EVIL, file=out)
    console = Terminal(file=out, width=300, force_terminal=True)
    console.print(EVIL)
    table = Table(show_header=False)
    table.add_row(EVIL, "[red]x[/red] [/y] :car:")
    console.print(table)
    log = logging.getLogger("wanloom.test_terminal")
    log.addHandler(RichHandler(console=console))
    log.warning("%s", EVIL)
    with ProgressLine(0, 3, console) as progress:
        progress.say(EVIL)
    text = out.getvalue()
    assert text.count(SHOWN) == 4 and text.count("a\\x1b") == 5, text
    assert "[red]x[/red] [/y] :car:" in text
    assert not any(part in text for part in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\u2028", "\udce9"))


@pytest.mark.parametrize("words", [["train", f"x{EVIL[:-2]}"], [f"x{EVIL[:-2]}"], ["show", "tiny", f"--x{EVIL[:-2]}"]])
def test_a_mistake_with_codes_in_it_is_one_sentence(words, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("wanloom: ") and error.count("\n") == 1
    assert "\\x1b[2J" in error and not {"\x1b", "\x07", "\x9b", "\u202e"} & set(error)


def test_a_word_that_is_no_utf_8_is_one_sentence(capsys):
    assert main(["generate", "--prompt", "caf\udce9"]) == 2
    assert capsys.readouterr().err == (
        "wanloom: 'caf\\xe9' is no text in UTF-8: give the file another name, or write the text in UTF-8.\n"
    )


def test_a_reader_that_has_read_enough_is_no_mistake(monkeypatch, capsys):
    """`wanloom show tiny | head -1`: the exit code is that of a program that SIGPIPE ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["show", "tiny"]) == 141
    assert capsys.readouterr().err == ""
