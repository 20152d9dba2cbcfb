"""Who is to blame: what a decoder raises is the file's drop, what is ours, the disk's or the machine's goes on."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import write_numbers
from PIL import Image
from test_video import native, read

from wanloom.errors import UserError
from wanloom.media import decoding as decoding_module
from wanloom.media.container import MediaFile
from wanloom.media.decoding import Decoding, MediaError

ERRORS = (
    ValueError("a"),
    KeyError("a"),
    IndexError("list index out of range"),
    AttributeError("a"),
    TypeError("a"),
    ZeroDivisionError("a"),
    RecursionError("a"),
    SystemError("a"),
    MemoryError(),
    OSError(5, "Input/output error"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    struct.error("unpack requires a buffer of 4 bytes"),
    UserWarning("Corrupt EXIF data"),
)


def foreign(module: str, filename: str = "<made>") -> Callable[[Callable[[], Any]], Any]:
    """A function that calls another one from inside of a library; compiled modules have no name in their frames."""
    space: dict[str, Any] = {"__name__": module} if module else {}
    exec(compile("def call(work): return work()", filename, "exec"), space)
    return space["call"]


def own(work: Callable[[], Any]) -> Any:
    space: dict[str, Any] = {"__name__": "wanloom.media.picture"}
    exec("def call(work): return work()", space)
    return space["call"](work)


def fail(error: Exception) -> Callable[[], None]:
    """A failure below the last line of a known package, as of the standard library."""

    def work() -> None:
        raise error.with_traceback(None)  # the one of its latest raise

    return work


LIBRARIES = (foreign("PIL.Image"), foreign("", "av/container/core.py"))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_library_raises_is_the_files_drop(tmp_path: Path, library: Callable, error: Exception) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    with pytest.raises(MediaError, match=r"^cannot be decoded: .") as caught, Decoding(path):
        own(lambda: library(fail(error)))
    assert caught.value.kind == "broken" and caught.value.__cause__ is error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_is_ours_goes_on(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    works = (
        fail(error),  # called by us, beside the libraries
        lambda: LIBRARIES[0](lambda: own(fail(error))),  # called back by a library
    )
    for work in works:
        with pytest.raises(type(error)) as caught, Decoding(path):
            own(work)
        assert caught.value is error


def test_a_stop_is_no_drop(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Decoding(tmp_path / "a.mp4"):
        LIBRARIES[0](stop)


def test_a_file_that_cannot_be_read_any_more_is_no_drop(tmp_path: Path) -> None:
    for name in ("gone.mp4", "gone.png"):
        with pytest.raises(UserError, match=r"gone\.(mp4|png)' cannot be read any more: No such file"):
            read(tmp_path / name)


def test_a_machine_without_memory_is_no_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    monkeypatch.setattr(decoding_module, "SPARE", 1 << 60)
    with pytest.raises(MemoryError), Decoding(path):
        LIBRARIES[0](fail(MemoryError()))


def test_long_words_of_a_library_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    with pytest.raises(MediaError) as caught, Decoding(path):
        LIBRARIES[0](fail(ValueError("much " * 1000 + "\nmore")))
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_a_mistake_of_ours_ends_the_run(tmp_path: Path, name: str) -> None:
    """Also when it is made on the way that a decoder's failure takes."""
    if name == "a.png":
        Image.new("RGB", (64, 48)).save(tmp_path / name)
    else:
        write_numbers(tmp_path / name, 5)

    def choose(width: float, height: float, number: int) -> Any:
        return {}["no such setting"]

    with pytest.raises(KeyError):
        read(tmp_path / name, choose, frames=1)


def test_pictures_that_no_decoder_is_for(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a.mkv", 5, codec="ffv1")
    path.write_bytes(path.read_bytes().replace(b"V_FFV1", b"V_NONE"))
    for timing in ({"frames": 1}, {"mode": "frames"}):
        with pytest.raises(MediaError, match="in a format that no decoder is for"):
            read(path, **timing)


def test_planes_of_an_avif_that_cannot_be_decoded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "a.avif")
    whole = (tmp_path / "a.avif").read_bytes()
    start = whole.index(b"mdat") + 4
    (tmp_path / "b.avif").write_bytes(whole[:start] + b"\xff" * (len(whole) - start))
    with pytest.raises(MediaError, match=r"cannot be decoded: .*(planes|frame)"):
        read(tmp_path / "b.avif", native)


def test_a_file_that_was_given_up_has_an_end(tmp_path: Path) -> None:
    """The library prints what a reader on another thread raises."""
    (tmp_path / "a.mp4").write_bytes(b"abc")
    with MediaFile(tmp_path / "a.mp4") as file:
        assert file.read(2) == b"ab" and file.seek(1) == 1
    assert file.read(2) == b"" and file.seek(1) < 0
