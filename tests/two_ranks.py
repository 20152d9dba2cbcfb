"""What each of two ranks does under torchrun for `test_dist.py`: it writes down what it saw."""

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed

from wanloom import cli
from wanloom.cli import show
from wanloom.dist import SharedCounter, gather, process_group, rank, says_first, together
from wanloom.errors import UserError


def agree(out: Path) -> None:
    """Gather, agree on mistakes, and find out who says what."""
    seen = {}
    with process_group():
        me = rank()
        seen["gathered"] = gather({"rank": me, "text": "ä" * (1 + 1000 * me), "none": None})
        alone = [torch.distributed.new_group([i]) for i in range(2)]
        seen["in a group"] = gather(me, alone[me])
        for name, wrong in (("one", {1: "no such file"}), ("all", {0: "bad", 1: "bad"}), ("none", {})):
            try:
                with together():
                    if me in wrong:
                        raise UserError(wrong[me])
                seen[name] = "agreed"
            except UserError as error:
                seen[name] = str(error)
        try:
            with together():
                if me == 0:
                    raise FileNotFoundError(2, "No such file or directory", "x.tar")
        except UserError as error:
            seen["system"] = str(error)
        seen["same"] = says_first("the same")
        gather(None)
        seen["other"] = says_first(f"other words, {me}")
    (out / f"{me}.json").write_text(json.dumps(seen))


def lose(_) -> int:
    """Rank 1 dies while rank 0 waits for it."""
    gather(None)
    if rank() == 1:
        os._exit(7)
    gather(None)
    return 0


def come_back(out: Path) -> None:
    """Rank 1 dies once; when both are started again they meet anew."""
    with process_group():
        torch.distributed.barrier()
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        counted = SharedCounter().add()
        torch.distributed.barrier()
        (out / f"{rank()}.json").write_text(json.dumps(counted))


if sys.argv[1] == "come_back":
    come_back(Path(sys.argv[2]))
elif sys.argv[1] == "agree":
    agree(Path(sys.argv[2]))
else:
    show.run = lose
    sys.exit(cli.main(["show", "x"]))
