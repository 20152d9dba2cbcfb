"""Names of files as people write them: one character in two forms, other cases, other folders.

In: the names of a folder. Out: the one that a written name means, or those that were nearly meant. The one decision:
a name is looked for as it is written, then by its composed form (NFC), because macOS and old archives write an accent
as a character of its own; a name that differs in any other way is never taken, only named.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath


def compose(name: str) -> str:
    """The composed form (NFC) of a name: the same for every way to write its characters."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def loose(name: str) -> str:
    """What is left of a name without its folders, its ending, case and outer blanks."""
    return compose(PurePosixPath(name).stem).casefold().strip()


class Names:
    """A set of names that is searched by written names."""

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = set(names)
        self._composed: dict[str, str] = {}
        for name in sorted(self._exact):
            self._composed.setdefault(compose(name), name)

    def find(self, written: str) -> str | None:
        """The name that `written` means, if there is one."""
        return written if written in self._exact else self._composed.get(compose(written))
