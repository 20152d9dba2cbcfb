"""`--nproc`: the processes are started, told to stop and waited for, and their exit code is that of the command."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from wanloom.cli import launch, main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LOOPBACK = "0100007F"
START = """
import sys
from wanloom.cli import launch
launch.NOTICE = 1
sys.exit(launch.run_processes(2, sys.argv[2:], int(sys.argv[1])))
"""
# waits to be stopped, then "saves" for a second; or does what its rank is told to
WORKER = """
import os, pathlib, sys, time
from wanloom.signals import StopSignal, follow_launcher
rank, out = os.environ["RANK"], pathlib.Path(sys.argv[1])
follow_launcher()
if "join" in sys.argv:
    from wanloom.dist import gather, process_group
    from wanloom.checkpoint.writer import _build_group
    joined = process_group()
    joined.__enter__()
    gather(None)
    gather(None, _build_group())
with StopSignal("saving") as stop:
    (out / f"began-{rank}").write_text(os.environ["WORLD_SIZE"] + " " + str(os.getpid()))
    if rank == "1" and "dies" in sys.argv:
        os.kill(os.getpid(), 9)
    if rank == "1" and "once" in sys.argv and not (out / "again").exists():
        (out / "again").touch()
        os._exit(9)
    if "once" in sys.argv and (out / "again").exists():
        sys.exit(0)
    if rank == "1" and "mistake" in sys.argv:
        with (out / "mistakes").open("a") as file:
            file.write("x")
        sys.exit(2)
    while not stop.received or "busy" in sys.argv:
        time.sleep(0.05)
    time.sleep(1)  # a second signal would end this
    (out / f"saved-{rank}").touch()
sys.exit(128 + stop.received)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts two workers below a launcher; what is left of them is killed at the end."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the worker is a script of another folder
    (tmp_path / "worker.py").write_text(WORKER)
    started = []

    def begin(*words: str, restarts: int = 0) -> subprocess.Popen:
        command = [sys.executable, "-c", START, str(restarts), str(tmp_path / "worker.py"), str(tmp_path), *words]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
    for pid in pids(tmp_path):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()


def pids(folder: Path) -> list[int]:
    return [int(path.read_text().split()[1]) for path in folder.glob("began-*")]


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def have_begun(folder: Path) -> bool:
    return len([path for path in folder.glob("began-*") if path.read_text().startswith("2 ")]) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_every_process_save(start, tmp_path, number):
    process = start()
    wait_for(lambda: have_begun(tmp_path))
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + number
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert errors == f"\n{number.name}: finishing saving; once more stops at once.\n"


def test_a_second_signal_stops_at_once(start, tmp_path):
    process = start("busy")
    wait_for(lambda: have_begun(tmp_path))
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)  # within a second it counts as the same
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "KeyboardInterrupt" in errors  # the worker's; a command turns it into a sentence
    assert not list(tmp_path.glob("saved-*")) and not any(is_running(pid) for pid in pids(tmp_path))


def test_a_scheduler_may_signal_the_processes_too(start, tmp_path):
    process = start()
    wait_for(lambda: have_begun(tmp_path))
    for pid in (*pids(tmp_path), process.pid):
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and len(list(tmp_path.glob("saved-*"))) == 2


def test_a_killed_launcher_leaves_nothing_behind(start, tmp_path):
    process = start()
    wait_for(lambda: have_begun(tmp_path))
    process.kill()
    wait_for(lambda: len(list(tmp_path.glob("saved-*"))) == 2)
    wait_for(lambda: not any(is_running(pid) for pid in pids(tmp_path)))


def listening(pid: int) -> set[str]:
    """The addresses, in hex as the kernel writes them, at which a process waits for connections."""
    held = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in held:
                found.add(local.split(":")[0])
    return found


def test_no_socket_listens_to_the_network(start, tmp_path, monkeypatch):
    """Whoever can reach the sockets of a run can stop or change it; that is this machine alone."""
    outside = [name for _, name in socket.if_nameindex() if name.startswith(("e", "w"))]
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(key, outside[0] if outside else "lo")  # as the name of most machines leads there
    process = start("join")
    wait_for(lambda: have_begun(tmp_path))
    ranks = pids(tmp_path)
    for pid in ranks:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert not [entry for entry in environment if entry.startswith(b"TORCHELASTIC")]
    assert listening(process.pid) == {LOOPBACK}, "the store of the launcher"
    for pid in ranks:
        assert listening(pid) == {LOOPBACK}, "those of gloo"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)


