"""Order and clocks: which picture is shown when, where the container does not say or says it wrongly."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import B_FRAMES, numbered, read_number, remux, shift, write_numbers, write_stream, write_video

from wanloom.media import player as player_module
from wanloom.media.clock import DISORDER, JUMPS, scan
from wanloom.media.container import MediaFile
from wanloom.media.decoding import MediaError
from wanloom.media.framing import Crop
from wanloom.media.picture import Clip
from wanloom.media.video import HELD, TimingConfig, play_through, read_clips


def native(width: float, height: float, number: int) -> Crop:
    size = (round(width), round(height))
    return Crop(size, (0, 0), size)


def read(path: Path, **timing) -> list[Clip]:
    return list(read_clips(path, "video", TimingConfig(**timing), native))


def numbers(clip: Clip) -> list[int]:
    return [read_number(picture) for picture in clip.pixels]


@pytest.mark.parametrize("suffix", ["avi", "wmv", "ts", "mkv", "mov", "flv"])
def test_pictures_come_in_the_order_of_showing(tmp_path: Path, suffix: str) -> None:
    """avi and wmv have decode stamps alone."""
    whole = write_numbers(tmp_path / "a.mp4", 30, options=B_FRAMES)
    # the muxer of avi wants start codes, which a transport stream has
    path = remux(remux(whole, tmp_path / "a.ts"), tmp_path / f"b.{suffix}")
    (clip,) = read(path, frames=29)
    assert numbers(clip) == list(range(29))
    assert clip.notes == []
    spread = read(path, frames=5, clips="uniform", clips_per_video=3)
    assert [numbers(c)[0] for c in spread] in ([0, 12, 25], [0, 12, 24])
    assert all(np.diff(numbers(c)).tolist() == [1] * 4 for c in spread)
    assert [numbers(c) for c in read(path, mode="frames", frames_per_video=30)] == [[n] for n in range(30)]


@pytest.mark.parametrize("suffix", ["avi", "wmv", "h264"])
def test_jumps_by_decode_stamps_or_none(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In open groups of pictures the first ones after a key picture are not shown when decoding begins there."""
    options = {**B_FRAMES, "x264-params": "open-gop=1:keyint=12:min-keyint=12"}
    whole = write_numbers(tmp_path / "a.mp4", 31, options=options)
    path = remux(remux(whole, tmp_path / "a.ts"), tmp_path / f"b.{suffix}")
    expected = read(path, mode="frames", frames_per_video=4)
    monkeypatch.setattr(player_module, "FAR", 0.3)
    found = read(path, mode="frames", frames_per_video=4)
    assert [numbers(c) for c in found] == [numbers(c) for c in expected] == [[3], [11], [19], [27]]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_decode_stamps_given_as_stamps_of_showing(tmp_path: Path, suffix: str) -> None:
    def forget(i: int, packet: av.Packet) -> bool:
        assert packet.dts is not None
        packet.dts += round(Fraction(1, 8) / packet.time_base)
        packet.pts = packet.dts
        return True

    path = remux(write_numbers(tmp_path / "a.mp4", 30, options=B_FRAMES), tmp_path / f"b.{suffix}", forget)
    (clip,) = read(path, frames=25)
    assert clip.notes == [DISORDER]
    got = numbers(clip)
    assert got == sorted(got) and max(np.diff(got)) == 1  # only the first group is held before it is noticed
    assert got[-1] >= 21 and len(set(got)) >= 22


