"""The `wanloom` command: each is a file of this folder with HELP, add_arguments(parser) and run(arguments) -> int.

Only the command that was asked for is imported, so that `wanloom --help` answers at once. A UserError or an
OSError is printed as one sentence and ends with exit code 2; a command that was stopped by Ctrl-C ends with 130.
"""

import argparse
import importlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn

import wanloom
from wanloom.cli.words import Parser
from wanloom.errors import UserError, nearest, sentence_of
from wanloom.signals import ended_by_ctrl_c, follow_launcher
from wanloom.terminal import is_text, let_go, say

COMMANDS = {
    "prepare": "turn a folder of videos and images into a training set",
    "train": "train a model on a prepared set",
    "generate": "make videos from prompts",
    "convert": "write a trained model as a diffusers or original pipeline",
    "show": "print what a recipe, a run or a prepared set holds",
    "demo": "run all of it on small made-up clips and write a report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    follow_launcher()
    with ended_by_ctrl_c():  # until a command has something to finish
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    # read when torch is imported: threads that spin while they wait hold the core that the one they wait for needs
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal in another encoding shows `\\xfc` and ends no run
            stream.reconfigure(errors="backslashreplace")
    if strange := next((word for word in words if not is_text(word)), None):
        return _fail(f"'{strange}' is no text in UTF-8: give the file another name, or write the text in UTF-8.")
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    try:
        found = _read(words)
        if found is None:
            return 2
        parser, run = found
        if not is_alone:
            return _leave(_run_rank(parser, run))
        with parser.naming_options():
            return _run_one(run)
    except (UserError, OSError) as error:
        return _fail(sentence_of(error))
    except KeyboardInterrupt:  # of a rank: it still joins the others
        return _fail("Stopped.", 130) if is_alone else 130


def _read(words: list[str]) -> tuple[Parser, Callable[[], int]] | None:
    """What is to be done, by the words, and what read them; None when only the overview could be shown."""
    overview = Parser("wanloom", wanloom.__doc__)
    overview.add_argument("--version", action="version", version=f"wanloom {wanloom.__version__}")
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    overview.epilog = f"commands:\n{commands}\n\n`wanloom COMMAND --help` explains one."
    overview.add_argument("command", metavar="COMMAND", help="what to do")
    if not words:
        overview.print_help()
        return None
    if words[0] == "help":  # as other tools have it
        words = [*words[1:2], "--help"]
    name = words[0]
    if name.startswith("-"):
        overview.parse_words(words)  # --help and --version leave here, anything else is an error
    if name not in COMMANDS:
        raise UserError(f"There is no command '{name}'.{nearest(name, list(COMMANDS))} `wanloom --help` lists them.")
    command = importlib.import_module(f"wanloom.cli.{name}")
    parser = Parser(f"wanloom {name}", command.HELP)
    command.add_arguments(parser)
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    with parser.naming_options():
        arguments = parser.parse_words(words[1:])
        if hasattr(command, "check") and is_alone:  # before torch is loaded, and before ranks are started
            command.check(arguments)
    if is_alone:
        if is_launcher(arguments):
            from wanloom.cli import launch

            launch.check(arguments)
        if loads_torch(name, arguments) and "torch" not in sys.modules:
            say(f"wanloom {name}: loading PyTorch takes some seconds.", file=sys.stderr)
    if is_launcher(arguments):
        from wanloom.cli.launch import launch

        return parser, partial(launch, arguments, words)
    return parser, partial(command.run, arguments)


def is_launcher(arguments: argparse.Namespace) -> bool:
    """Whether this process only starts others."""
    return getattr(arguments, "nproc", None) is not None or getattr(arguments, "max_restarts", None) is not None


def loads_torch(name: str, arguments: argparse.Namespace) -> bool:
    """Whether the command takes seconds to start; a table of settings does not."""
    return name != "show" or not arguments.explain


def _run_one(run: Callable[[], int]) -> int:
    """A command in this process; those that know more of an OSError say it themselves."""
    try:
        return run()
    except BrokenPipeError:  # `| head -1` has read enough: no mistake of anyone
        let_go(sys.stdout)
        return 128 + signal.SIGPIPE


def _run_rank(parser: Parser, run: Callable[[], int]) -> int:
    """One of the processes of a run: joined to the others, and what all have to say is said once."""
    from wanloom.dist import process_group, rank, says_first

    try:
        with process_group():
            try:
                return run()
            except (UserError, OSError) as error:
                message, code = parser.name_options(sentence_of(error)), 2
            except KeyboardInterrupt:  # of all ranks; rank 0 may be in an exchange that ends only when this one leaves
                return _fail("Stopped.", 130) if rank() == 0 else 130
            except RuntimeError as error:  # groups are not ended: they may still wait for the other one
                _leave_if_lost(error, "has lost another rank, which ended or hangs and says why itself.")
                raise
            if not says_first(message):
                return code
            return _fail(message if rank() == 0 else f"rank {rank()}: {message}", code)
    except UserError as error:  # of every rank, and they are not joined
        return _fail(parser.name_options(str(error))) if rank() == 0 else 2
    except RuntimeError as error:
        world = os.environ["WORLD_SIZE"]
        _leave_if_lost(error, f"has not found all {world} processes: each must be started and reach rank 0.")
        raise


def _leave_if_lost(error: RuntimeError, message: str) -> None:
    """End the process when `error` means that another one is gone: nothing is left to do or worth waiting for."""
    from wanloom.dist import is_lost, rank

    if not is_lost(error):
        return
    code = _fail(f"rank {rank()} {message}", 1)
    time.sleep(1)  # a launcher shall see the other one first: its exit code is the reason
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End a rank without tearing Python down.

    torch keeps process groups, in meshes and as default arguments, so gloo's threads are still there; one that lets go
    of a tensor while Python ends aborts the process.
    """
    with suppress(OSError):  # the terminal is closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _fail(message: str, code: int = 2) -> int:
    with suppress(OSError):  # the terminal is closed
        say(f"wanloom: {message}", file=sys.stderr)
    return code
