"""`wanloom prepare` as a user runs it, with the real codecs on a small random pipeline."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from wanloom.cli import main
from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.data.shards import Dataset
from wanloom.demo.shapes import build_clip
from wanloom.errors import UserError
from wanloom.media.write import write_mp4
from wanloom.prepare.encode import Encoders
from wanloom.runs import prepare as prepare_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i in range(12):
        frames, _, caption = build_clip(0, i, frames=9, height=32, width=32)
        write_mp4(folder / f"{i:02d}.mp4", torch.from_numpy(frames), fps=16)
        (folder / f"{i:02d}.txt").write_text(caption)
    (folder / "broken.mp4").write_text("a text file")
    (folder / "broken.txt").write_text("caption")
    return folder


SIZE = ["--height", "32", "--width", "32", "--frames", "9"]


def test_a_folder_becomes_latents_and_states(
    clips: Path, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["prepare", str(clips), str(out), "--model", str(tiny_pipeline), *SIZE, "--val-fraction", "0.2"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "files in",
        "13",
        "samples out",
        "10 train, 2 val",
        "broken.mp4: cannot be decoded",
        "is ready after",
    ):
        assert words in printed
    dataset = Dataset.open(out)
    vae, text = VaeCodec.load(tiny_pipeline, "cpu"), TextCodec.load(tiny_pipeline, "cpu")
    rows = dataset.rows("train")
    for i in range(len(rows)):
        sample = dataset.read(rows[i])
        frames, _, caption = build_clip(0, int(rows[i].source[:2]), frames=9, height=32, width=32)
        assert sample.caption == caption
        assert torch.equal(sample.tensors["text"], text.encode([caption])[0].bfloat16())
        close = vae.encode(torch.from_numpy(np.ascontiguousarray(frames)))
        assert (sample.tensors["latents"].float() - close).pow(2).mean() < 0.1 * close.pow(2).mean()  # H.264 is lossy
    assert main(["prepare", str(clips), str(out), "--model", str(tiny_pipeline), *SIZE, "--val-fraction", "0.2"]) == 0
    assert "complete already" in capsys.readouterr().out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_processes_make_the_bytes_of_one_and_print_once(clips: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    """The model rounds by batch and by thread, and neither may differ."""
    options = ["--model", str(tiny_pipeline), *SIZE, "--batch-size", "2", "--device", "cpu"]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert main(["prepare", str(clips), str(tmp_path / "one"), *options]) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "wanloom"]
    command = [*launcher, "prepare", str(clips), str(tmp_path / "two"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert done.stdout.count("samples out") == done.stdout.count("is ready after") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "80"], "it must be 4n+1: try 77 or 81"),
        (["--height", "481", "--width", "832"], "a multiple of 16: try 480 or 496"),
        (["--height", "480"], "belong together"),
        (["--val-fraction", "1.5"], "--val-fraction 1.5 is not between 0 and 1"),
        (["--workers", "0"], "--workers is at least 1"),
        (["--model", "/no/such/model"], "no model '/no/such/model'"),
        (["--strict", *SIZE], "--strict: broken.mp4 would be dropped: broken, cannot be decoded"),
    ],
)
def test_mistakes_are_one_sentence(
    clips: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert main(["prepare", str(clips), str(out), "--model", str(tiny_pipeline), *options]) == 2
    captured = capsys.readouterr().err
    assert message in captured and captured.startswith("wanloom: ") and "Traceback" not in captured


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_says_how_to_go_on(
    clips: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def encode(frames: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        with log.open("a") as file:
            file.write("x")
        return torch.ones(len(frames), 16, 3, 4, 4)

    def load_encoders(pipeline: Path, device: str) -> Encoders:
        return Encoders(encode, lambda caption, most: torch.ones(2, 8), lambda caption: 2)

    def stop() -> None:
        while not list(out.glob(".work/batch-*.tar")):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(prepare_run, "load_encoders", load_encoders)
    handler = signal.getsignal(number)
    thread = threading.Thread(target=stop)
    thread.start()
    command = ["prepare", str(clips), str(out), "--model", str(tiny_pipeline), *SIZE, "--batch-size", "1"]
    assert main(command) == 128 + number
    thread.join()
    assert signal.getsignal(number) == handler
    printed = capfd.readouterr()
    assert f"{number.name}: finishing the samples under way; once more stops at once." in printed.err
    assert "Run the same command again to go on" in printed.out
    with pytest.raises(UserError, match="is not finished"):
        Dataset.open(out)
    assert len(log.read_text()) < 12
    assert main(command) == 0
    assert sum(len(Dataset.open(out).rows(split)) for split in ("train", "val")) == 12
    assert len(log.read_text()) <= 13