@pytest.mark.parametrize(("first", "second"), [(1, 102), (100, 1), (1, 1), (5, 4.5)])
def test_a_clock_that_jumps_is_bridged_and_noted(tmp_path: Path, first: float, second: float) -> None:
    """Forward, back over zero, a restart, a little back: 30 pictures are 30 pictures."""
    path = write_stream(tmp_path / "a.ts", (0, 15, first), (15, 15, second))
    clips = read(path, frames=5, clips="all")
    assert [n for clip in clips for n in numbers(clip)] == list(range(30))
    assert [clip.start for clip in clips] == [pytest.approx(5 / 16 * i, abs=1e-4) for i in range(6)]
    assert clips[0].notes == [] and clips[-1].notes == [JUMPS]
    assert all(clip.notes == [JUMPS] for clip in clips if max(numbers(clip)) >= 15)
    spread = read(path, frames=5, clips="uniform", clips_per_video=3)
    assert [numbers(clip)[0] for clip in spread] == [0, 12, 25]
    assert [numbers(c) for c in read(path, mode="frames", frames_per_video=3)] == [[5], [15], [25]]
    with MediaFile(path) as file:
        assert not scan(file).whole
        extent = play_through(file)
    assert float(extent.seconds) == pytest.approx(30 / 16, abs=0.01) and extent.pictures == 30


def test_a_whole_stream_has_no_note(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "a.ts", (0, 15, 1), (15, 15, 1 + 15 / 16))
    clips = read(path, frames=5, clips="all")
    assert [n for clip in clips for n in numbers(clip)] == list(range(30))
    assert not any(clip.notes for clip in clips)


def test_many_jumps_and_none_that_is_skipped_by_seeking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(player_module, "FAR", 0.2)
    path = write_stream(tmp_path / "a.ts", (0, 13, 50), (13, 5, 3), (18, 8, 90_000), (26, 4, 1))
    assert [numbers(c)[0] for c in read(path, mode="frames", frames_per_video=10)] == list(range(1, 30, 3))


def test_a_leap_in_other_containers(tmp_path: Path) -> None:
    times = [i / 16 + (100 if i > 14 else 0) for i in range(30)]
    for suffix in ("mkv", "mp4"):
        path = write_numbers(tmp_path / f"a.{suffix}", 30, times=times)
        clips = read(path, frames=5, clips="all")
        assert [n for clip in clips for n in numbers(clip)] == list(range(30)), suffix
        assert clips[0].notes == [] and clips[-1].notes == [JUMPS], suffix


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("longest", [24, 25, 26])
def test_the_end_is_that_of_the_last_picture_shown(tmp_path: Path, suffix: str, longest: int) -> None:
    """A packet's length in mp4 is the step to the next one decoded, which is not the next one shown."""
    times = [i / 16 + (0.4 if i >= longest else 0) for i in range(30)]
    path = write_numbers(tmp_path / f"a.{suffix}", 30, times=times, options=B_FRAMES)
    with MediaFile(path) as file:
        extent, played = scan(file), play_through(file)
    assert extent.whole and extent.seconds == played.seconds
    assert float(extent.seconds) == pytest.approx(30 / 16 + 0.4, abs=2e-3)
    clips = read(path, frames=5, clips="uniform", clips_per_video=3)
    assert [numbers(clip)[0] for clip in clips][::2] == [0, 25] and len(clips) == 3
    late = [numbers(clip)[0] for clip in read(path, mode="frames", frames_per_video=30)]
    moments = [(2 * i + 1) * (30 / 16 + 0.4) / 60 for i in range(30)]
    assert late == [int(np.searchsorted(times, moment + 0.001, side="right")) - 1 for moment in moments]


@pytest.mark.parametrize("rate", [16, 60])
def test_a_pause_is_no_jump(tmp_path: Path, rate: int) -> None:
    times = [i / rate + (0.9 if i > 9 else 0) for i in range(20)]
    (clip,) = read(write_numbers(tmp_path / "a.mkv", 20, fps=rate, times=times), frames=17)
    assert clip.notes == []
    assert numbers(clip) == [int(np.searchsorted(times, k / 16 + 0.0011, side="right")) - 1 for k in range(17)]


def test_a_picture_each_quarter_of_a_minute_is_no_jump(tmp_path: Path) -> None:
    """Slower than a leap of 10 s: the rate that the header says counts."""
    path = write_numbers(tmp_path / "a.mp4", 30, fps=Fraction(1, 15))
    (clip,) = read(path, frames=5, fps=1 / 30)
    assert numbers(clip) == [0, 2, 4, 6, 8] and clip.notes == []
    assert [numbers(c) for c in read(path, mode="frames", frames_per_video=3)] == [[5], [15], [25]]
    with MediaFile(path) as file:
        assert scan(file).whole


