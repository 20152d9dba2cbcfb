"""One rank of the checkpoint tests: started once for each rank with a folder, it goes through all of them.

What a rank must hold is told by torch's own sharding of the full values, so nothing here is computed by boxes.
"""

import os
import resource
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from saved_weights import load_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from wanloom.checkpoint import writer as module
from wanloom.checkpoint.saved import find_checkpoint
from wanloom.checkpoint.settings import CheckpointConfig
from wanloom.checkpoint.writer import Checkpointer, load_tensors
from wanloom.dist import gather, is_lost
from wanloom.errors import UserError
from wanloom.model.dit import WanDiT
from wanloom.model.settings import DiTConfig
from wanloom.parallel.mesh import Mesh, resolve_layout
from wanloom.parallel.params import box_of, local
from wanloom.parallel.settings import ParallelConfig
from wanloom.runs.build import build_model
from wanloom.runs.recipe import build_run, dump_run
from wanloom.runs.trained import open_init

SHAPES = {"one": (1, 5), "three": (3,), "seven": (7, 6), "wide": (6, 7), "even": (8, 5), "flat": (13, 2, 3)}
CUT_BY_TP = {"seven": 0, "wide": 1, "even": 0, "three": 0}
STATE = {"model": DiTConfig(dim=8, ffn_dim=8, num_heads=1, num_layers=1).model_dump()}
SMALL = DiTConfig(dim=48, ffn_dim=80, num_heads=4, num_layers=2, text_dim=24)
RANK, FOLDER = (int(sys.argv[1]), Path(sys.argv[2])) if __name__ == "__main__" else (0, Path())


def full(name: str) -> Tensor:
    seed = sum(name.encode())
    shape = SHAPES.get(name.rsplit(".", 1)[-1], ())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def join(world: int, name: str, rank: int = RANK) -> bool:
    """Be rank `rank` of `world` from now on; False for those that are not."""
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    if world > 1 and rank < world:
        store = f"file://{FOLDER}/store-{name}"
        dist.init_process_group("gloo", store, timeout=timedelta(seconds=40), rank=rank, world_size=world)
    return rank < world


