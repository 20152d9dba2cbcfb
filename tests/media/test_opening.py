"""Opening media: names are never addresses, no other file is opened, the right track is taken."""

import shutil
from fractions import Fraction
from pathlib import Path

import av
import pytest
from av.stream import Disposition
from media_files import numbered, read_number, write_numbers, write_video
from PIL import Image

from wanloom.errors import UserError
from wanloom.media.container import MediaFile, choose_track, open_container, picture_rate
from wanloom.media.decoding import MediaError
from wanloom.media.framing import Crop
from wanloom.media.picture import Clip
from wanloom.media.video import TimingConfig, read_clips
from wanloom.suffixes import kind_of


def native(width: float, height: float, number: int) -> Crop:
    size = (round(width), round(height))
    return Crop(size, (0, 0), size)


def read(path: Path, **timing) -> list[Clip]:
    return list(read_clips(path, kind_of(path.name) or "", TimingConfig(**timing), native))


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "http:x.mp4", "http:/a.mp4", "file:a.mp4", "concat:a.mp4|b.mp4", "-.mp4"]
)
def test_names_are_never_addresses(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_numbers(tmp_path / "made.mp4", 6)
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    shutil.copy(made, name)
    (clip,) = read(Path(name), frames=5)
    assert [read_number(picture) for picture in clip.pixels] == list(range(5))
    Path("http:").mkdir(exist_ok=True)
    for image in ("http:/a.png", "12:30.png"):
        Image.new("RGB", (16, 16), (9, 9, 9)).save(image)
        assert read(Path(image))[0].pixels.max() == 9


def test_a_file_opens_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_numbers(tmp_path / "a.mp4", 6)
    write_numbers(tmp_path / "b.ts", 6)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nb.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.ts").write_text(playlist)
    (tmp_path / "drawing.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for name in ("list.mp4", "list.ts"):
        with pytest.raises(MediaError, match="cannot be decoded"):
            read(Path(name), frames=5)
    with pytest.raises(MediaError, match="is no image that can be read"):
        read(Path("drawing.png"))
    with pytest.raises(UserError, match=r"gone\.mp4' cannot be read any more: No such file"):
        read(tmp_path / "gone.mp4", frames=5)


def write_tracks(path: Path, tracks: list[tuple[int, tuple[int, int], Disposition | None]]) -> Path:
    """A file of video tracks of six pictures: the level of gray, the size, the disposition."""
    with av.open(str(path), "w") as container:
        streams = []
        for _, (width, height), disposition in tracks:
            stream = container.add_stream("libx264", rate=16)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.disposition = disposition or Disposition(0)
            streams.append(stream)
        for i in range(6):
            for stream, (level, size, _) in zip(streams, tracks, strict=True):
                frame = av.VideoFrame.from_ndarray(numbered(level, *size), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 16)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    return path


SMALL, LARGE, DEFAULT = (48, 32), (96, 64), Disposition.default


@pytest.mark.parametrize(
    ("tracks", "taken", "note"),
    [
        ([(3, SMALL, DEFAULT)], 3, []),
        ([(3, LARGE, None), (9, SMALL, DEFAULT)], 9, ["2 video tracks, the default one taken"]),
        ([(3, SMALL, None), (9, LARGE, None)], 9, ["2 video tracks, the largest taken"]),
        ([(3, SMALL, DEFAULT), (9, SMALL, DEFAULT), (5, LARGE, None)], 3, ["3 video tracks, the first taken"]),
    ],
)
def test_the_track_that_a_player_shows(tmp_path: Path, tracks: list, taken: int, note: list[str]) -> None:
    path = write_tracks(tmp_path / "a.mkv", tracks)
    (clip,) = read(path, frames=5)
    assert {read_number(picture) for picture in clip.pixels} == {taken}
    assert clip.notes == note


def test_a_track_that_no_decoder_is_for_is_left_to_others(tmp_path: Path) -> None:
    path = write_tracks(tmp_path / "a.mkv", [(3, SMALL, DEFAULT), (9, SMALL, None)])
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_NONE4/ISO/AVC", 1))
    (clip,) = read(path, frames=5)
    assert read_number(clip.pixels[0]) == 9 and clip.notes == ["2 video tracks, the first taken"]


def test_a_cover_is_no_track(tmp_path: Path) -> None:
    Image.new("RGB", (200, 200), (255, 0, 0)).save(tmp_path / "cover.jpg")
    cover = (tmp_path / "cover.jpg").read_bytes()
    write_numbers(tmp_path / "a.mp4", 6)
    for name, with_video in (("b.mp4", True), ("c.mp4", False)):
        with av.open(str(tmp_path / "a.mp4")) as given, av.open(str(tmp_path / name), "w") as made:
            picture = made.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 200, 200, "yuvj444p"
            picture.disposition = Disposition.attached_pic
            copy = made.add_stream_from_template(given.streams.video[0]) if with_video else None
            packet = av.Packet(cover)
            packet.stream, packet.pts, packet.dts, packet.time_base = picture, 0, 0, Fraction(1, 1000)
            packet.is_keyframe = True
            made.mux(packet)
            for packet in given.demux(video=0):
                if packet.size and copy:
                    packet.stream = copy
                    made.mux(packet)
    (clip,) = read(tmp_path / "b.mp4", frames=5)
    assert clip.source_size == (64, 48) and clip.notes == []
    with pytest.raises(MediaError, match="has a cover picture, but no video in it"):
        read(tmp_path / "c.mp4", frames=5)


def test_absurd_rates_give_way_to_the_guessed_one(tmp_path: Path) -> None:
    pictures = [numbered(i, 720, 480) for i in range(6)]
    path = write_video(tmp_path / "a.dv", pictures, Fraction(30000, 1001), codec="dvvideo", pix_fmt="yuv411p")
    with MediaFile(path) as file, open_container(file) as container:
        track, _ = choose_track(container)
        assert track.average_rate > 1000  # else this shows nothing
        assert picture_rate(track) == Fraction(30000, 1001)
    (clip,) = read(path, frames=1)
    assert clip.source_fps == pytest.approx(29.97, abs=0.01)
