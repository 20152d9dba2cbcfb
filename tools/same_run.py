"""Whether two revisions of the repository do the same work, to the bit: data, training and videos of both, compared.

In: two revisions of git; `.` is the working tree as it is. Out: a line a group of items, the items that differ with
both values, and exit code 0 when nothing differs, 1 when something does, 2 when a command failed. The one decision:
nothing is known of wanloom but its command line, so that rooms and modules may move between the two; the one exception
is the name `LATENTS` below. Each revision runs from a checkout of its own with one thread and the same relative paths,
both at once. What a commit gave is kept in `build/same_run`, by commit, text of this file and version of torch.

    python tools/same_run.py main .             two minutes on two idle cores
    python tools/same_run.py --fresh . .        whether a revision equals itself
"""

import argparse
import hashlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "same_run"
LATENTS = ("wanloom.codecs.vae", "VaeCodec", "decode")  # what is given the latents of a video
TIMES = {"seconds", "tokens_per_second", "model_tflops_per_gpu", "mfu", "peak_memory_gib"}
# of all JSON: what may differ between two equal runs. The identity of a checkpoint counts the seconds it says
NOT_WORK = TIMES | {"versions", "command", "transformer"}
PATIENCE = 600.0  # seconds for one command
LEAVING = 20.0  # seconds from SIGTERM to SIGKILL
LAST_LINES = 15  # of a command that failed
SHOWN = 20  # items that differ, of a group

SIZE = ("--model", "tiny", "--height", "64", "--width", "64", "--val-fraction", "0.2", "--shard-size", "1")
# clips have 80 tokens and stills 16: two or three packs a step. Only settings without which it is not this run
BATCH = ("batch.samples=4", "batch.tokens_per_pack=160", "schedule.warmup_steps=4", "log.every=1", "optimizer.lr=0.004")
SAVES = ("checkpoint.every=10", "checkpoint.keep=9", "log.validate_every=10")
ONE = ("train", "tiny", "data.path=data", "run_dir=one", *BATCH, *SAVES)
TWO = ("train", "tiny", "data.sources=[{path: data, weight: 0.7}, {path: stills, weight: 0.3}]", "run_dir=two")
SPLIT = ("train", "tiny", "data.path=data", "run_dir=split", *BATCH)
MAKE = ("generate", "--checkpoint", "one", "--ema", "--prompts", "media/prompts.jsonl", "--steps", "4", *SIZE[2:6])
COMMANDS = (
    ("prepare", "media/clips", "data", *SIZE, "--frames", "17", "--clips", "all"),
    ("prepare", "media/clips", "stills", *SIZE, "--mode", "frames", "--keep-aspect", "--dtype", "fp32", "--nproc", "2"),
    (*ONE, "train.steps=10"),
    (*ONE, "train.steps=20"),  # goes on in the middle
    (*TWO, *BATCH, *SAVES, "train.steps=20", "--nproc", "2"),
    (*SPLIT, "train.steps=4", "parallel.tp=2", "--nproc", "2"),
    (*MAKE, "--out", "made"),
    (*MAKE, "--out", "made2", "--nproc", "2"),
)
PROMPTS = (
    {"prompt": "Waves move to the left.", "frames": 17},
    {"prompt": "A still of waves.", "frames": 1, "negative": "A dark picture.", "seed": 5},
)

Items = dict[str, dict[str, str]]  # group, name: what it is, short enough to be shown


class ToolError(Exception):
    """What keeps the comparison from being made; the text is for the user."""


# ---- what both revisions start from


def make_media(folder: Path) -> None:
    """Seven clips, one of them of two lengths, and five pictures, two of them wide; every file with a caption."""
    import av
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)

    def draw(numbers: Any, k: int, width: int = 64) -> Any:
        y, x = np.mgrid[:64, :width]
        angle = (x * numbers[0] + y * numbers[1] + 4 * k * numbers[2])[..., None] / 9 + numbers[3:]
        return (127 + 100 * np.sin(angle)).astype(np.uint8)

    clips = folder / "clips"
    clips.mkdir(parents=True)
    for i in range(7):
        numbers = rng.uniform(-2, 2, 6)
        with av.open(str(clips / f"clip{i}.mp4"), "w") as file:
            # mbtree reads memory that nobody wrote in pictures as small as these: other bytes in the next run
            stream = file.add_stream("libx264", rate=16, options={"x264-params": "mbtree=0"})
            stream.codec_context.thread_count = 1
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for k in range(33 if i == 6 else 17):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(draw(numbers, k))))
            file.mux(stream.encode())
        (clips / f"clip{i}.txt").write_text(f"Waves {i} move" + " on and on" * i)
    for i in range(5):
        Image.fromarray(draw(rng.uniform(-2, 2, 6), 0, 64 if i < 3 else 96)).save(clips / f"still{i}.png")
        (clips / f"still{i}.txt").write_text(f"A still of waves {i}" + " and more" * i)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))


