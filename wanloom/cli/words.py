"""The words after a command, read by argparse: a mistake is one sentence with what was meant, and nothing is guessed.

In: a command's HELP and arguments. Out: a namespace, or a UserError. Prefixes of options are no options. An option
whose value may be left out takes the next word only if it begins with a digit, so that `--mock` can stand anywhere.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from wanloom.config import expand_home
from wanloom.errors import UserError, cut, nearest_word
from wanloom.options import name_options


class Parser(argparse.ArgumentParser):
    """Reads the words of one command."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.register("type", Path, lambda text: Path(expand_home(text)))  # a shell leaves `--out=~/videos` as it is

    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments. Raises UserError for a mistake; `--help` prints and leaves."""
        arguments, rest = self.parse_known_intermixed_args(self._with_values(words))
        if rest:
            raise UserError(self._explain_unknown(rest))
        return arguments

    @contextmanager
    def naming_options(self) -> Iterator[None]:
        """A block whose mistakes name settings: those that are options of this command are told as such."""
        try:
            yield
        except UserError as error:
            raise UserError(self.name_options(str(error))) from error

    def name_options(self, text: str) -> str:
        """`text` with the options of this command for the settings that it names."""
        return name_options(text, {action.dest for action in self._actions if action.option_strings})

    def error(self, message: str) -> NoReturn:
        """What argparse has to say, as a sentence."""
        if "arguments are required" in message and not message.startswith("one of"):
            needed = [action for action in self._actions if action.required and action.nargs != "*"]
            needs = " and ".join(f"{action.metavar or action.dest}, {action.help}" for action in needed)
            example = re.search(r"^ +(wanloom .*?)(  |$)", self.description or "", re.MULTILINE)
            shown = f", for example: {example[1]}" if example else "."
            raise UserError(f"`{self.prog}` needs {needs}{shown}")
        message = message.removeprefix("argument ").rstrip(".")
        raise UserError(f"{message[0].upper()}{message[1:]}. `{self.prog} --help` explains it.")

    def _with_values(self, words: Sequence[str]) -> list[str]:
        optional = {name: action for action in self._actions if action.nargs == "?" for name in action.option_strings}
        out = []
        for word, after in zip(words, [*words[1:], ""], strict=False):
            bare = word in optional and not after[:1].isdigit()
            out.append(f"{word}={optional[word].const}" if bare else word)
        return out

    def _explain_unknown(self, rest: Sequence[str]) -> str:
        """On words that no argument takes; `rest` may hold the values of unknown options too."""
        at = next((i for i, word in enumerate(rest) if word.startswith("-")), None)
        if at is None:
            return f"'{cut(rest[0])}' is one word too many: `{self.prog} --help` shows what is expected."
        name, separator, value = rest[at].partition("=")
        if not separator and rest[at + 1 :] and not rest[at + 1].startswith("-") and "=" not in rest[at + 1]:
            value = rest[at + 1]
        known = [option for action in self._actions for option in action.option_strings]
        if near := nearest_word(name, known):
            return f"There is no option '{name}'. Did you mean '{near}'?"
        if any(action.dest == "settings" for action in self._actions):
            return explain_setting(name, value)
        return f"There is no option '{name}': `{self.prog} --help` lists them."


def explain_setting(option: str, value: str) -> str:
    """On an option that is one in other trainers, where wanloom has a setting."""
    from wanloom.config import meant
    from wanloom.runs.recipe import Run

    found = meant(Run, option.lstrip("-").replace("-", "_"))
    if found and " " not in found:
        return f"There is no option '{option}': settings are words without dashes, {found}={value or '...'}"
    return f"There is no option '{option}'. {found or 'Settings are words such as train.steps=100.'}"
