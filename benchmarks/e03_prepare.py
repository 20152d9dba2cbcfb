"""E3: a folder of clips with captions to a folder to train on, against a script in the way of NVIDIA's DFM.

The script takes one file after the other: OpenCV to float32, the VAE, the caption in 226 slots through UMT5, a tar of
WebDataset. wanloom is `prepare`: hashes of the files, decoding ahead of the encoder, an index, a report. It too encodes
one clip at a time, as by default it does at 480p; of small clips it would make batches. Both run in this process with
the same weights (the tiny pipeline, fp32) and 2 threads for torch; `wanloom prepare` itself takes one on a CPU, so that
any number of processes makes the same bytes.
Clips: x264, 1280x720, 5 Mbit/s, 16 pictures a second and as many as a sample has, so that both encode the same ones.
The tiny VAE takes longer than all else; so in another row it is replaced by one that takes every eighth pixel, which
leaves what is not the models. There wanloom hands bytes to its encoder, as it would to a GPU.
Checked: the script's encoder makes of the pictures that wanloom decodes the latents that wanloom stored, to 1e-4, and
its text states are wanloom's, to 1e-4. Its own pictures differ by the resize filter (c10_decode.py).
"""

import json
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
import webdataset
from torch import Tensor

from benchmarks.clips import write_clip
from benchmarks.dfm_way import count_frames, load_video
from benchmarks.measure import Row, main, take_turns
from wanloom.codecs.text import TextCodec, clean_prompt
from wanloom.codecs.vae import VaeCodec
from wanloom.data.shards import Dataset
from wanloom.formats.pipeline import find_pipeline
from wanloom.geometry import WAN_21
from wanloom.media.framing import FramingConfig, choose_crop
from wanloom.media.video import TimingConfig, read_clips
from wanloom.prepare.encode import Encoders
from wanloom.prepare.run import PrepareJob, encode_folder
from wanloom.prepare.settings import PrepareConfig

SLOTS = 226
FPS = 16
Encode = Callable[[Tensor], Tensor]  # the script's: (1, 3, F, H, W) in [-1, 1] to latents (1, C, F', H/8, W/8)


def measure(toy: bool) -> list[Row]:
    """Seconds per clip of a whole preparation, with the tiny VAE and without one."""
    pipeline = find_pipeline("tiny")
    vae, text = VaeCodec.load(pipeline, "cpu"), TextCodec.load(pipeline, "cpu")
    stored = (160, 96) if toy else (1280, 720)
    rows = []
    for what, size, frames, number, ours, theirs in (
        ("the tiny VAE", (48, 32) if toy else (160, 96), 5 if toy else 17, 2, vae.encode_batch, _script_vae(vae)),
        ("no VAE", (48, 32) if toy else (832, 480), 5 if toy else 81, 2, thin_bytes, thin),
    ):
        encoders = Encoders(ours, lambda caption, most: text.encode([caption], most)[0], text.count_tokens)
        with tempfile.TemporaryDirectory() as name:
            clips = _write_clips(Path(name) / "clips", stored, frames, number)
            rows.append(_row(what, clips, stored, size, frames, encoders, theirs, text))
    return rows


def _row(
    what: str,
    clips: Path,
    stored: tuple[int, int],
    size: tuple[int, int],
    frames: int,
    encoders: Encoders,
    encode: Encode,
    text: TextCodec,
) -> Row:
    config = PrepareConfig(
        timing=TimingConfig(frames=frames),
        framing=FramingConfig(width=size[0], height=size[1]),
        val_fraction=0.0,
        dtype="fp32",
        batch_size=1,
    )
    number = len(list(clips.glob("*.mp4")))
    identity = {"vae": what, "text-encoder": "tiny", "device": "cpu"}

    def ours() -> None:
        with tempfile.TemporaryDirectory() as out:
            encode_folder(PrepareJob(clips, Path(out) / "out", config, WAN_21, identity, lambda: encoders))

    def theirs() -> None:
        with tempfile.TemporaryDirectory() as out:
            run_script(clips, Path(out) / "shard.tar", size, encode, text)

    with tempfile.TemporaryDirectory() as out:
        encode_folder(PrepareJob(clips, Path(out) / "out", config, WAN_21, identity, lambda: encoders))
        apart = _check(clips, Dataset.open(Path(out) / "out"), config, encode, text)
    taken = {name: [s / number for s in values] for name, values in take_turns({"peer": theirs, "ours": ours}).items()}
    return Row(
        "E3",
        f"a clip of {stored[0]}x{stored[1]}, {frames} frames, prepared as {size[0]}x{size[1]}, {what}",
        "s",
        taken["ours"],
        "a script in the way of DFM",
        taken["peer"],
        limit="the encoders alone" if what != "no VAE" else "decoding on one thread",
        checked=f"latents of the same pictures and text states within {apart:.1e}",
        note="what wanloom adds are hashes, index, report and files that are on the disk"
        if what == "no VAE"
        else "one clip at a time on both sides; in a batch of two, wanloom's default, this VAE takes 0.08 s a "
        "clip and not 0.66 s: on a CPU torch gives a 3D convolution to oneDNN for a batch of two, and not for one clip",
    )


