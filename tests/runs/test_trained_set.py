"""One parameter is trained and the others are frozen: what that costs, and that it goes on as it was."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saved_weights import stored
from torch import Tensor

import wanloom
from wanloom.checkpoint.saved import find_checkpoint
from wanloom.data.loader import open_sources
from wanloom.dist import process_group
from wanloom.errors import UserError
from wanloom.formats.pipeline import find_pipeline
from wanloom.formats.transformer import load_dit
from wanloom.geometry import WAN_21
from wanloom.model.dit import WanDiT
from wanloom.model.init import init_weights
from wanloom.objective.settings import FlowConfig
from wanloom.parallel.mesh import ONE_PROCESS, Mesh
from wanloom.runs.build import build_loader, build_parts, build_plan
from wanloom.runs.convert import convert
from wanloom.runs.recipe import Run, build_run
from wanloom.runs.train import train
from wanloom.train.step import train_step
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.slow

NAME, OTHER = "blocks.1.ffn.0.weight", "blocks.0.cross_attn.v.bias"
CONFIG = VARIANTS["tiny"].shape
SETTINGS = {"batch.samples": 4, "batch.tokens_per_pack": 40, "ema.decay": 0.9, "compute.precision": "fp32"}
SETTINGS |= {"model": "tiny", "init": "pretrained", "optimizer.lr": 1e-3, "caption_dropout": 0.0}
SMALL = {"height": 64, "width": 64, "frames": 1, "steps": 2, "device": "cpu"}
ALONE = Mesh(ONE_PROCESS, torch.device("cpu"))


def run_of(run_dir: Path, steps: int, init: str = "pretrained") -> Run:
    words = {**SETTINGS, "run_dir": run_dir, "train.steps": steps, "init": init}
    return build_run("tiny", words, mock="1x64x64,9x32x32,5x48x32")


def first_step(names: list[str] | None):
    """A run's parts after the gradients of its first step, and that step."""
    run = run_of(Path("nowhere"), 1)
    sources = open_sources(run.data, WAN_21, CONFIG.out_channels, CONFIG.text_dim, CONFIG.text_slots)
    plan = build_plan(run, CONFIG, sources, 1)
    parts = build_parts(run, CONFIG, ALONE, plan, None, names=names)
    with build_loader(run, CONFIG, sources, plan, 0, None, 0) as batches:
        return parts, train_step(parts.model, parts.trained, ALONE, next(iter(batches)), FlowConfig(), None)


def test_frozen_parameters_cost_nothing_and_do_not_move():
    """Against the run that trains all: the same loss, and of its gradients the one that is asked for."""
    whole, wanted = first_step(None)
    parts, found = first_step([NAME])
    gradient = whole.trained[NAME].grad
    assert len(whole.trained) == len(dict(whole.model.named_parameters())) > 1 and gradient is not None
    assert found.loss == wanted.loss and found.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-6)
    assert 0 < found.grad_norm < 0.9 * wanted.grad_norm
    named = dict(parts.model.named_parameters())
    assert [name for name, param in named.items() if param.grad is not None] == [NAME]
    assert torch.equal(named[NAME].grad, gradient)
    assert list(parts.optimizer.state()) == [f"exp_avg.{NAME}", f"exp_avg_sq.{NAME}"]
    assert parts.ema is not None and list(parts.ema.tensors()) == [NAME]
    before = {name: param.detach().clone() for name, param in named.items()}
    parts.optimizer.step(1e-3)
    assert [name for name, param in named.items() if not torch.equal(param, before[name])] == [NAME]