def build(layout: str) -> dict[str, Tensor]:
    """The tensors of a run in a layout, with their full values."""
    names, tp = list(SHAPES), None
    if layout == "plain":
        return tensors_of({name: nn.Parameter(full(name)) for name in names}) | {"model.scalar": full("scalar")}
    if layout in ("fsdp", "tp"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    if layout == "tp":
        tp = mesh
    elif layout == "fsdp_tp":
        mesh, tp = mesh["a"], mesh["b"]
    elif layout == "pp":
        names, mesh = names[mesh.get_local_rank("a") :: 2], mesh["b"]
    root = nn.Module()
    for name in names:
        value = full(name)
        if tp is not None and name in CUT_BY_TP:
            value = distribute_tensor(value, tp, [Shard(CUT_BY_TP[name])])
        root.register_parameter(name, nn.Parameter(value))
    if layout != "tp":
        fully_shard(root, mesh=mesh)
    out = tensors_of(dict(root.named_parameters()))
    if layout != "pp" or RANK > 1:
        out["model.scalar"] = full("scalar")
    if layout == "fsdp_tp":
        out["ema.three"] = distribute_tensor(-2 * full("three"), tp, [Replicate()])
    return out


def tensors_of(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Weights, and their average with other values: cut as the weights are."""
    out: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in params.items()}
    for name, p in params.items():
        out[f"ema.{name}"] = p.detach().clone()
        local(out[f"ema.{name}"]).mul_(-2)
    return out


def save(run_dir: Path, layout: str, step: int = 1) -> Checkpointer:
    checkpointer = Checkpointer(run_dir, CheckpointConfig(keep=9))
    tensors = build(layout)
    checkpointer.save(step, tensors, {"step": step, **STATE}, "seed: 1\n")
    for tensor in tensors.values():  # what is saved is the moment of the call
        local(tensor).zero_()
    checkpointer.wait()
    return checkpointer


def check_load(run_dir: Path, layout: str) -> None:
    """Load into a layout; every rank has what torch's sharding of the full values gives it."""
    wanted, tensors = build(layout), build(layout)
    for tensor in tensors.values():
        local(tensor).fill_(torch.nan)
    load_tensors(find_checkpoint(run_dir), tensors)
    for name in tensors:
        assert torch.equal(local(tensors[name]), local(wanted[name])), (run_dir.name, layout, name)


def check_files(run_dir: Path, writers: int) -> None:
    """Every value is in the files once, and `writers` ranks have written."""
    files = list(find_checkpoint(run_dir).glob("*.safetensors"))
    assert len({path.name[:11] for path in files}) == writers == len(files), [p.name for p in files]
    counts: dict[str, int] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                counts[name] = counts.get(name, 0) + file.get_tensor(name).numel()
    wanted = {f"{kind}.{name}": full(name).numel() for name in SHAPES for kind in ("model", "ema")}
    assert counts == wanted | {"model.scalar": 1}


def told(block) -> str:
    """The sentence that a block ends with, the same on every rank."""
    try:
        block()
    except UserError as error:
        sentences = gather(str(error))
        assert len(set(sentences)) == 1, sentences
        return sentences[0]
    raise AssertionError("no mistake was found")


def begin_run(run_dir: Path) -> None:
    """A checkpoint of one process to begin from: weights, and an average that is another one."""
    tensors = dict[str, Tensor]()
    for name, param in WanDiT(SMALL).named_parameters():
        value = torch.randn(param.shape, generator=torch.Generator().manual_seed(sum(name.encode())))
        tensors |= {f"model.{name}": value, f"ema.{name}": -2 * value}
    checkpointer = Checkpointer(run_dir, CheckpointConfig())
    checkpointer.save(1, tensors, {"step": 1, "model": SMALL.model_dump()}, dump_run(build_run("tiny", [])))
    checkpointer.close()


def check_layouts() -> None:
    """Written by 3 and by 4 ranks in five layouts, read by 4, 3, 2 and 1 in every layout."""
    if join(3, "three"):
        save(FOLDER / "fsdp3", "fsdp").close()
    saved = {"fsdp": 4, "hsdp": 4, "fsdp_tp": 4, "tp": 4, "pp": 4}
    join(4, "four")
    for layout, writers in saved.items():
        save(FOLDER / layout, layout).close()
        check_files(FOLDER / layout, writers)
    runs = [FOLDER / name for name in ("fsdp3", *saved)]
    for run_dir in runs:
        for layout in saved:
            check_load(run_dir, layout)
    for world, layouts in ((3, ["fsdp", "tp"]), (2, ["fsdp", "tp"]), (1, ["plain"])):
        if join(world, f"load-{world}"):
            for run_dir in runs:
                for layout in layouts:
                    check_load(run_dir, layout)


def check_strange_boxes() -> None:
    """The box of every piece holds the values that torch has put there, on axes in any order."""
    join(4, "boxes")
    mesh = init_device_mesh("cpu", (2, 2))
    for shape in ((7, 6), (1, 3), (2, 9)):
        value = torch.arange(float(torch.Size(shape).numel())).view(shape)
        for placements in ([Shard(0), Shard(0)], [Shard(1), Shard(0)], [Replicate(), Shard(1)], [Shard(1), Shard(1)]):
            tensor = distribute_tensor(value, mesh, placements)
            assert isinstance(tensor, DTensor)
            assert torch.equal(value[box_of(tensor)], local(tensor)), (shape, placements)


def check_mistakes() -> None:
    """A full disk on one rank, damage, another model on one rank, a folder that is not shared."""
    join(4, "mistakes")
    run_dir = FOLDER / "mistakes"
    checkpointer, tensors = save(run_dir, "fsdp"), build("fsdp")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if RANK == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    checkpointer.save(2, tensors, {"step": 2, **STATE}, "")
    while not checkpointer.failed:
        time.sleep(0.01)
    sentence = told(checkpointer.wait)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step 2 could not be written: On rank 2: File too large. The last whole" in sentence, sentence
    assert str(checkpointer.last) in sentence and "step_0000001. Make room" in sentence, sentence
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_0000001"]
    gather(None)
    checkpointer.save(3, tensors, {"step": 3, **STATE}, "")  # the disk has room again
    checkpointer.wait()
    assert not checkpointer.failed and checkpointer.last == find_checkpoint(run_dir)
    checkpointer.close()
    check_load(run_dir, "fsdp")
    check_damage(run_dir)
    other = tensors | ({"model.new": torch.zeros(1)} if RANK == 1 else {})
    sentence = told(lambda: load_tensors(find_checkpoint(FOLDER / "fsdp"), other))
    assert "On rank 1: " in sentence and "1 tensors differ, such as model.new." in sentence, sentence
    module.SEEN_TIMEOUT = 0.2
    elsewhere = run_dir if RANK != 3 else FOLDER / "elsewhere"
    sentence = told(lambda: Checkpointer(elsewhere, CheckpointConfig()))
    assert sentence.startswith("On rank 3: ") and "on a disk that all machines share" in sentence, sentence
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_0000001", "step_0000003"]


def check_damage(run_dir: Path) -> None:
    """A file of any rank that is damaged or gone is named to all, with the last whole checkpoint."""
    newest, tensors = find_checkpoint(run_dir), build("fsdp_tp")
    for file in sorted(newest.glob("*.safetensors")):
        whole = file.read_bytes()
        for content, words in ((whole[:-3] + b"abc", f"the content of {file.name} has changed"), (None, "is missing")):
            gather(None)
            if RANK == 0 and content is None:
                file.unlink()
            elif RANK == 0:
                file.write_bytes(content)
            gather(None)
            sentence = told(lambda: load_tensors(newest, tensors))
            assert words in sentence and file.name in sentence and "step_0000001, is whole" in sentence, sentence
        gather(None)
        if RANK == 0:
            file.write_bytes(whole)
    gather(None)
    check_load(run_dir, "fsdp_tp")


def check_init() -> None:
    """A run that begins with the weights, or the average, of another one: each rank gets its part of them."""
    if not join(2, "init"):
        return
    for parallel in ({"dp_shard": 2}, {"tp": 2}, {"pp": 2}):
        mesh = Mesh(resolve_layout(ParallelConfig(**{"dp_shard": 1, **parallel}), 2, SMALL), torch.device("cpu"))
        for init, ema in ((FOLDER / "begun", False), (f"{FOLDER / 'begun'}:ema", True)):
            run = build_run("tiny", [f"init={init}"])
            wanted = load_weights(find_checkpoint(FOLDER / "begun"), ema)[1]
            model = build_model(run, SMALL, mesh, open_init(run, SMALL))
            held = dict(model.named_parameters())
            assert held and held.keys() <= wanted.keys(), held.keys()
            for name, param in held.items():
                assert torch.equal(local(param), wanted[name][box_of(param)]), (parallel, init, name)
            numbers = sum(gather(sum(local(param).numel() for param in held.values())))
            whole = sum(value.numel() for value in wanted.values())
            assert whole <= numbers < 2 * whole, "it is split"


def check_kill() -> None:
    """Two runs of two ranks. Rank 1 of the first is killed when its files are written, rank 0 of the second later, when
    only state.json and the name are missing. The other rank learns it."""
    run, rank = divmod(RANK, 2)
    join(2, f"kill-{run}", rank)
    checkpointer = save(FOLDER / f"kill-{run}", "fsdp")
    if RANK in (1, 2):
        place = "sync_folder" if RANK == 1 else "write_atomic"
        setattr(module, place, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    checkpointer.save(2, build("fsdp"), {"step": 2, **STATE}, "")
    try:
        checkpointer.wait()
    except RuntimeError as error:
        assert is_lost(error), error
    else:
        raise AssertionError("the save ended without a rank")
    checkpointer.close()


def main() -> None:
    for check in (check_layouts, check_strange_boxes, check_mistakes, check_init, check_kill):
        check()


def leave(*error) -> None:
    """End at once: the others must not wait for this rank."""
    traceback.print_exception(*error, file=sys.__stderr__)  # torch collects sys.stderr in its own hook
    os._exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.excepthook = leave
    main()
