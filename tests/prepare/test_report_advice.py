"""The lines under the report: which option takes most of what was left out."""

import json
import os
from dataclasses import replace
from pathlib import Path

from fake_encoders import IDENTITY, build_encoders
from media_files import write_numbers, write_stream
from rich.console import Console

from wanloom.cli.prepare_report import print_report
from wanloom.geometry import WAN_21
from wanloom.media.framing import FramingConfig
from wanloom.media.video import TimingConfig
from wanloom.prepare.report import advise_clips, advise_frames, advise_short
from wanloom.prepare.run import PrepareJob, encode_folder
from wanloom.prepare.settings import PrepareConfig


def test_the_frames_that_take_nine_of_ten() -> None:
    assert advise_frames([], 81, WAN_21) == []
    assert advise_frames([80], 81, WAN_21) == ["1 video is too short for `frames=81`: `frames=77` takes it."]
    assert advise_frames([80] * 9 + [6], 81, WAN_21) == [
        "10 videos are too short for `frames=81`: `frames=77` takes 9 of them."
    ]
    three = ["3 videos are too short for `frames=81`: `frames=37` takes 3 of them."]
    assert advise_frames([80, 60, 40], 81, WAN_21) == three
    mixed = ["4 videos are too short for `frames=81`: `frames=9` takes 2 of them."]
    assert advise_frames([80, 12, 3, 1], 81, WAN_21) == mixed
    single = ["2 videos are too short for `frames=81`: `mode=frames` takes single pictures of them."]
    assert advise_frames([3, 1], 81, WAN_21) == single
    assert advise_frames([80], 81, replace(WAN_21, frames=8)) == [
        "1 video is too short for `frames=81`: `frames=73` takes it."
    ]


def test_a_short_video_is_told_what_takes_it() -> None:
    assert [advise_short(frames, WAN_21) for frames in (20, 4)] == [
        "`frames=17` takes it",
        "`mode=frames` takes single pictures of it",
    ]


def test_minutes_that_the_first_clips_leave() -> None:
    assert advise_clips({"a": (5.0, 9.9), "b": (5.0, 5.0)}, 5.0) == []  # no other clip would fit
    (line,) = advise_clips({"a": (5.0, 605.0), "b": (5.0, 11.0), "c": (5.0, 6.0)}, 5.0)
    assert line == (
        "`clips=first` takes one clip from the start of a video and leaves 10.1 minutes of 2 videos out, by their "
        "headers: `clips=all` takes them, `clips=uniform` a few clips spread over each."
    )


def test_prepare_says_what_would_take_more(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name, count in (("long.mp4", 120), ("12:30.mp4", 16), ("http:/short.mkv", 15), ("tiny.mp4", 3)):
        write_numbers(source / name, count).with_suffix(".txt").write_text(name)
    # clocks that jump, in the first clip and after it, make headers say nonsense
    for name, parts in (("near.ts", [(0, 12, 1), (12, 18, 102)]), ("far.ts", [(0, 23, 100), (23, 8, 1)])):
        write_stream(source / name, *parts).with_suffix(".txt").write_text(name)
        (source / name).with_suffix(".part.mp4").unlink()
    config = PrepareConfig(timing=TimingConfig(frames=21), framing=FramingConfig(height=32, width=48))
    report = encode_folder(PrepareJob(source, tmp_path / "out", config, WAN_21, IDENTITY, build_encoders)).report
    assert report["samples"]["total"] == 3
    reasons = {drop["file"]: drop["reason"] for drop in report["dropped"]}
    assert reasons == {
        "12:30.mp4": "has 16 frames at 16 fps, 21 are asked for; `frames=13` takes it",
        "http:/short.mkv": "has 15 frames at 16 fps, 21 are asked for; `frames=13` takes it",
        "tiny.mp4": "has 3 frames at 16 fps, 21 are asked for; `mode=frames` takes single pictures of it",
    }
    with open(os.devnull, "w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        print_report(json.loads((tmp_path / "out/report.json").read_text()), console)
    text = console.export_text()
    assert "3 videos are too short for --frames 21: --frames 13 takes 2 of them." in text
    assert "leaves 0.1 minutes of 1 video out" in text  # 7.5 s, of which the clip has 1.3