def test_a_run_of_one_parameter_is_exact_on_resume_and_keeps_it_alone(tmp_path, capsys):
    """The rest comes again from `init`: two steps and two more are the bits of four."""
    train(run_of(tmp_path / "a", 4), [NAME])
    assert "Trains 0.07 M of 1.78 M parameters." in capsys.readouterr().out
    train(run_of(tmp_path / "b", 2), [NAME])
    ended = train(run_of(tmp_path / "b", 4), [NAME])
    assert (ended.step, ended.taken) == (4, 2)
    straight, resumed = (stored(find_checkpoint(tmp_path / name)) for name in ("a", "b"))
    kinds = ("model", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert straight.keys() == resumed.keys() == {f"{kind}.{NAME}" for kind in kinds}
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def train_over(base: dict[str, Tensor], folder: Path, init: str, name: str) -> dict[str, Tensor]:
    """Train one parameter, and read the run with and without its average; returns the weights with the average."""
    train(run_of(folder, 2, init), [name])
    own = stored(find_checkpoint(folder))
    raw, average = (base | {name: own[f"{kind}.{name}"]} for kind in ("model", "ema"))
    for wanted, ema in ((raw, False), (average, True)):
        found = wanloom.load_run(folder, ema=ema, device="cpu").model.state_dict()
        assert found.keys() == wanted.keys() and not torch.equal(wanted[name], base[name])
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    return average


def test_what_a_run_trained_is_laid_over_what_it_began_with(tmp_path):
    """By `load_run`, `convert` and `generate`, raw and averaged, also where a run began with such a run."""
    new = WanDiT(CONFIG)
    init_weights(new, run_of(tmp_path, 1).seed)
    train_over(dict(new.state_dict()), tmp_path / "new", "random", NAME)
    published = dict(load_dit(find_pipeline("tiny")).state_dict())
    first = train_over(published, tmp_path / "first", "pretrained", NAME)
    folder = tmp_path / "second"
    wanted = train_over(first, folder, f"{tmp_path / 'first'}:ema", OTHER)
    convert(folder, tmp_path / "whole", ema=True)
    found = load_dit(tmp_path / "whole").state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    ways = {"checkpoint": folder, "ema": True}, {"model": str(tmp_path / "whole")}
    (frames, _), (again, _) = (next(wanloom.generate("A red circle", **SMALL, **way)) for way in ways)
    assert torch.equal(frames, again)


def test_what_a_run_began_with_and_is_gone_or_another_is_said(tmp_path):
    train(run_of(tmp_path / "first", 1), [NAME])
    second = run_of(tmp_path / "second", 1, str(tmp_path / "first"))
    train(second, [OTHER])
    longer = second.model_copy(update={"train": second.train.model_copy(update={"steps": 2})})
    with pytest.raises(UserError, match="is of a run that trains other parameters"):
        train(longer, [NAME])
    train(run_of(tmp_path / "first", 2), [NAME])
    where = rf"step_0000001 holds only the parameters that were trained.*init={tmp_path}/first of the model tiny\. "
    with pytest.raises(UserError, match=f"{where}They are other ones now"):
        wanloom.load_run(tmp_path / "second")
    with pytest.raises(UserError, match="began with are other ones now"):
        train(longer, [OTHER])
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(UserError, match=f"{where}There is no folder"):
        wanloom.load_run(tmp_path / "second")


def test_a_name_that_is_none_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no parameter 'blocks\.1\.ffn\.0\.wight'\. Did you mean 'blocks\.1\.ffn"):
        train(run_of(tmp_path, 1), ["blocks.1.ffn.0.wight"])


@pytest.mark.parametrize(("layout", "trained"), [("dp_shard", NAME), ("pp", NAME), ("pp", "blocks.4.ffn.0.weight")])
def test_two_ranks_train_the_same_parameter(tmp_path, layout, trained):
    """FSDP, and stages of which the last, or the first, trains nothing; saved in the middle, against one process."""
    train(run_of(tmp_path / "one", 4), [trained])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        place["PYTHONPATH"] = str(Path(__file__).parents[1])
        words = [sys.executable, __file__, str(tmp_path / "two"), layout, trained]
        ranks.append(subprocess.Popen(words, env=os.environ | place))
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    one, two = (stored(find_checkpoint(tmp_path / name)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-6)
    assert find_checkpoint(tmp_path / "two").name == "step_0000004"


def be_rank(run_dir: Path, layout: str, trained: str) -> None:
    """Two steps, and from the checkpoint the two after them."""
    with process_group():
        for steps in (2, 4):
            run = run_of(run_dir, steps)
            axes = run.parallel.model_copy(update={"pp": 2 if layout == "pp" else 1})
            train(run.model_copy(update={"parallel": axes}), [trained])


if __name__ == "__main__":
    be_rank(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
