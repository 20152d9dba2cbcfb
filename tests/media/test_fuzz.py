"""Damaged files of every kind: each gives clips or a reason, and a folder of them is prepared to its end."""

from collections import Counter
from pathlib import Path

import pytest
from fake_encoders import IDENTITY, build_encoders

from tools.fuzz import IMAGES, VIDEOS, mutants, read_mutant, write_originals
from wanloom.geometry import WAN_21
from wanloom.media.framing import FramingConfig
from wanloom.media.video import TimingConfig
from wanloom.prepare.run import PrepareJob, encode_folder
from wanloom.prepare.settings import PrepareConfig

KINDS = {"mp4", "mov", "mkv", "avi", "webm", "wmv", "ts", "gif", "png", "jpg", "webp", "avif", "tiff"}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, as they are when prepare runs


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return write_originals(tmp_path_factory.mktemp("originals"))


def test_every_kind_is_whole_before_it_is_damaged(tmp_path: Path, originals: dict[str, bytes]) -> None:
    assert set(originals) == {*VIDEOS, *IMAGES} == KINDS
    for suffix, data in originals.items():
        (tmp_path / f"a.{suffix}").write_bytes(data)
        assert read_mutant(tmp_path / f"a.{suffix}", TimingConfig(frames=5)) == "clips", suffix


def test_damaged_files_give_clips_or_a_reason(tmp_path: Path, originals: dict[str, bytes]) -> None:
    found: Counter[str] = Counter()
    for _, suffix, data, timing in mutants(originals, seed=11, numbers=range(200)):
        path = tmp_path / f"mutant.{suffix}"
        path.write_bytes(data)
        found[read_mutant(path, timing)] += 1
    assert found["clips"] > 20 and len(found) > 10  # neither all whole nor all dead at the first byte


def test_a_folder_of_damaged_files_is_prepared_to_its_end(tmp_path: Path, originals: dict[str, bytes]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    files = {f"whole-{suffix}.{suffix}": data for suffix, data in originals.items()}
    files |= {f"m{number}.{suffix}": data for number, suffix, data, _ in mutants(originals, 12, range(39))}
    for name, data in files.items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text(f"a caption of {name}")
    config = PrepareConfig(timing=TimingConfig(frames=5), framing=FramingConfig(height=32, width=48))
    report = encode_folder(PrepareJob(source, tmp_path / "out", config, WAN_21, IDENTITY, build_encoders)).report
    dropped = {drop["file"] for drop in report["dropped"]}
    assert len(dropped) > 10 and not any(name.startswith("whole") for name in dropped)
    assert report["samples"]["total"] == len(files) - len(dropped)