def test_ranks_without_a_launcher_stay_inside_too(tmp_path, monkeypatch):
    """The store is that of rank 0 then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shared = {"MASTER_ADDR": "0.0.0.0", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path), "join"]
    ranks = [subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}) for rank in range(2)]
    try:
        wait_for(lambda: have_begun(tmp_path))
        assert [listening(process.pid) for process in ranks] == [{LOOPBACK}] * 2
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_a_launcher_killed_at_once_leaves_nothing_behind(tmp_path, monkeypatch):
    """In the seconds in which the processes import torch: their parent is watched from the first line."""
    monkeypatch.delenv("RANK", raising=False)
    words = ["train", "tiny", "--mock=1x64x64", f"run_dir={tmp_path}", "--nproc=2"]
    process = subprocess.Popen([sys.executable, "-m", "wanloom", *words], cwd=ROOT, stderr=subprocess.DEVNULL)

    def children() -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]

    wait_for(lambda: len(children()) == 2)
    ranks = children()
    process.kill()
    process.wait()
    try:
        wait_for(lambda: not any(is_running(pid) for pid in ranks), 20)
    finally:
        for pid in ranks:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def test_the_first_failure_is_the_exit_code(start, tmp_path):
    process = start("mistake", restarts=2)
    errors = process.communicate(timeout=60)[1]
    assert "Traceback" not in errors and "Root Cause" not in errors
    assert process.returncode == 2
    assert (tmp_path / "mistakes").read_text() == "x", "a mistake is not repeated"
    process = start("dies")
    assert "wanloom: rank 1 was ended by SIGKILL.\n" in process.communicate(timeout=60)[1]
    assert process.returncode == 137


def test_processes_that_die_are_started_again(start, tmp_path):
    process = start("once", restarts=1)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "starting all processes again, 0 restarts left." in errors
    (tmp_path / "again").unlink()
    process = start("once")
    process.communicate(timeout=60)
    assert process.returncode == 9


def test_training_stops_and_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    words = ["train", "tiny", "--mock=1x64x64", f"run_dir={run_dir}", "batch.samples=4", "log.every=1", "--nproc=2"]
    env = {key: value for key, value in os.environ.items() if key != "RANK"} | {"OMP_NUM_THREADS": "1"}

    def begin(steps: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "wanloom", *words, f"train.steps={steps}"]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = begin(1_000_000)
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file() and (run_dir / "metrics.jsonl").read_text())
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors, errors
    assert out.endswith("Stopped by a signal, and saved. To go on: the same command again\n")
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    process = begin(int(checkpoint.name.removeprefix("step_")) + 1)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and f"Going on from {checkpoint}" in out and "Done: " in out, errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "0"], "--nproc is 0: at least one process is needed."),
        (["--nproc", "5"], "--nproc is 5, but this machine has 4 GPUs"),
        (["--max-restarts", "2"], "give --nproc too"),
        (["--nproc", "2", "--max-restarts", "-1"], "it counts from 0"),
    ],
)
def test_a_mistake_is_a_sentence(monkeypatch, capsys, words, message):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert main(["train", "tiny", "--mock", "run_dir=x", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wanloom: ") and message in error and error.count("\n") == 1


def test_one_of_several_processes_starts_no_more(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "tiny", "--mock", "run_dir=x", "--nproc=1"]) == 2
    assert "this is one of several already" in capsys.readouterr().err


def test_a_named_device_is_not_for_several(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["generate", "--prompt", "x", "--device", "cuda:1", "--nproc", "2"]) == 2
    assert "--device cuda:1 is one device" in capsys.readouterr().err


def test_the_command_is_the_same_without_its_options(monkeypatch, tmp_path):
    started = []
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(launch, "run_processes", lambda *arguments: started.append(arguments) or 7)
    words = ["train", "tiny", "--nproc", "2", "run_dir=x y", "--max-restarts=3", "--mock", "1x64x64"]
    assert main(words) == 7
    assert main(["generate", "--nproc=2", "--device", "cpu", "--prompt", "--nproc is no option here"]) == 7
    assert os.environ["OMP_NUM_THREADS"] == "3", "what is set stays"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    assert main(["prepare", "in", "out", "--nproc", "2"]) == 7
    assert os.environ["OMP_NUM_THREADS"] == "4"
    assert started == [
        (2, ("-m", "wanloom", "train", "tiny", "run_dir=x y", "--mock", "1x64x64"), 3),
        (2, ("-m", "wanloom", "generate", "--device", "cpu", "--prompt", "--nproc is no option here"), 0),
        (2, ("-m", "wanloom", "prepare", "in", "out"), 0),
    ]
