"""A prepared folder is an Energon dataset: Energon itself reads every sample, and would write the same metadata."""

import json
import re
import shutil
from pathlib import Path

import megatron.energon as energon
import pytest
import torch
from click.testing import CliRunner
from fake_encoders import IDENTITY, build_encoders
from small_folders import config, put_image, put_video, small_shards

from wanloom.data.shards import Dataset
from wanloom.geometry import WAN_21
from wanloom.prepare import run as prepare_module
from wanloom.prepare.run import PrepareJob, encode_folder

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("energon")
    for i in range(12):
        put_image(root / "in", f"i{i:02d}.png", f"image {i}", 10 * i, (48, 32) if i % 2 else (32, 32))
    for i in range(6):
        put_video(root / "in", f"v{i}.mp4", f"video {i}", first=i, count=12)
    settings = config(
        timing={"clips": "all"}, framing={"height": None, "width": None, "max_area": 1536}, val_fraction=0.25
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "ShardWriter", small_shards)
        encode_folder(PrepareJob(root / "in", root / "out", settings, WAN_21, IDENTITY, build_encoders))
    return root / "out"


def of_docs() -> dict:
    """What the code in the docs defines."""
    (code,) = re.findall(r"```python\n(import megatron.*?)```", (ROOT / "docs/prepare.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("split", ["train", "val"])
def test_energon_reads_every_sample(folder: Path, split: str) -> None:
    dataset = Dataset.open(folder)
    rows = dataset.rows(split)
    assert len(rows) > 3 and len({row.shard for row in rows}) >= 1
    names = of_docs()
    if split == "train":
        # one pass: the train set of Energon repeats for ever unless told otherwise
        loader = energon.get_loader(
            energon.get_train_dataset(
                folder, split_part="train", shuffle_buffer_size=None, max_samples_per_sequence=None, batch_size=None,
                worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
                task_encoder=names["TaskEncoder"](), repeat=False,
            )
        )  # fmt: skip
    else:
        loader = names["open_energon"](folder, split)
    got = {sample["__key__"].split("/")[-1]: sample for sample in loader}
    assert sorted(got) == sorted(rows.texts["key"].to_pylist())
    for i, key in enumerate(rows.texts["key"].to_pylist()):
        mine = dataset.read(rows[i])
        assert torch.equal(got[key]["latents"], mine.tensors["latents"])
        assert torch.equal(got[key]["text"], mine.tensors["text"])
        assert got[key]["caption"] == mine.caption


def test_energons_command_line_shows_the_folder(folder: Path) -> None:
    """As the docs have it: its two commands that look into a data set, on the captions."""
    from megatron.energon.cli.main import main

    text = (ROOT / "docs/prepare.md").read_text()
    samples = len(Dataset.open(folder).rows("train")) + len(Dataset.open(folder).rows("val"))
    for command, words in (("info", f"{samples} samples"), ("preview", "Sample 1\n")):
        line = f"energon {command} data --dataset-config captions.yaml"
        assert line in text
        arguments = [str(folder) if word == "data" else word for word in line.split()[1:]]
        done = CliRunner().invoke(main, arguments, input="y\nn\n")
        assert done.exit_code == 0, done.output
        assert words in done.output
    captions = Dataset.open(folder).rows("train")
    assert f"- text (<class 'str'>): '{captions[0].caption}'" in done.output


def test_energons_own_preparation_finds_the_same(folder: Path, tmp_path: Path) -> None:
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    copy = shutil.copytree(folder, tmp_path / "copy")
    shards = sorted(str(path.relative_to(copy)) for path in copy.glob("*/*.tar"))
    for path in copy.glob("*/*.idx"):
        path.unlink()
    shutil.rmtree(copy / ".nv-meta")
    WebdatasetPreparator.prepare_dataset(
        copy, shards, split_parts_patterns=[("train", "train/.*"), ("val", "val/.*")], workers=1
    )
    for shard in shards:
        assert (copy / f"{shard}.idx").read_bytes() == (folder / f"{shard}.idx").read_bytes()
    counts = [json.loads((f / ".nv-meta/.info.json").read_text())["shard_counts"] for f in (copy, folder)]
    assert counts[0] == counts[1]
