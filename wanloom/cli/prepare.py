"""`wanloom prepare INPUT OUT`: media and captions in, a folder to train on out."""

import argparse
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanloom.cli import launch
from wanloom.errors import UserError
from wanloom.options import add_options, build_flat, read_options
from wanloom.prepare.settings import PrepareConfig
from wanloom.signals import StopSignal
from wanloom.terminal import Terminal

if TYPE_CHECKING:
    from wanloom.prepare.encode import Encoders, Progress
    from wanloom.prepare.run import Finished

HELP = """Turn a folder of videos and images with captions into a folder to train on.

Every file is decoded, resampled in time, resized and cut, and encoded once by the model's VAE; its caption is encoded
by the model's text encoder. A file that cannot be used is listed in the report with the reason, it never stops the run.
Stopped at any moment and started again with the same command, it goes on where it was, and the result is the same
bytes. Files or captions that change in between, and options that would change the samples, need a new output folder.
With --nproc N, or under torchrun, N processes share the files, each on a GPU of its own or on one thread of the CPU;
the result is the same bytes for every N, and a stopped run may go on with another.

captions   beside the file: NAME.json (key "caption" or --caption-key), NAME.jsonl, NAME.txt or NAME.caption, where
           NAME is that of the file with or without its ending; or one table metadata.csv, metadata.jsonl or
           metadata.parquet in INPUT with a file column (file_name, file, path or video) and a caption column (caption,
           text or prompt). The first of these that has a caption counts; if another says something else, the report
           lists the file. A picture beside a video of the same NAME needs a caption of its own (clip.jpg.txt).
sizes      written as width x height. Without --height and --width each file keeps its aspect in at most --max-area
           pixels and is not enlarged. With both, every sample has that size: --crop center and random resize to cover
           it and cut the rest, --crop none fits the whole picture inside it. Sizes are multiples of 16; nothing is
           squashed but by the rounding of --crop none, which the report lists.
time       frame k of a clip is what a player shows at k / fps seconds, whatever the rate of the file. A video that is
           shorter than a clip is dropped, and the report says which --frames takes it; less than one frame's time
           is made up by holding the last picture."""

EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", type=Path, help="folder with media, searched with its sub-folders")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder to write; may be unfinished from an earlier start"
    )
    parser.add_argument(
        "--model",
        help="pipeline whose VAE and text encoder are used, that of the model to train: a folder in diffusers layout, "
        f"a name on the hub such as {EXAMPLE}, or tiny, the small one that is shipped to try things out (tiny)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where the encoders run (cuda if there is one)")
    add_options(parser, PrepareConfig)
    launch.add_arguments(parser, restarts=False)


PARTS = ("vae", "text_encoder", "tokenizer")


def identify(pipeline: Path, device: str) -> dict[str, str]:
    """Which weights encode, and where: by rounding a GPU encodes otherwise than a CPU."""
    from wanloom.codecs.identity import folder_identity, text_identity

    for part in PARTS:
        if not (pipeline / part).is_dir():
            raise UserError(f"'{pipeline}' is no pipeline in diffusers layout: it has no folder '{part}'.")
    return {"vae": folder_identity(pipeline / "vae"), "text-encoder": text_identity(pipeline), "device": device}


def load_encoders(pipeline: Path, device: str) -> "Encoders":
    """The VAE (fp32) and the text encoder (bf16 on a GPU, else fp32) of a pipeline."""
    import torch

    from wanloom.codecs.text import TextCodec
    from wanloom.codecs.vae import VaeCodec
    from wanloom.prepare.encode import Encoders

    vae = VaeCodec.load(pipeline, device)
    text = TextCodec.load(pipeline, device, torch.bfloat16 if device == "cuda" else torch.float32)
    return Encoders(vae.encode_batch, lambda caption, most: text.encode([caption], most)[0], text.count_tokens)