def run_script(clips: Path, out: Path, size: tuple[int, int], encode: Encode, text: TextCodec) -> None:
    """What DFM's prepare_dataset_wan.py does with a folder, without tiling, which would change the latents."""
    with webdataset.TarWriter(str(out)) as tar:
        for i, path in enumerate(sorted(clips.glob("*.mp4"))):
            caption = json.loads(path.with_suffix(".json").read_text())["caption"]
            number = count_frames(path)
            video = load_video(path, size, number)
            latents = encode(video * 2.0 - 1.0)[0]
            record = {"video_path": str(path), "processed_frames": number, "caption": caption}
            states = pad_text(caption, text)
            tar.write({"__key__": f"{i:06d}", "pth": latents, "pickle": states, "json": record})


@torch.no_grad()
def pad_text(caption: str, text: TextCodec) -> Tensor:
    """States `(226, D)`: all slots through the encoder, zeros after the caption."""
    tokens = text.tokenizer(
        clean_prompt(caption), max_length=SLOTS, padding="max_length", truncation=True, return_tensors="pt"
    )
    states = text.encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
    return states * tokens.attention_mask[0, :, None]


def _script_vae(codec: VaeCodec) -> Encode:
    @torch.no_grad()
    def encode(video: Tensor) -> Tensor:
        return (codec.vae.encode(video).latent_dist.mean - codec.mean) / codec.std

    return encode


def thin(video: Tensor) -> Tensor:
    """No VAE: every fourth picture and eighth pixel, in 16 channels."""
    return torch.cat([video[:, :, ::4, ::8, ::8]] * 6, dim=1)[:, :16].contiguous()


def thin_bytes(frames: Tensor) -> Tensor:
    """The same of `(B, F, H, W, 3)` uint8."""
    few = frames[:, ::4, ::8, ::8].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return torch.cat([few] * 6, dim=1)[:, :16].contiguous()


def _write_clips(folder: Path, size: tuple[int, int], frames: int, number: int) -> Path:
    folder.mkdir()
    for i in range(number):
        write_clip(folder / f"clip{i}.mp4", size, frames, 5.0, seed=i, fps=Fraction(FPS))
        caption = f"Clip {i}: coloured noise under a moving camera, and a square that goes from left to right. "
        (folder / f"clip{i}.json").write_text(json.dumps({"caption": caption * 3}))
    return folder


def _check(clips: Path, dataset: Dataset, config: PrepareConfig, encode: Encode, text: TextCodec) -> float:
    """The largest difference between what is stored and what the script's encoders make of the same pictures."""
    index, apart = dataset.rows("train"), 0.0
    assert len(index) == len(list(clips.glob("*.mp4")))
    for i in range(len(index)):
        row, sample = index[i], dataset.read(index[i])
        (clip,) = read_clips(
            clips / row.source,
            "video",
            config.timing,
            lambda w, h, n: choose_crop(w, h, config.framing, WAN_21.grid, 0, ""),
        )
        video = torch.from_numpy(clip.pixels).permute(3, 0, 1, 2)[None] / 255.0
        states = pad_text(row.caption, text)
        latents, kept = sample.tensors["latents"], sample.tensors["text"]
        assert not states[len(kept) :].any()
        for stored, made in ((latents, encode(video * 2 - 1)[0]), (kept, states[: len(kept)])):
            torch.testing.assert_close(stored, made, rtol=1e-4, atol=1e-4)
            apart = max(apart, float((stored - made).abs().max()))
    return apart


if __name__ == "__main__":
    main(__spec__, measure)
