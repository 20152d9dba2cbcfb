"""The border to the terminal: what is printed holds no commands for it.

In: sentences and tables, in which names of files, captions, prompts and configs of others stand. Out: the same, with
every control character as a visible escape (`\\x1b`), on stdout or stderr. The one decision: every print of wanloom is
`say` or a `Terminal`, which a house test checks, so that nobody has to think of where a name came from.
"""

import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.segment import Segment
from rich.text import Text

# C0 but for tab and newline, DEL and C1; marks that change the direction of what follows; halves of a character
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` without anything that a terminal would obey; tabs and newlines stay."""
    return CONTROL.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file's name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def plural(number: int, noun: str) -> str:
    """`1 frame`, `5 frames`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def is_text(word: str) -> bool:
    """Whether a word of the command line is UTF-8: Python holds its bytes as halves of characters where it is not."""
    return not any("\ud800" <= character <= "\udfff" for character in word)


def say(text: str = "", file: TextIO | None = None, end: str = "\n") -> None:
    """Print a line, at once, on stdout if no other file is given."""
    print(printable(text), file=file or sys.stdout, end=end, flush=True)


def note(text: str) -> None:
    """A line beside the results; of several processes, that find the same, one says it."""
    if os.environ.get("RANK", "0") == "0":
        say(f"note: {text}", sys.stderr)


def show_log(console: Console) -> None:
    """What the parts have to say, such as a folder that is scanned for its index, goes to a terminal too: the last."""
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, RichHandler)]
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("wanloom").setLevel(logging.INFO)


class Terminal(Console):
    """rich's console for texts of others: what stands in brackets or between colons is no markup and no emoji."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Made printable before it is laid out, where control characters count as nothing."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of text are made printable; rich's own codes are segments of another kind and pass."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def let_go(stream: TextIO) -> None:
    """Let a stream that takes nothing more, such as a closed pipe, swallow the rest: Python tries again at its end."""
    try:
        handle = stream.fileno()
    except io.UnsupportedOperation:
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, handle)
    os.close(nothing)


class Outlet(io.TextIOBase):
    """Standard output that ends no run: when it takes nothing more, `error` says why and the rest is dropped."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] - rich asks for it
        return self._stream.encoding

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        return self.error is None and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _try(self, action: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            action()
        except OSError as error:
            self.error = error
            let_go(self._stream)
