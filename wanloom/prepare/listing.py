"""What a folder holds and what becomes of each file, decided before anything is encoded.

In: the input folder. Out: one `MediaEntry` per media file, sorted by path: kind, content hash, caption, split, or why
it is dropped. The one decision: the plan is a function of the folder's content alone (not of times, workers or what was
done before), so a run that was stopped finds the same plan again, and a folder that changed in between is noticed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wanloom.errors import UserError
from wanloom.files import is_special, parse_json
from wanloom.prepare.captions import Answer, Caption, Sidecars, read_captions
from wanloom.prepare.content import Stamp, hash_file, read_stamp
from wanloom.prepare.settings import PrepareConfig
from wanloom.prepare.tables import TABLES
from wanloom.suffixes import kind_of
from wanloom.terminal import is_text


@dataclass(frozen=True)
class MediaEntry:
    """One media file. `drop` is empty or the heading in the report, `reason` the sentence under it."""

    source: str  # path relative to the input folder, with '/'
    kind: str  # "video" or "image"
    size: int
    mtime_ns: int
    ctime_ns: int = 0
    sha256: str = ""  # of the content
    caption: str = ""
    caption_source: str = ""
    split: str = "train"
    drop: str = ""
    reason: str = ""

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.size, self.mtime_ns, self.ctime_ns)


@dataclass(frozen=True)
class InputPlan:
    """All files of a folder."""

    entries: list[MediaEntry]
    conflicts: dict[str, str]  # media files whose caption sources disagree
    shared: dict[str, str]  # media files whose caption is also another's
    missing: list[str]  # listed in the metadata table, not in the folder
    ignored: list[str]  # neither media nor captions
    links: list[str]  # to folders outside, not followed

    @property
    def fingerprint(self) -> str:
        """Changes when a file or a caption is added, removed or changed; not when the folder is moved or copied."""
        facts = [[e.source, e.sha256, e.caption, e.caption_source] for e in self.entries]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def to_json(self) -> bytes:
        return "".join(json.dumps(asdict(entry)) + "\n" for entry in self.entries).encode()


def read_entries(data: bytes) -> list[MediaEntry]:
    """The entries of a saved plan. Raises UserError when it is damaged."""
    try:
        return [MediaEntry(**parse_json(line)) for line in data.splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(f"The plan of the unfinished folder is damaged ({error}): prepare into a new one.") from error


def list_files(root: Path, leave_out: Path, follow_links: bool = False) -> tuple[list[str], list[str], list[str]]:
    """Visible files, hidden files and links to folders outside, as sorted paths relative to `root`.

    Links to files and to folders inside are followed, once each; others when asked.
    """
    visible, hidden, links, seen = [], [], [], set()
    inside = root.resolve()

    def fail(error: OSError) -> None:
        raise UserError(f"The folder '{error.filename}' cannot be read: {error.strerror}.")

    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen or real == str(leave_out.resolve()):
            folders.clear()
            continue
        if not follow_links and not Path(real).is_relative_to(inside):
            links.append(Path(folder).relative_to(root).as_posix())
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = (Path(folder) / name).relative_to(root).as_posix()
            (hidden if name.startswith(".") else visible).append(path)
    return sorted(visible), sorted(hidden), sorted(links)


def build_plan(
    root: Path,
    leave_out: Path,
    config: PrepareConfig,
    known: Sequence[MediaEntry],
    on_read: Callable[[int, int], None],
) -> InputPlan:
    """The plan of a folder. `known` are entries of an earlier start: unchanged files are not read again.

    Raises UserError when there is no such folder or no media in it.
    """
    if not root.is_dir():
        raise UserError(f"There is no folder '{root}' with videos or images.")
    visible, hidden, links = list_files(root, leave_out, config.follow_links)
    media = [name for name in visible if kind_of(name)]
    if not media:
        linked = f" `follow_links` takes what '{links[0]}' leads to." if links else ""
        raise UserError(f"'{root}' holds no videos or images ({len(visible)} other files).{linked}")
    mode, readable = config.timing.mode, {name for name in visible if is_text(name)}
    taken = [name for name in media if name in readable and (mode != "image" or kind_of(name) == "image")]
    captions = read_captions(root, taken, readable, config.caption_key)
    sidecars = Sidecars(visible)
    texts = {text for name in media for text in sidecars.own(name) + sidecars.common(name)} | set(TABLES)
    ignored = [name for name in visible if not kind_of(name) and name not in texts]
    entries = [_describe(root, name, mode, captions.found.get(name)) for name in media]
    entries = _add_hashes(root, entries, known, config.workers, on_read)
    entries = _split(_drop_duplicates(entries), config.val_fraction, config.seed)
    return InputPlan(entries, captions.conflicts, captions.shared, captions.missing, sorted(ignored + hidden), links)


def _describe(root: Path, name: str, mode: str, found: Answer | None) -> MediaEntry:
    """A file by its name, its caption and what the disk says, before it is read."""
    stamp = _stat(root / name)
    entry = MediaEntry(name, kind_of(name) or "", *stamp)
    if not is_text(name):
        return replace(entry, source=ascii(name)[1:-1], drop="broken", reason="its name is not valid UTF-8")
    if is_special(root / name):
        return replace(entry, drop="broken", reason="is a pipe or a device, not a file")
    if mode == "image" and entry.kind == "video":
        reason = "a video, `mode=image` takes images only (see `mode=frames`)"
        return replace(entry, drop="not taken", reason=reason)
    if not isinstance(found, Caption):
        return replace(entry, drop="captionless", reason=found.reason if found else "no caption found")
    entry = replace(entry, caption=found.text, caption_source=found.source)
    return entry if stamp.size else replace(entry, drop="broken", reason="is an empty file")


def _stat(path: Path) -> Stamp:
    try:
        return read_stamp(path.stat())
    except OSError:  # a link to nowhere: reading it will say so
        return Stamp(-1, 0, 0)


def _add_hashes(
    root: Path,
    entries: list[MediaEntry],
    known: Sequence[MediaEntry],
    workers: int,
    on_read: Callable[[int, int], None],
) -> list[MediaEntry]:
    """Read every file that may become samples once, in threads, for its sha256."""
    before = {(e.source, e.stamp): e.sha256 for e in known if e.sha256 and e.ctime_ns}

    def add(entry: MediaEntry) -> MediaEntry:
        if entry.drop:
            return entry
        if digest := before.get((entry.source, entry.stamp)):
            return replace(entry, sha256=digest)
        try:
            with (root / entry.source).open("rb") as file:
                stamp = read_stamp(os.fstat(file.fileno()))  # first: what is changed from here on has another
                return replace(entry, **stamp._asdict(), sha256=hash_file(file.fileno()))
        except OSError as error:
            return replace(entry, drop="broken", reason=f"cannot be read: {error.strerror}")

    out = []
    with ThreadPoolExecutor(workers) as pool:
        for entry in pool.map(add, entries):
            out.append(entry)
            on_read(len(out), len(entries))
    return out


def _drop_duplicates(entries: list[MediaEntry]) -> list[MediaEntry]:
    """Of files with the same content the first is kept."""
    first: dict[str, MediaEntry] = {}
    out = []
    for entry in entries:
        if not entry.drop:
            kept = first.setdefault(entry.sha256, entry)
            if kept is not entry:
                other = "" if kept.caption == entry.caption else ", with another caption"
                entry = replace(entry, drop="duplicate", reason=f"the same file as {kept.source}{other}")
        out.append(entry)
    return out


def _split(entries: list[MediaEntry], fraction: float, seed: int) -> list[MediaEntry]:
    """The val share are the files whose keyed hashes are smallest: all clips of a file are on one side."""

    def rank(entry: MediaEntry) -> bytes:
        return hashlib.blake2b(f"split:{seed}:{entry.source}".encode(), digest_size=16).digest()

    kept = sorted((entry for entry in entries if not entry.drop), key=rank)
    val = {entry.source for entry in kept[: int(len(kept) * fraction + 0.5)]}
    return [replace(entry, split="val") if entry.source in val else entry for entry in entries]