def test_no_clip_is_one_held_picture(tmp_path: Path) -> None:
    """Five pictures, the third of them on the screen for 0.9 s."""
    path = write_numbers(tmp_path / "a.mkv", 25, times=[i / 16 + (0.9 if i > 6 else 0) for i in range(25)])
    clips: list[Clip] = []
    with pytest.raises(MediaError, match=r"2 clips show one picture all the time \(5 frames at 16 fps\)") as caught:
        for clip in read_clips(path, "video", TimingConfig(frames=5, clips="all"), native):
            clips.append(clip)
    assert caught.value.kind == "held picture"
    assert [clip.number for clip in clips] == [0, 1, 4, 5, 6, 7]
    assert all(len(set(numbers(clip))) > 1 for clip in clips)
    slow = write_numbers(tmp_path / "slow.mp4", 6, fps=1)
    for timing in ({}, {"clips": "uniform"}, {"clips": "all"}):
        with pytest.raises(MediaError, match="one picture all the time"):
            read(slow, frames=5, **timing)
    assert len(read(slow, frames=1)) == 1 and len(read(slow, mode="frames", frames_per_video=2)) == 2


def cut(source: Path, target: Path, first: int) -> Path:
    """What copying without encoding from picture `first` on gives: packets before it are decoded and not shown."""
    return remux(source, target, shift(-Fraction(first, 16)), avoid_negative_ts="disabled")


def set_edits(source: Path, target: Path, parts: list[tuple[Fraction, Fraction]]) -> Path:
    """Replace the edit list of an mp4 by parts (first second of the media, seconds)."""
    data = bytearray(source.read_bytes())
    at = data.find(b"elst") - 4
    size = struct.unpack_from(">I", data, at)[0]
    media_ticks = struct.unpack_from(">I", data, data.find(b"mdhd") + 16)[0]
    film_ticks = struct.unpack_from(">I", data, data.find(b"mvhd") + 16)[0]
    rows = [struct.pack(">IiI", round(s * film_ticks), round(b * media_ticks), 0x10000) for b, s in parts]
    body = b"elst" + struct.pack(">II", 0, len(rows)) + b"".join(rows)
    data[at : at + size] = struct.pack(">I", len(body) + 4) + body
    for box in (b"edts", b"trak", b"moov"):
        place = data.rfind(box, 0, at + 8) - 4
        struct.pack_into(">I", data, place, struct.unpack_from(">I", data, place)[0] + len(body) + 4 - size)
    target.write_bytes(data)
    return target


def test_a_cut_shows_what_its_edit_list_says(tmp_path: Path) -> None:
    whole = write_numbers(tmp_path / "a.mp4", 30, options=B_FRAMES)
    path = cut(whole, tmp_path / "b.mp4", 17)
    assert numbers(read(path, frames=13)[0]) == list(range(17, 30))
    assert [numbers(c) for c in read(path, mode="frames", frames_per_video=13)] == [[n] for n in range(17, 30)]
    clips = read(path, frames=5, clips="uniform", clips_per_video=2)
    assert [numbers(c) for c in clips] == [list(range(17, 22)), list(range(25, 30))]
    assert not any(c.notes for c in clips)


