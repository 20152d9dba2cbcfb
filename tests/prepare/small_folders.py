"""Small folders of clips and pictures, and preparation with fake encoders."""

from pathlib import Path

from fake_encoders import IDENTITY, build_encoders
from media_files import numbered, write_video
from PIL import Image

from wanloom.geometry import WAN_21
from wanloom.media.framing import FramingConfig
from wanloom.media.video import TimingConfig
from wanloom.prepare.run import Prepared, PrepareJob, encode_folder
from wanloom.prepare.settings import PrepareConfig
from wanloom.prepare.shard_writer import ShardWriter


def config(**values) -> PrepareConfig:
    timing = values.pop("timing", {})
    timing = timing if "mode" in timing else {"frames": 5, **timing}
    framing = {"height": 32, "width": 48, **values.pop("framing", {})}
    return PrepareConfig(timing=TimingConfig(**timing), framing=FramingConfig(**framing), **values)


def put_video(root: Path, name: str, caption: str | None, first: int = 0, count: int = 8) -> None:
    write_video(root / name, [numbered((first + i) % 31) for i in range(count)])
    if caption is not None:
        (root / name).with_suffix(".txt").write_text(caption)


def put_image(root: Path, name: str, caption: str, level: int, size: tuple[int, int] = (48, 32)) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level // 2, 255 - level)).save(root / name)
    (root / name).with_suffix(".txt").write_text(caption)


def run(source: Path, out: Path, encoders=None, identity=IDENTITY, **values) -> Prepared:
    return encode_folder(
        PrepareJob(source, out, config(**values), WAN_21, identity, lambda: encoders or build_encoders())
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


ALL = {"timing": {"clips": "all"}, "batch_size": 3, "val_fraction": 0.2}


def small_shards(out: Path, shard_bytes: int) -> ShardWriter:
    return ShardWriter(out, 40_000)