def check_alike(identity: dict[str, str]) -> None:
    """Raise UserError unless all ranks would encode with the same weights on the same kind of device."""
    from wanloom.dist import gather

    for rank, other in enumerate(found := gather(identity)):
        differs = [
            f"{name} is {other[name]}, on rank 0 {found[0][name]}" for name in other if other[name] != found[0][name]
        ]
        if differs:
            raise UserError(f"Rank {rank} would make other samples than rank 0: {'; '.join(differs)}.")


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for settings that cannot be, folders that are in the way, and a model that is none."""
    from wanloom.data.places import check_folders
    from wanloom.formats.pipeline import check_name

    build_flat(PrepareConfig, read_options(arguments, PrepareConfig))
    check_folders(arguments.input, arguments.out)
    check_name(arguments.model or "tiny", PARTS)


def run(arguments: argparse.Namespace) -> int:
    """Prepare, with a progress bar and the report on rank 0; 128 and the number of the signal when it was stopped."""
    config = build_flat(PrepareConfig, read_options(arguments, PrepareConfig))
    from wanloom.data.places import check_folders
    from wanloom.dist import pick_device, rank, together
    from wanloom.formats.pipeline import find_pipeline
    from wanloom.prepare.memory import check_batch
    from wanloom.prepare.run import prepare
    from wanloom.threads import one_thread

    with together():
        check_folders(arguments.input, arguments.out)  # before a large model is fetched
        device = pick_device(arguments.device).type
        check_batch(config, device)
        model = arguments.model or "tiny"
        pipeline = find_pipeline(model, PARTS)
        identity = identify(pipeline, device)
    check_alike(identity)
    console = Terminal(quiet=rank() != 0)
    if arguments.model is None:
        console.print(
            "Without --model the samples are for `tiny`, the small model that is shipped to try things out: no other "
            f"can be trained on them. For a published one give --model, such as --model {EXAMPLE}.",
            soft_wrap=True,
        )
    started = time.monotonic()
    stop = StopSignal("the samples under way")
    threads = one_thread() if device == "cpu" else nullcontext()  # the bytes of any number of processes are equal
    try:
        with stop, Bar(console, stop) as bar, threads:
            done = prepare(
                arguments.input,
                arguments.out,
                config,
                identity,
                lambda: load_with_room(pipeline, device),
                bar.show,
            )
    except KeyboardInterrupt:
        message = f"Stopped. Run the same command again to go on: what is encoded is kept in {arguments.out}."
        console.print(message, soft_wrap=True)
        return 128 + (stop.received or signal.SIGINT)
    if rank() == 0:
        tell(done, arguments.out, model, console, time.monotonic() - started)
    return 0


def load_with_room(pipeline: Path, device: str) -> "Encoders":
    """The encoders. Raises UserError when the memory does not suffice for them alone."""
    from wanloom.memory import enough_memory

    helps = ["`device=cpu`"] if device == "cuda" else ["another machine, as the encoders alone need more"]
    with enough_memory(f"load the VAE and the text encoder of {pipeline}", helps):
        return load_encoders(pipeline, device)


def tell(done: "Finished", out: Path, model: str, console: Any, seconds: float) -> None:
    """Print the report, and how to go on."""
    from wanloom.cli.hints import train_command
    from wanloom.cli.prepare_report import print_report
    from wanloom.data.places import REPORT
    from wanloom.prepare.report import summarise

    print_report(done.report, console)
    what = f"is ready after {seconds:.0f} s" if not done.was_complete else "was complete already, nothing was done"
    lines = [f"{out} {what}: {summarise(done.report)}. All file names are in {out / REPORT}."]
    command = train_command(out, model)
    lines.append(
        f"Train on it with: {command}"
        if command
        else f"Train on it with a recipe whose `model` has the VAE and the text encoder of {model}."
    )
    for line in lines:
        console.print(line, soft_wrap=True)


class Bar:
    """Shows `Progress` as a bar with rate and time left; in a log file as a line every half minute."""

    def __init__(self, console: Any, stop: StopSignal) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("files{task.fields[samples]}"),
            TimeRemainingColumn(),
        )
        self.console = console
        self.stop = stop
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task("reading", total=None, samples="")
        self.stage = ""
        self.first = (0.0, 0, 0)  # time, files and samples when the stage began
        self.said = time.monotonic()

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, state: "Progress") -> None:
        """Called after every file and sample."""
        self.stop.is_patient = state.stage == "encoding"
        if self.stop.received:
            raise KeyboardInterrupt
        now = time.monotonic()
        if state.stage != self.stage:
            self.stage, self.first = state.stage, (now, state.done, state.samples)
            self.progress.reset(self.task, total=state.total, completed=state.done, description=state.stage)
        seconds = max(now - self.first[0], 1e-3)
        rate = (state.samples - self.first[2]) / seconds
        text = f", {state.samples} samples, {rate:.2g} per second" if state.samples else ""
        self.progress.update(self.task, completed=state.done, total=state.total, samples=text)
        if not self.console.is_terminal and now - self.said > 30:
            self.said = now
            made = state.done - self.first[1]
            left = f", about {seconds / made * (state.total - state.done) / 60:.0f} min left" if made else ""
            self.console.print(f"{state.stage}: {state.done} of {state.total} files{text}{left}")