@pytest.mark.parametrize("parts", [[(2, 5)], [(2, 5), (17, 9)], [(17, 9), (2, 5)], [(2, 5), (2, 5)]])
def test_edit_lists_of_parts(tmp_path: Path, parts: list[tuple[int, int]]) -> None:
    whole = write_numbers(tmp_path / "a.mp4", 30, options=B_FRAMES)
    ahead = 2  # frames by which the first picture's stamp lies after the first decode stamp
    edits = [(Fraction(ahead + first, 16), Fraction(count, 16)) for first, count in parts]
    path = set_edits(whole, tmp_path / "b.mp4", edits)
    expected = [first + i for first, count in parts for i in range(count)]
    found = read(path, mode="frames", frames_per_video=len(expected))
    assert [n for clip in found for n in numbers(clip)] == expected
    (clip,) = read(path, frames=len(expected) // 4 * 4 + 1 if len(expected) > 9 else 5)
    assert numbers(clip) == expected[: len(clip.pixels)]
    assert clip.notes == []


@pytest.mark.parametrize(
    ("suffix", "codec"), [("ts", "libx264"), ("mkv", "libx264"), ("ts", "mpeg2video"), ("mkv", "libvpx-vp9")]
)
def test_a_start_before_the_first_key_picture(tmp_path: Path, suffix: str, codec: str) -> None:
    cuts = {"libx264": {"sc_threshold": "0"}, "mpeg2video": {"sc_threshold": "1000000000"}}.get(codec, {})
    keys = {"g": "12", "bf": "0", **cuts} if cuts else {"g": "12"}
    whole = write_numbers(tmp_path / "a.mkv", 30, fps=25, codec=codec, options=keys)
    path = remux(whole, tmp_path / f"b.{suffix}", lambda i, packet: i >= 5)
    (clip,) = read(path, frames=9, fps=25)
    assert numbers(clip) == list(range(12, 21))
    assert [numbers(c) for c in read(path, mode="frames", frames_per_video=18)] == [[n] for n in range(12, 30)]
    assert len(read(path, frames=5, fps=25, clips="uniform", clips_per_video=3)) == 3
    headless = remux(whole, tmp_path / f"c.{suffix}", lambda i, packet: i not in (0, 12, 24))
    with pytest.raises(MediaError, match="has no pictures"):
        read(headless, frames=5)


def test_a_start_that_needs_pictures_which_are_gone(tmp_path: Path) -> None:
    """With intra refresh a picture is whole some pictures after the place where decoding may begin."""
    options = {"x264-params": "intra-refresh=1:keyint=10:bframes=0"}
    whole = write_video(tmp_path / "a.ts", [numbered(i, 320, 240) for i in range(30)], options=options)
    path = remux(whole, tmp_path / "b.ts", lambda i, packet: i >= 5)
    shown = numbers(read(path, frames=9)[0])
    first = shown[0]
    assert first > 12 and shown == list(range(first, first + 9))
    assert [numbers(c) for c in read(path, mode="frames", frames_per_video=30 - first)] == [
        [n] for n in range(first, 30)
    ]


def test_the_last_picture_is_held_for_less_than_a_frame(tmp_path: Path) -> None:
    exact = write_numbers(tmp_path / "a.mp4", 20)  # 20 frames' time: the 21st is due when the last one ends
    for clips in ("first", "uniform", "all"):
        (clip,) = read(exact, frames=21, clips=clips)
        assert numbers(clip) == [*range(20), 19]
        assert clip.notes == [HELD]
    assert [numbers(c) for c in read(exact, frames=5, clips="all")] == [list(range(5 * i, 5 * i + 5)) for i in range(4)]
    assert not any(c.notes for c in read(exact, frames=5, clips="all"))
    rest = write_numbers(tmp_path / "e.mp4", 24)  # the rest at the end is not made up
    assert len(read(rest, frames=5, clips="all")) == 4
    quick = write_video(tmp_path / "b.mp4", [numbered(i % 31) for i in range(70)], fps=60)  # 1.167 s, needs 1.25
    with pytest.raises(MediaError, match=r"^has 19 frames at 16 fps, 21 are asked for$") as caught:
        read(quick, frames=21)
    assert caught.value.kind == "too short" and caught.value.frames == 19
    longer = write_video(tmp_path / "c.mp4", [numbered(i % 31) for i in range(73)], fps=60)  # 0.033 s too little
    with pytest.raises(MediaError, match="has 20 frames at 16 fps, 21 are asked for"):
        read(longer, frames=21)
    short = write_numbers(tmp_path / "d.mp4", 2)
    with pytest.raises(MediaError, match="has 2 frames at 16 fps, 5 are asked for"):
        read(short, frames=5)
