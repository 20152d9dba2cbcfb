"""`wanloom prepare INPUT OUT`: media and captions in, a folder to train on out."""

import argparse
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.cli import launch
from wanloom.options import add_options, build_flat, read_options
from wanloom.prepare.settings import PrepareConfig, fit_config
from wanloom.signals import StopSignal
from wanloom.terminal import Terminal

if TYPE_CHECKING:
    from wanloom.prepare.run import Prepared

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
           it and cut the rest, --crop none fits the whole picture inside it. Sizes are whole tokens; nothing is
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


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for settings that cannot be, folders that are in the way, and a model that is none."""
    from wanloom.codecs.identity import ENCODERS
    from wanloom.data.places import check_folders
    from wanloom.formats.pipeline import check_name
    from wanloom.runs.found import model_geometry

    config, model = build_flat(PrepareConfig, read_options(arguments, PrepareConfig)), arguments.model or "tiny"
    check_folders(arguments.input, arguments.out)
    check_name(model, sum(ENCODERS.values(), ()))
    if geometry := model_geometry(model):
        fit_config(config, geometry)


def run(arguments: argparse.Namespace) -> int:
    """Prepare, with a progress bar and the report on rank 0; 128 and the number of the signal when it was stopped."""
    from wanloom.cli.prepare_report import Bar
    from wanloom.dist import rank
    from wanloom.runs.prepare import prepare

    settings, model = read_options(arguments, PrepareConfig), arguments.model or "tiny"
    console = Terminal(quiet=rank() != 0)
    if arguments.model is None:
        console.print(
            "Without --model the samples are for `tiny`, the small model that is shipped to try things out: no other "
            f"can be trained on them. For a published one give --model, such as --model {EXAMPLE}.",
            soft_wrap=True,
        )
    started = time.monotonic()
    stop = StopSignal("the samples under way")
    stop.is_patient = False  # until there are some
    try:
        with stop, Bar(console, stop) as bar:
            done = prepare(arguments.input, arguments.out, model, arguments.device, bar.show, **settings)
    except KeyboardInterrupt:
        message = f"Stopped. Run the same command again to go on: what is encoded is kept in {arguments.out}."
        console.print(message, soft_wrap=True)
        return 128 + (stop.received or signal.SIGINT)
    if rank() == 0:
        tell(done, arguments.out, model, console, time.monotonic() - started)
    return 0


def tell(done: "Prepared", out: Path, model: str, console: Terminal, seconds: float) -> None:
    """Print the report, and how to go on."""
    from wanloom.cli.hints import train_command
    from wanloom.cli.prepare_report import print_report
    from wanloom.data.places import REPORT
    from wanloom.prepare.report import summarise

    print_report(done.report, console)
    what = f"is ready after {seconds:.0f} s" if not done.was_complete else "was complete already, nothing was done"
    how = f"with a recipe whose `model` has the VAE and the text encoder of {model}."
    if command := train_command(out, model):
        how = f"with: {command}"
    for line in (
        f"{out} {what}: {summarise(done.report)}. All file names are in {out / REPORT}.",
        f"Train on it {how}",
    ):
        console.print(line, soft_wrap=True)