# ---- a revision runs


class Revision(NamedTuple):
    """A revision as it was named, its commit, and the folder that has its code."""

    name: str
    commit: str  # "" when the working tree is not that of a commit
    code: Path

    @property
    def kept(self) -> Path | None:
        """Where its items are kept."""
        tool = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
        name = f"{self.commit}-{tool}-{importlib.metadata.version('torch')}.json"
        return KEPT / name if self.commit else None


def git(*words: str) -> str:
    """What git says. Raises ToolError with its own words when it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolError(f"git {shlex.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checkouts(names: Sequence[str], folder: Path) -> Iterator[list[Revision]]:
    """The revisions, each checked out below `folder`; the worktrees are gone afterwards, whatever happens."""
    commits = [git("rev-parse", "--verify", f"{'HEAD' if name == '.' else name}^{{commit}}") for name in names]
    is_dirty = bool(git("status", "--porcelain"))
    found = list[Revision]()
    try:
        for i, (name, commit) in enumerate(zip(names, commits, strict=True)):
            if name == "." and is_dirty:
                found.append(Revision(name, "", ROOT))
                continue
            found.append(Revision(name, commit, folder / f"code{i}"))
            git("worktree", "add", "--detach", str(found[-1].code), commit)
        yield found
    finally:
        for revision in found:
            if revision.code.is_relative_to(folder):
                # not `git`: one that cannot be removed, as it was never made, must not keep the other
                remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(revision.code)]
                subprocess.run(remove, capture_output=True, check=False)
        git("worktree", "prune")


def run_python(revision: Revision, words: Sequence[str], work: Path, stop: threading.Event) -> None:
    """Run Python on the revision's code in `work`. Raises ToolError when it fails, or when `stop` is set."""
    paths = [str(revision.code)]
    if "generate" in words:
        paths.insert(0, str(work / "prelude"))  # not for the others: it is Python's only sitecustomize
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile() as said:
        # a session of its own: Ctrl-C comes to this tool alone, which ends it
        process = subprocess.Popen(
            [sys.executable, *words], cwd=work, env=env, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            end = time.monotonic() + PATIENCE
            while process.poll() is None and not stop.is_set() and time.monotonic() < end:
                time.sleep(0.05)
            if stop.is_set():
                raise ToolError("stopped")
            code = process.poll()
        finally:
            end_process(process)
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if code != 0:
        how = f"has not ended after {PATIENCE:.0f} s" if code is None else f"ended with exit code {code}"
        last = "\n".join(f"    {line}" for line in lines[-LAST_LINES:])
        raise ToolError(f"{revision.name}: `python {shlex.join(words)}` {how}. Its last lines:\n{last}")


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End it by SIGTERM, which its own processes are told too, then by SIGKILL."""
    process.terminate()
    try:
        process.wait(LEAVING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run_revision(revision: Revision, media: Path, work: Path, stop: threading.Event) -> Items:
    """All commands of a revision, and what they made."""
    work.mkdir()
    (work / "media").symlink_to(media)
    (work / "prelude").mkdir()
    prelude = f"import sys\nsys.path.insert(0, {str(ROOT / 'tools')!r})\nimport same_run\nsame_run.watch_latents()\n"
    (work / "prelude" / "sitecustomize.py").write_text(prelude + "del sys.path[0]\n")
    place = str(revision.code / "wanloom" / "__init__.py")
    check = f"import importlib.util as u; found = u.find_spec('wanloom').origin; assert found == {place!r}, found"
    run_python(revision, ("-c", check), work, stop)
    for i, words in enumerate(COMMANDS, 1):
        began = time.monotonic()
        run_python(revision, ("-m", "wanloom", *words), work, stop)
        took = time.monotonic() - began
        print(f"  {revision.name}: {words[0]}, {i} of {len(COMMANDS)}, {took:.1f} s", flush=True)
    items = collect(work)
    if len(items["latents"]) != len(PROMPTS) * sum(words[0] == "generate" for words in COMMANDS):
        name = ".".join(LATENTS)
        raise ToolError(f"{revision.name}: `{name}` was not called once a video: is it another name now? See LATENTS.")
    return items


def watch_latents() -> None:
    """Let the decoder of this process write what it is given into the folder `latents`."""

    class Finder(importlib.abc.MetaPathFinder):
        """Wraps the decoder when its module is loaded; to load it here would be to load torch before wanloom does."""

        def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
            if fullname != LATENTS[0]:
                return None
            spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = partial(load_watched, spec.loader.exec_module)
            return spec

    sys.meta_path.insert(0, Finder())


def load_watched(load: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Load the decoder's module and put `decode` in the place of its own."""
    load(module)
    holder = getattr(module, LATENTS[1], None)
    own = getattr(holder, LATENTS[2], None)
    if own is None:
        raise ImportError(f"tools/same_run.py needs `{'.'.join(LATENTS)}`, which is gone: see LATENTS there")

    def decode(self: Any, latents: Any, *args: Any, **named: Any) -> Any:
        import numpy as np

        folder = Path("latents")
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{len(list(folder.iterdir()))}.npy", latents.detach().float().cpu().numpy())
        return own(self, latents, *args, **named)

    setattr(holder, LATENTS[2], decode)


# ---- what it made


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def collect(work: Path) -> Items:
    """Every item below the folder by group and name."""
    items: Items = {"media": read_files(work, (work / "media").resolve().rglob("*.*"))}
    prepared = [path.parent for path in sorted(work.glob("*/index.parquet"))]
    tars = [path for folder in prepared for path in folder.rglob("*.tar*")]
    items["shards"] = read_files(work, tars)
    items["files of shards"] = {k: v for path in tars if path.suffix == ".tar" for k, v in read_tar(work, path).items()}
    items["index columns"] = {k: v for folder in prepared for k, v in read_index(folder).items()}
    items["prepared json"] = {
        k: v for folder in prepared for path in folder.rglob("*.json") for k, v in read_json(work, path).items()
    }
    runs = [path.parent for path in sorted(work.glob("*/metrics.jsonl"))]
    items["tensors"] = {
        k: v for run in runs for path in run.rglob("*.safetensors") for k, v in read_tensors(work, path).items()
    }
    items["metrics"] = {k: v for run in runs for k, v in read_metrics(run / "metrics.jsonl").items()}
    made = sorted(work.glob("made*/*.*"))
    items["videos and images"] = read_files(work, [path for path in made if path.suffix in (".mp4", ".png")])
    items["generated json"] = {
        k: v for path in made if path.suffix == ".json" for k, v in read_json(work, path).items()
    }
    items["latents"] = read_latents(work / "latents")
    empty = [group for group, found in items.items() if not found]
    if empty:
        raise ToolError(f"The commands made no {', no '.join(empty)}: has a folder or a file another name now?")
    return items


def read_files(work: Path, paths: Iterator[Path] | Sequence[Path]) -> dict[str, str]:
    """Every byte of files."""
    found = {}
    for path in sorted(paths):
        name = str(path.relative_to(work)) if path.is_relative_to(work) else path.name
        found[name] = f"{path.stat().st_size} bytes {digest(path.read_bytes())}"
    return found


def read_tar(work: Path, path: Path) -> dict[str, str]:
    """The files in a shard, so that one that differs has a name; of samples each tensor alone."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name, file = f"{path.relative_to(work)}: {member.name}", tar.extractfile(member)
            data = file.read() if file else b""
            if member.name.endswith(".safetensors"):
                found |= {f"{name}: {key}": value for key, value in split_tensors(data).items()}
            else:
                found[name] = f"{len(data)} bytes {digest(data)}"
    return found


def read_index(folder: Path) -> dict[str, str]:
    """Each column of an index by its values and type; the file itself names the library that wrote it."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / "index.parquet")
    return {
        f"{folder.name}: {name}": f"{column.type} {digest(json.dumps(column.to_pylist()).encode())}"
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def read_json(work: Path, path: Path) -> dict[str, str]:
    """Every key of the first level of a file, without times, versions and the place of `work`."""
    value = json.loads(path.read_text().replace(str(work), "."))
    pairs = value.items() if isinstance(value, dict) else [("all", value)]
    name = path.relative_to(work)
    return {f"{name}: {key}": json.dumps(without_times(found)) for key, found in pairs if key not in NOT_WORK}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(found) for key, found in sorted(value.items()) if key not in NOT_WORK}
    return [without_times(found) for found in value] if isinstance(value, list) else value


def read_tensors(work: Path, path: Path) -> dict[str, str]:
    return {f"{path.relative_to(work)}: {name}": text for name, text in split_tensors(path.read_bytes()).items()}


def split_tensors(data: bytes) -> dict[str, str]:
    """The tensors of a file of safetensors by name; the format is simple, and read here no type is converted."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    found = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        first, last = (start + offset for offset in about["data_offsets"])
        found[name] = describe_tensor(about["dtype"], about["shape"], data[first:last])
    return found


def describe_tensor(dtype: str, shape: Sequence[int], data: bytes) -> str:
    """Its type, shape, the root of its mean square where that is easily had, and its bytes."""
    import numpy as np

    size = ""
    if dtype == "F32" and data:
        size = f" rms {np.sqrt(np.square(np.frombuffer(data, '<f4').astype('f8')).mean()):.9g}"
    return f"{dtype} {list(shape)}{size} {digest(data)}"


def read_metrics(path: Path) -> dict[str, str]:
    """Every number of every record but the times; `repr` of a float is all of its bits."""
    found = {}
    for i, line in enumerate(path.read_text().splitlines()):
        record = json.loads(line)
        name = f"{path.parent.name}: record {i}, step {record.get('step')}"
        found |= {f"{name}: {key}": repr(value) for key, value in record.items() if key not in TIMES}
    return found


def read_latents(folder: Path) -> dict[str, str]:
    import numpy as np

    arrays = {path.stem: np.load(path, allow_pickle=False) for path in sorted(folder.glob("*.npy"))}
    return {f"video {name}": describe_tensor("F32", array.shape, array.tobytes()) for name, array in arrays.items()}


# ---- both beside each other


def compare(first: Items, second: Items) -> dict[str, list[tuple[str, str, str]]]:
    """By group, the items that differ: name and what each has."""
    found = {}
    for group in dict.fromkeys((*first, *second)):
        one, two = first.get(group, {}), second.get(group, {})
        rows = [(name, one.get(name, "missing"), two.get(name, "missing")) for name in dict.fromkeys((*one, *two))]
        found[group] = [row for row in rows if row[1] != row[2]]
    return found


def show(names: Sequence[str], first: Items, second: Items, limit: int) -> bool:
    """Print what differs; returns whether nothing does."""
    different = compare(first, second)
    for group, rows in different.items():
        count = len(first.get(group, {}).keys() | second.get(group, {}).keys())
        print(f"{group} {count} equal" if not rows else f"{group} {count}: {len(rows)} DIFFER")
        for name, *values in rows[:limit]:
            print(f"  {name}")
            for revision, value in zip(names, values, strict=True):
                print(f"      {revision}: {value}")
        if len(rows) > limit:
            print(f"  and {len(rows) - limit} more, with --all")
    return not any(different.values())


def find_items(names: Sequence[str], is_fresh: bool) -> list[Items]:
    """The items of each revision, kept ones where there are some."""
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="same_run") as name, checkouts(names, Path(name).resolve()) as revisions:
        folder, tasks = Path(name).resolve(), []
        known = [None if is_fresh else read_kept(revision) for revision in revisions]
        make_media(folder / "media")
        with ThreadPoolExecutor(len(names)) as pool:
            try:
                for i, (revision, items) in enumerate(zip(revisions, known, strict=True)):
                    work = folder / f"work{i}"
                    run = partial(run_revision, revision, folder / "media", work, stop)
                    tasks.append(pool.submit(run if items is None else partial(dict, items)))
                done = wait(tasks, return_when=FIRST_EXCEPTION).done
                errors = [error for task in done if (error := task.exception())]
            finally:
                stop.set()
        if errors:  # of the first that failed; the other one says only that it was stopped
            raise errors[0]
        found = [task.result() for task in tasks]
    for revision, items, before in zip(revisions, found, known, strict=True):
        if revision.kept and before is None:
            KEPT.mkdir(parents=True, exist_ok=True)
            revision.kept.write_text(json.dumps(items, indent=1))
    return found


def read_kept(revision: Revision) -> Items | None:
    if revision.kept is None or not revision.kept.exists():
        return None
    print(f"  {revision.name}: known from {revision.kept.relative_to(ROOT)}", flush=True)
    return json.loads(revision.kept.read_text())


def interrupt(number: int, _: FrameType | None) -> None:
    """End, once: a second signal would leave worktrees behind, and the first takes seconds."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REV", help="of git; `.` is the working tree")
    parser.add_argument("--fresh", action="store_true", help="run what is known, too")
    parser.add_argument("--all", action="store_true", help=f"show all items that differ, not {SHOWN} of a group")
    arguments = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    began = time.monotonic()
    try:
        first, second = find_items(arguments.revisions, arguments.fresh)
    except ToolError as error:
        print(f"same_run: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("same_run: stopped", file=sys.stderr)
        return 130
    is_same = show(arguments.revisions, first, second, sys.maxsize if arguments.all else SHOWN)
    print(f"{'equal' if is_same else 'NOT EQUAL'}, {time.monotonic() - began:.0f} s")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
