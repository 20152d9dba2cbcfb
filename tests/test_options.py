"""A config class as options: what a user types becomes the config, and texts that name settings name options."""

import argparse
from typing import Literal

import pytest
from pydantic import Field, model_validator

from wanloom.cli.words import Parser
from wanloom.config import Config
from wanloom.errors import UserError
from wanloom.options import add_options, build_flat, find_options, name_options, read_options
from wanloom.prepare.settings import PrepareConfig


class Crumb(Config):
    size: int = Field(default=3, description="in mm, 100% of it; with `is_dry` less")
    shape: Literal["round", "flat"] = Field(default="flat", description="as it lies")


class Bread(Config):
    crumb: Crumb = Field(default=Crumb(), title="inside")
    is_dry: bool = Field(default=False, title="state", description="after a day")
    salt: float = Field(default=0.0, title="state", description="in grams")
    weight: float | None = Field(default=None, title="state", description="in grams (as it comes)")
    names: str = Field(title="state", default_factory=lambda: "rye", description="of the kind (rye)")

    @model_validator(mode="after")
    def _check(self) -> "Bread":
        if self.salt > 9:
            raise ValueError(f"`salt={self.salt:g}` is too much beside `is_dry`, and no `setting`")
        return self


def parse(*words: str) -> argparse.Namespace:
    parser = Parser("bake", "Bake.")
    add_options(parser, Bread)
    return parser.parse_words(words)


def test_what_is_given_becomes_the_config_and_the_rest_keeps_its_default() -> None:
    assert read_options(parse(), Bread) == {}
    assert build_flat(Bread, {}) == Bread()
    given = read_options(parse("--size", "7", "--is-dry", "--salt", "0", "--weight", "2.5", "--shape", "round"), Bread)
    assert given == {"size": 7, "is_dry": True, "salt": 0.0, "weight": 2.5, "shape": "round"}
    built = build_flat(Bread, given)
    assert built == Bread(crumb=Crumb(size=7, shape="round"), is_dry=True, salt=0.0, weight=2.5)
    assert built.model_fields_set == {"crumb", "is_dry", "salt", "weight"}
    assert built.crumb.model_fields_set == {"size", "shape"}


def test_the_help_has_titles_descriptions_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "inside: --size N in mm, 100% of it; with --is-dry less (3) --shape {round,flat} as it lies (flat)",
        "state: --is-dry after a day --salt X in grams (0) --weight X in grams (as it comes)",
        "--names NAME of the kind (rye)",
    ):
        assert words in shown


def test_a_setting_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match=r"There is no setting 'sizes'\. Did you mean 'size'\? There are: size, shape"):
        build_flat(Bread, {"sizes": 3})
    with pytest.raises(UserError, match="The setting 'size' is 'x': it must be a whole number"):
        build_flat(Bread, {"size": "x"})


def test_texts_name_settings_and_a_command_shows_its_options() -> None:
    text = "`salt=3.5` and `is_dry`, not `other`, `x=1` or `wanloom prepare`"
    assert name_options(text, {"salt", "is_dry"}) == (
        "--salt 3.5 and --is-dry, not `other`, `x=1` or `wanloom prepare`"
    )
    parser = Parser("bake", "Bake.")
    add_options(parser, Bread)
    parser.add_argument("setting")  # no option
    told = pytest.raises(UserError, match=r"^--salt 10 is too much beside --is-dry, and no `setting`\.$")
    with told, parser.naming_options():
        build_flat(Bread, {"salt": 10.0})


def test_every_setting_of_prepare_explains_itself_under_a_title() -> None:
    options = list(find_options(PrepareConfig))
    assert len({option.name for option in options}) == len(options), "they stand side by side"
    assert all(option.title and option.field.description for option in options)
