"""The processes of a run: who this one is, on what device, and how they agree.

In: what torchrun says in the environment; without it there is one process and no process group. Out: rank and world
size, a process group (gloo, and NCCL beside it where there are GPUs), and the few exchanges of host values that the
rest needs. The one decision: a mistake on one rank is a mistake of the run: `together` makes every rank raise the same
sentence, and `says_first` tells which one prints it. Host values travel as JSON over gloo.
"""

import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from wanloom.devices import check_device_name
from wanloom.errors import UserError, sentence_of
from wanloom.signals import LAUNCHER, ended_by_ctrl_c
from wanloom.torch_private import default_store

TIMEOUT = timedelta(minutes=30)  # the first step of a large model compiles, a checkpoint is read
SAID = "wanloom/said"
HEARD = "wanloom/heard"  # by how many
COUNTER = "wanloom/counter"
JOINED = itertools.count()
WAIT_FOR_RANK_0 = 5.0  # seconds
LOOPBACK = "127.0.0.1"
# what gloo (a plain RuntimeError) and NCCL (a DistBackendError, as for its other errors) say of the other end
LOST = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out")
LOST += ("timeout caused pair closure", "Connect timeout", "connectFullMesh failed")
LOST += ("ncclRemoteError", "communicator was aborted", "Watchdog caught")


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def pick_device(name: str | None = None) -> torch.device:
    """The device of this process: the one asked for, or its GPU (CUDA_VISIBLE_DEVICES hides some), or the CPU.

    The processes of one machine take one GPU each, in order. Raises UserError when the one asked for is none, or
    cannot be used, or when a machine has more processes than GPUs.
    """
    if name is not None:
        check_device_name(name)
    if name is None and not torch.cuda.is_available():
        return torch.device("cpu")
    if name is None or (name == "cuda" and torch.cuda.is_available()):
        if world_size() == 1:
            return torch.device("cuda")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"This machine has {torch.cuda.device_count()} GPUs and more processes than that: start at most one "
                "process for each GPU."
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"The device '{name}' cannot be used: there is no GPU that torch can use. Leave `device` out.")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" is a device too, but nothing comes back from it
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without that device
        raise UserError(f"The device '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes for the time of the block; nothing for a run of one process, and where it has joined.

    Raises UserError when torchrun could not start them again, though it shall.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    check_restarts()
    if is_on_one_machine():
        stay_inside()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with ended_by_ctrl_c(says=False):  # the others may be gone already, and torch waits for them without a look at it
        store = PrefixStore(f"joined {next(JOINED)}", _open_store())  # the addresses of before are in it too
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank(), world_size=world_size())
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_restarts() -> None:
    """Raises UserError when torchrun on several machines would start processes again that cannot meet."""
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if several and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "After a restart by torchrun on several machines the processes would not find one another: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on each of them, or leave `max_restarts` out."
        )


def is_on_one_machine() -> bool:
    """Whether all processes of the run are on this machine."""
    return local_world_size() == world_size()


def stay_inside() -> None:
    """Let gloo and NCCL talk over the loopback interface: by themselves they would listen on the network.

    On one machine NCCL only introduces its processes to one another by sockets; the data goes between the GPUs.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"}


def serve_store(port: int = 0) -> TCPStore:
    """A store of this process that nobody on another machine can reach; torch's own one listens on all interfaces."""
    listening = socket.create_server((LOOPBACK, port), backlog=1024)
    port = listening.getsockname()[1]
    return TCPStore(LOOPBACK, port, None, True, TIMEOUT, wait_for_workers=False, master_listen_fd=listening.detach())


