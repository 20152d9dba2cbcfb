"""`--nproc N`: the same command as N processes of this machine.

In: the words of a command. Out: one exit code for all of them: 0, or that of the process that failed first, or 128 and
the number of the signal. The one decision: the processes and their launcher talk over the loopback interface alone, and
nothing that comes from there is ever unpickled; torch's own launcher listens on all interfaces and does. The launcher
says nothing that a process can say itself. Signals are passed on to every process and waited for; a second one is
passed on as SIGTERM, which stops them at once.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from wanloom.errors import UserError
from wanloom.signals import LAUNCHER, STOPS
from wanloom.terminal import say
from wanloom.threads import count_cores

SAVING = 3600.0  # seconds from a signal until what still runs is killed
NOTICE = 15.0  # seconds in which the others notice that one is gone, say so and leave by themselves
ENDING = 30.0  # seconds from SIGTERM to SIGKILL, then
LOOK = 0.05  # seconds between two looks at the processes
LOST = 1  # the exit code of a process that has lost another one
NEEDS_NO_RESTART = {0, 2, *(128 + number for number in STOPS)}  # done, a mistake of the user, asked to stop


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
    check(arguments)
    check_gpus(arguments)
    restarts = getattr(arguments, "max_restarts", None)
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser, restarts=hasattr(arguments, "max_restarts"))
    command = parser.parse_known_args(words)[1]
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, count_cores() // arguments.nproc))
    return run_processes(arguments.nproc, ("-m", "wanloom", *command), restarts or 0)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError when so many processes cannot be, whatever the machine has."""
    restarts = getattr(arguments, "max_restarts", None)
    if "RANK" in os.environ:
        raise UserError("--nproc starts processes, but this is one of several already (RANK is set): leave it out.")
    if arguments.nproc is None:
        raise UserError("--max-restarts is for processes that --nproc starts: give --nproc too.")
    if arguments.nproc < 1:
        raise UserError(f"--nproc is {arguments.nproc}: at least one process is needed.")
    if restarts is not None and restarts < 0:
        raise UserError(f"--max-restarts is {restarts}: it counts from 0.")
    device = getattr(arguments, "device", None) or ""
    if ":" in device:
        raise UserError(f"--device {device} is one device, --nproc takes one for each process: leave it out.")


def check_gpus(arguments: argparse.Namespace) -> None:
    """Raises UserError when there are fewer GPUs than processes that each need one."""
    import torch

    device = getattr(arguments, "device", None) or "cuda"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and device == "cuda" else None
    if gpus is not None and arguments.nproc > gpus:
        raise UserError(f"--nproc is {arguments.nproc}, but this machine has {gpus} GPUs and each process needs one.")


def run_processes(count: int, words: Sequence[str], restarts: int = 0) -> int:
    """Run `python words` as `count` processes that know of one another; returns the exit code when all have ended."""
    code = 0
    with Inbox() as inbox:
        for left in range(restarts, -1, -1):
            code = run_once(count, words, inbox)
            if code in NEEDS_NO_RESTART or inbox.received or not left:
                break
            say(f"wanloom: starting all processes again, {left - 1} restarts left.", file=sys.stderr)
    return code


class Inbox:
    """The signals that came to the launcher, to be passed on; it never ends before its processes."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Inbox":
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # nohup
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self.received or number != signal.SIGHUP:  # a closed terminal sends several
            self.received.append(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_once(count: int, words: Sequence[str], inbox: Inbox) -> int:
    """Start the processes once; returns the exit code of the one that failed first, or 0."""
    from wanloom.dist import serve_store

    store = serve_store()  # of this process, so that it outlives any rank
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": store.port, LAUNCHER: os.getpid()}
    ranks = list[subprocess.Popen[bytes]]()
    try:
        for rank in range(count):
            env = os.environ | {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            # sessions of their own: the terminal sends its signals here alone
            ranks.append(subprocess.Popen([sys.executable, *words], env=env, start_new_session=True))
        return watch(ranks, inbox)
    finally:
        for process in ranks:  # none is left, unless one could not be started
            process.kill()
            process.wait()


def watch(ranks: Sequence[subprocess.Popen[bytes]], inbox: Inbox) -> int:
    """Pass signals on until all have ended, and end all when one has failed. Returns the exit code of all."""
    first, passed = (0, 0), 0  # rank and exit code of the first failure; signals that were passed on
    plan = list[tuple[float, int]]()  # when which signal is sent to those that are left
    while None in (codes := [process.poll() for process in ranks]):
        now = time.monotonic()
        for number in inbox.received[passed:]:
            if not passed:
                plan = [(now + SAVING, int(signal.SIGKILL))]
            plan.insert(0, (now, int(signal.SIGTERM if passed else number)))
            passed += 1
        if any(codes) and not plan:
            first = find_first(codes)
            plan = [(now + NOTICE, int(signal.SIGTERM)), (now + NOTICE + ENDING, int(signal.SIGKILL))]
        while plan and plan[0][0] <= now:
            send(ranks, plan.pop(0)[1])
        time.sleep(LOOK)
    if passed:
        return find_stop(codes, inbox.received[0])
    rank, code = first if any(first) else find_first(codes)
    if code >= 0:
        return code
    say(f"wanloom: rank {rank} was ended by {signal.Signals(-code).name}.", file=sys.stderr)
    if -code == signal.SIGKILL:
        say("wanloom: If nobody did that by hand, this machine ran out of memory.", file=sys.stderr)
    return 128 - code


def send(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to the processes that still run."""
    for process in ranks:
        process.send_signal(number)  # nothing to one that has ended


def find_first(codes: Sequence[int | None]) -> tuple[int, int]:
    """Rank and exit code of what failed; one that only lost another comes last. `(0, 0)` when none failed."""
    failed = [(code == LOST, rank, code) for rank, code in enumerate(codes) if code]
    return min(failed)[1:] if failed else (0, 0)


def find_stop(codes: Sequence[int | None], number: int) -> int:
    """The exit code of a run that was told to stop by signal `number`: that of a process that could not, if any."""
    asked = {0, *(128 + stop for stop in STOPS), *(-stop for stop in STOPS)}
    failed = [code for code in codes if code is not None and code not in asked]
    if failed:
        return failed[0] if failed[0] >= 0 else 128 - failed[0]
    return 128 + number if any(codes) else 0
