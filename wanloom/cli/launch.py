"""`--nproc N`: the same command as N processes of this machine, started as `torchrun --standalone` does.

In: the words of a command. Out: one exit code for all of them: 0, or that of the process that failed first, or 128 and
the number of the signal. The one decision: torch's elastic launcher starts, watches and stops the processes, and says
nothing itself: what they have to say they have said. SIGINT and SIGTERM are passed on to every process and waited for;
a second one is passed on as SIGTERM, which stops them at once.
"""

import argparse
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wanloom.config import UserError
from wanloom.terminal import say

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

SAVING = 3600  # seconds from a signal until what still runs is killed; torch 2.11 knows no such setting and waits 30
NEEDS_NO_RESTART = {0, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM}  # done, a mistake of the user, asked to stop


def add_arguments(parser: argparse.ArgumentParser, restarts: bool) -> None:
    """The options of a command that can be several processes; `restarts` where it goes on from a checkpoint."""
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="run as N processes of this machine, one for each GPU where it has GPUs"
    )
    if restarts:
        parser.add_argument(
            "--max-restarts",
            type=int,
            metavar="R",
            help="with --nproc: when a process dies, start all again from the newest checkpoint, at most R times (0)",
        )


def launch(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Run `wanloom` with `words`, less the options of this file, as `arguments.nproc` processes.

    Raises UserError when they cannot be started.
    """
    restarts = getattr(arguments, "max_restarts", None)
    check(arguments, restarts)
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser, restarts=hasattr(arguments, "max_restarts"))
    command = parser.parse_known_args(words)[1]
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // arguments.nproc))
    return run_processes(arguments.nproc, ("-m", "wanloom", *command), restarts or 0)


def check(arguments: argparse.Namespace, restarts: int | None) -> None:
    """Raises UserError when so many processes cannot be."""
    import torch

    if "RANK" in os.environ:
        raise UserError("--nproc starts processes, but this is one of several already (RANK is set): leave it out.")
    if arguments.nproc is None:
        raise UserError("--max-restarts is for processes that --nproc starts: give --nproc too.")
    if arguments.nproc < 1:
        raise UserError(f"--nproc is {arguments.nproc}: at least one process is needed.")
    if restarts is not None and restarts < 0:
        raise UserError(f"--max-restarts is {restarts}: it counts from 0.")
    device = getattr(arguments, "device", None) or "cuda"
    if ":" in device:
        raise UserError(f"--device {device} is one device, --nproc takes one for each process: leave it out.")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and device == "cuda" else None
    if gpus is not None and arguments.nproc > gpus:
        raise UserError(f"--nproc is {arguments.nproc}, but this machine has {gpus} GPUs and each process needs one.")


def run_processes(count: int, words: Sequence[str], restarts: int = 0) -> int:
    """Run `python words` as `count` processes that know of one another; returns the exit code when all have ended."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.launcher.api import LaunchConfig

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING))
    silence("torch.distributed.elastic")
    code = 0
    try:
        for left in range(restarts, -1, -1):
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",  # any free port
                max_restarts=0,  # torch would also repeat a mistake of the user
                logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # to the terminal, and no folder of logs
            )
            code = run_once(config, words)
            if code in NEEDS_NO_RESTART or not left:
                break
            say(f"wanloom: starting all processes again, {left - 1} restarts left.", file=sys.stderr)
    except SignalException as error:  # once it has started processes, torch turns signals into these
        return 128 + error.sigval
    return code


def run_once(config: "LaunchConfig", words: Sequence[str]) -> int:
    """Start the processes once; returns the exit code of the one that failed first, or 0."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import launch_agent

    try:
        launch_agent(config, sys.executable, list(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        say(f"wanloom: rank {rank} was ended by {failure.signal_name()}.", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


def silence(name: str) -> None:
    """Let the loggers under `name` print nothing: they repeat in many lines what the processes have said."""
    logger = logging.getLogger(name)
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
