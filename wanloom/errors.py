"""A mistake of the user in one sentence, which is printed without a traceback, and the words of such sentences.

In: a text, an error, known words. Out: a sentence, the word that was nearly meant. The one decision: whoever can say
what to do about it raises `UserError` with the whole sentence; nobody above adds to it.
"""

from collections.abc import Sequence

MOST_REASON = 300  # characters of what is wrong with a config, in which somebody may have made a long list


class UserError(Exception):
    """A mistake or a limit that the user can do something about; the message says what."""


def sentence_of(error: UserError | OSError) -> str:
    """What to tell the user of an error."""
    if isinstance(error, UserError):
        return str(error)
    name = "" if error.filename is None else f"'{error.filename}' cannot be used: "
    return f"{name}{error.strerror or error}."


def nearest(word: str, known: Sequence[str]) -> str:
    """`" Did you mean 'x'?"` for the known word that a slip of the fingers makes, or an empty string."""
    near = nearest_word(word, known)
    return f" Did you mean '{near}'?" if near else ""


def nearest_word(word: str, known: Sequence[str]) -> str | None:
    """The known word that is a letter or so away; a suggestion that misleads is worse than none."""
    near = min(((distance(word.lower(), name.lower()), name) for name in known), default=(0, ""))
    return near[1] if near[1] and near[0] <= max(1, len(word) // 3) else None


def distance(a: str, b: str) -> int:
    """Letters to add, leave out, replace or swap with the next one to make `b` of `a` (restricted Damerau-Levenshtein).

    Words of other lengths are not compared letter by letter: the difference alone makes them far.
    """
    if abs(len(a) - len(b)) > max(1, len(a) // 3):
        return max(len(a), len(b))
    before, row = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]


def cut(text: str, most: int = 80) -> str:
    """The begin of a text that may be long."""
    return text if len(text) <= most else f"{text[:most]}..."