@cache
def _open_store() -> Store:
    """The store in which the processes find one another, open until the end: a port cannot be had twice.

    Raises UserError when the environment does not say where.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or not is_on_one_machine():
        store = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))[0]  # pyright: ignore
        if os.environ.get("GROUP_WORLD_SIZE") != "1":
            return store
        # torchrun keeps the store when it starts all again, with the addresses of processes that are gone
        # (pytorch issue 135712); the count is that of a machine, so it helps on one alone
        return PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    port = os.environ.get("MASTER_PORT", "")
    if not port.isdecimal():
        raise UserError(
            f"WORLD_SIZE is {world_size()}, but MASTER_PORT is not a port: start the processes with `nproc`."
        )
    if rank() == 0 and LAUNCHER not in os.environ:
        try:
            return serve_store(int(port))
        except OSError as error:
            raise UserError(f"The port {port} (MASTER_PORT) cannot be had: {error.strerror}.") from error
    return TCPStore(LOOPBACK, int(port), None, False, TIMEOUT, wait_for_workers=False)


def outlives_ranks() -> bool:
    """Whether the store is that of a launcher, not of rank 0."""
    return LAUNCHER in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank (of the group) has to say, in the order of ranks; anything that JSON can hold."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(data)]), group)
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
    padded[: len(data)] = data
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group)
    return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]


def highest(value: int, group: dist.ProcessGroup | None = None) -> int:
    """The largest of what the ranks give."""
    if world_size() == 1:
        return value
    most = torch.tensor([value])
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    return int(most)


def check_alike(own: dict[str, str], made: str, advice: str = "") -> None:
    """Raises UserError, on every rank, unless each is about to make the same: it comes from these values alone."""
    for number, other in enumerate(found := gather(own)):
        differs = [
            f"{name} is {other[name]}, on rank 0 {found[0][name]}" for name in own if other[name] != found[0][name]
        ]
        if differs:
            raise UserError(f"Rank {number} would make other {made} than rank 0: {'; '.join(differs)}.{advice}")


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A block without exchanges that every rank enters: a mistake on one rank is raised on all when it ends.

    Raises UserError, the same on every rank, for a UserError or an OSError on any.
    """
    if world_size() == 1:
        yield
        return
    cause = None
    try:
        yield
    except (UserError, OSError) as error:
        cause = error
    if not highest(int(cause is not None), group):
        return
    found = gather(None if cause is None else sentence_of(cause), group)
    wrong = [i for i, message in enumerate(found) if message is not None]
    if wrong:
        where = "" if wrong[0] == 0 else f"On rank {wrong[0]}: "
        raise UserError(where + found[wrong[0]]) from cause


class SharedCounter:
    """A number that the ranks count up together, from 0, each at its own time. All make the same ones in one order."""

    _made = itertools.count()

    def __init__(self) -> None:
        self._key = f"{COUNTER}/{next(self._made)}"
        self._alone = 0

    def add(self, number: int = 1) -> int:
        """Count `number` more, 0 to ask; returns the sum of all ranks by now. Waits for no one."""
        if world_size() > 1:
            return default_store().add(self._key, number)
        self._alone += number
        return self._alone


def says_first(message: str) -> bool:
    """Whether this rank is the one to print `message`: rank 0, or another one when rank 0 does not say the same."""
    if world_size() == 1 or not dist.is_initialized():
        return rank() == 0
    store = default_store()
    deadline = time.monotonic() + WAIT_FOR_RANK_0
    if rank() == 0:
        store.set(SAID, message)
        if not outlives_ranks():  # the store ends with this process
            while store.add(HEARD, 0) < world_size() - 1 and time.monotonic() < deadline:
                time.sleep(0.05)
        return True
    same = False
    while not same and time.monotonic() < deadline:
        same = store.check([SAID]) and store.get(SAID).decode() == message
        time.sleep(0 if same else 0.05)
    store.add(HEARD, 1)
    return not same


def is_lost(error: RuntimeError) -> bool:
    """Whether an error means that another process of the run is gone."""
    kinds = (dist.DistNetworkError, dist.DistStoreError)
    return world_size() > 1 and (isinstance(error, kinds) or any(words in str(error) for words in LOST))
