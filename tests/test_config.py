"""The base of every config: what is read as what, and what each mistake is told."""

import pytest
import yaml
from pydantic import Field

from wanloom.config import Config, UserError, build_config, dump_yaml, load_yaml, merge, nearest, parse_overrides


class Inner(Config):
    rate: float = Field(default=1.0, gt=0)
    name: str | None = None


class Outer(Config):
    steps: int
    inner: Inner = Inner()
    sizes: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        ("1e3", 1000.0),
        ("1.e2", 100.0),
        ("3", 3),
        ("0.5", 0.5),
        ("'1e-4'", "1e-4"),
        ('"1e3"', "1e3"),
        ("1e3x", "1e3x"),
        ("null", None),
        ("[1e-2, '1e-2', true]", [0.01, "1e-2", True]),
        ("{a: 1e1, b: {c: '1e1'}}", {"a": 10.0, "b": {"c": "1e1"}}),
    ],
)
def test_plain_numbers_are_numbers_and_quoted_ones_are_words(text, value):
    found = load_yaml(text)
    assert found == value and type(found) is type(value)
    assert yaml.safe_load("1e-4") == "1e-4"  # the libraries' own reading stays as it was


def test_what_is_dumped_is_read_back():
    values = {"path": "1e3", "rate": 1e-5, "text": "1.0e+2", "deep": {"list": ["3e1", 3e1, "null", None]}}
    assert load_yaml(dump_yaml(values)) == values


@pytest.mark.parametrize("text", ["!!python/object/apply:os.getcwd []", "!!python/name:os.system"])
def test_nothing_but_plain_values_is_made(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_words_of_the_command_line_become_a_mapping():
    words = ["inner.rate=1e-4", 'inner.name="1e3"', "sizes=[1, 2]", "steps=3", "steps=4", "text=a=b", "nothing="]
    expected = {"inner": {"rate": 1e-4, "name": "1e3"}, "sizes": [1, 2], "steps": 4, "text": "a=b", "nothing": None}
    assert parse_overrides(words) == expected


@pytest.mark.parametrize(("word", "message"), [("steps", "not of the form"), ("=3", "not of the form"), ("a=[", "'a'")])
def test_words_that_are_no_settings_are_named(word, message):
    with pytest.raises(UserError, match=message):
        parse_overrides([word])


def test_mappings_are_merged_and_left_alone():
    base, over = {"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"y": 3}, "b": [2], "c": {"z": 1}}
    assert merge(base, over) == {"a": {"x": 1, "y": 3}, "b": [2], "c": {"z": 1}}
    assert base == {"a": {"x": 1, "y": 2}, "b": [1]} and over == {"a": {"y": 3}, "b": [2], "c": {"z": 1}}


def test_lists_become_tuples():
    config = build_config(Outer, {"steps": 2, "sizes": [3, 4]})
    assert config == Outer(steps=2, sizes=(3, 4))


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({}, ["The setting 'steps' is required."]),
        ({"steps": 1, "inner": {"rtae": 2.0}}, ["There is no setting 'inner.rtae'. Did you mean 'inner.rate'?"]),
        ({"steps": 1, "rate": 2.0}, ["There is no setting 'rate'. Did you mean 'inner.rate'?"]),
        ({"steps": 1, "qqqq": 2}, ["There is no setting 'qqqq'."]),
        ({"steps": "3"}, ["The setting 'steps' is '3': input should be a valid integer."]),
        ({"steps": 1.5}, ["The setting 'steps' is 1.5: "]),
        ({"steps": 1, "inner": {"rate": 0.0}}, ["The setting 'inner.rate' is 0.0: input should be greater than 0."]),
        ({"steps": None, "sizes": [1, "x"]}, ["The setting 'steps' is None", "The setting 'sizes.1' is 'x'"]),
    ],
)
def test_every_mistake_is_a_sentence(values, messages):
    with pytest.raises(UserError) as caught:
        build_config(Outer, values)
    assert all(message in str(caught.value) for message in messages)
    if "qqqq" in values:
        assert "Did you mean" not in str(caught.value)


def test_values_never_change():
    with pytest.raises(ValueError, match="frozen"):
        build_config(Outer, {"steps": 1}).steps = 2


def test_the_nearest_word_is_offered_only_when_it_is_near():
    assert nearest("trian", ["train", "show"]) == " Did you mean 'train'?" and nearest("xyz", ["train"]) == ""
