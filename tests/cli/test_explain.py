"""Every setting is explained, and the page of settings is what the code says."""

from pathlib import Path

import pytest

from wanloom.cli import main
from wanloom.cli.explain import explain_settings
from wanloom.config import Config, section_of, setting_paths
from wanloom.runs.recipe import Run

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def undescribed(cls: type[Config]) -> list[str]:
    out = []
    for name, field in cls.model_fields.items():
        out += [name] if not field.description else []
        below = section_of(field.annotation)
        out += [f"{name}.{inner}" for inner in undescribed(below)] if below else []
    return out


def test_every_setting_has_a_description():
    assert undescribed(Run) == []

    class Bare(Config):
        x: int = 0

    assert undescribed(Bare) == ["x"]


def test_the_page_is_what_the_command_prints(capsys):
    assert main(["show", "--explain"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(), "make it anew: wanloom show --explain > docs/settings.md"
    text = explain_settings(Run)
    sections = {name for name in Run.model_fields if section_of(Run.model_fields[name].annotation)}
    assert [name for name in setting_paths(Run) if name not in sections and f"| `{name}` |" not in text] == []
    assert (
        "| `seed` | whole number >= 0 | `0` |" in text
        and "| `optimizer.betas` | list of 2 x number | `[0.9, 0.999]`" in text
    )


def test_one_section_or_setting_can_be_asked_for(capsys):
    assert main(["show", "--explain", "ema"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 3 and "ema.decay" in out
    assert main(["show", "--explain", "seed"]) == 0 and "| `seed` |" in capsys.readouterr().out
    assert main(["show", "--explain", "optimizer.lr"]) == 0
    out = capsys.readouterr().out
    assert "| `optimizer.lr` |" in out and out.count("\n") == 3
    assert main(["show", "--explain", "data.sources"]) == 0
    assert "| `data.sources.weight` |" in capsys.readouterr().out
    for words in (["tiny"], ["tiny", "seed=1"], ["optimizer", "lr"]):
        assert main(["show", *words, "--explain"]) == 2
        assert capsys.readouterr().err.startswith("wanloom: --explain takes one name, of a setting or a section, ")
    assert main(["show", "--explain", "optimizer.lrr"]) == 2
    assert capsys.readouterr().err == "wanloom: There is no setting 'optimizer.lrr'. Did you mean 'optimizer.lr'?\n"
    assert main(["show", "--explain", "emma"]) == 2
    assert capsys.readouterr().err == "wanloom: There is no setting 'emma'. Did you mean 'ema'?\n"


@pytest.mark.parametrize("words", [["show"], ["show", "--world", "2"]])
def test_show_says_what_it_needs(capsys, words):
    assert main(words) == 2
    assert "`wanloom show` needs TARGET, a recipe, a YAML file, a run folder" in capsys.readouterr().err
