"""The base of every config: what is read as what, and what each mistake is told."""

import time
from typing import ClassVar

import pytest
import yaml
from pydantic import Field

from wanloom.config import Config, build_config, dump_yaml, load_yaml, merge, parse_overrides
from wanloom.errors import UserError, nearest


class Inner(Config):
    rate: float = Field(default=1.0, gt=0)
    name: str | None = None


class Part(Config):
    path: str


class Outer(Config):
    steps: int
    inner: Inner = Inner()
    sizes: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()
    part: Part | None = None
    ELSEWHERE: ClassVar = {"speed": "inner.rate", "wheels": "It has none."}


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
    words = ["inner.rate=1e-4", 'inner.name="1e3"', "sizes=[1, 2]", "steps=4", "text=a=b", "nothing="]
    expected = {"inner": {"rate": 1e-4, "name": "1e3"}, "sizes": [1, 2], "steps": 4, "text": "a=b", "nothing": None}
    assert parse_overrides(words) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps", "not of the form"),
        ("=3", "not of the form"),
        ("a=[", "'a'"),
        ("a.b=1 c=2 a.b=3", "'a.b' is given twice"),
        ("a." * 40 + "b=1", "not of the form"),
    ],
)
def test_words_that_are_no_settings_are_named(word, message):
    with pytest.raises(UserError, match=message):
        parse_overrides(word.split())


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
        ({"steps": 1, "qqqq": 2}, ["There is no setting 'qqqq'. There are: steps, inner, sizes, parts, part."]),
        ({"steps": 1, "inner": {"q": 2}}, ["There is no setting 'inner.q'. 'inner' has: rate, name."]),
        ({"steps": 1, "inners": {"q": 2}}, ["There is no setting 'inners'. Did you mean 'inner'?"]),
        (
            {"steps": 1, "list": [{"q": 2}]},
            ["There is no setting 'list'. There are: steps, inner, sizes"],
        ),
        ({"steps": 1e3}, ["The setting 'steps' is 1000.0: it must be a whole number, as in 1000."]),
        ({"steps": 1, "inner": "x"}, ["'inner' is 'x': it holds several settings, rate, name: write inner.rate=..."]),
        ({"steps": 1, "sizes": "1,2"}, ["The setting 'sizes' is '1,2': it must be a list such as [1,2]."]),
        ({"steps": 1, "parts": [{"pth": "a", "path": "b"}]}, ["'parts.0.pth'. Did you mean 'parts.0.path'?"]),
        ({"steps": 1, "parts": ["a"]}, ["The setting 'parts.0' is 'a': write {path: a} for it."]),
        ({"steps": 1, "part": "a"}, ["The setting 'part' is 'a': write part.path=a."]),
        ({"steps": 1, "speed": 2.0}, ["There is no setting 'speed'. Did you mean 'inner.rate'?"]),
        ({"steps": 1, "wheels": {"n": 2}}, ["There is no setting 'wheels'. It has none."]),
        ({"steps": "x" * 999}, ["'" + "x" * 79 + "...: it must be"]),
        ({"steps": "3"}, ["The setting 'steps' is '3': it must be a whole number."]),
        ({"steps": 1.5}, ["The setting 'steps' is 1.5: "]),
        ({"steps": 1, "inner": {"rate": 0.0}}, ["The setting 'inner.rate' is 0.0: it must be above 0"]),
        ({"steps": None, "sizes": [1, "x"]}, ["The setting 'steps' is None", "The setting 'sizes.1' is 'x'"]),
    ],
)
def test_every_mistake_is_a_sentence(values, messages):
    with pytest.raises(UserError) as caught:
        build_config(Outer, values)
    assert [message for message in messages if message not in str(caught.value)] == [], str(caught.value)
    if "qqqq" in values:
        assert "Did you mean" not in str(caught.value)


def test_values_never_change():
    with pytest.raises(ValueError, match="frozen"):
        build_config(Outer, {"steps": 1}).steps = 2


def test_the_nearest_word_is_offered_only_when_it_is_near():
    assert nearest("trian", ["train", "show"]) == " Did you mean 'train'?" and nearest("xyz", ["train"]) == ""


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' is given twice"),
        ("b: {a: 1, c: {a: 1, a: 1}}", "the key 'a' is given twice"),
        ("a: &x {b: *x}", "the alias '*x' stands inside of what it names"),
        (LAUGHS, "more than 20,000 values"),
        ("[" * 100_000, "nested more than 30 deep"),
        ("- " * 99_000 + "a", "nested more than 30 deep"),
        ("x" * 1_000_000, "1,000,000 characters"),
    ],
)
def test_yaml_that_would_take_all_memory_or_hides_a_value_is_refused_at_once(text, reason):
    began = time.monotonic()
    with pytest.raises(yaml.YAMLError) as caught:
        load_yaml(text)
    assert reason in str(caught.value) and time.monotonic() - began < 2


def test_an_alias_is_what_it_names_and_a_merged_key_may_be_replaced():
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, x: 3}"
    assert load_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2}, "c": {"x": 3, "y": 2}}
