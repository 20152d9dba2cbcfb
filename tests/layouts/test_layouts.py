"""Every layout against one process: every gradient, the weights after three steps, the average, the held-out loss.

The processes are started once and run all cases; each case is then a test of what its ranks wrote.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layouts.cases import ANOTHER, CASES, FAULTS, RESUMED, SAVED
from layouts.resume import LAST, SAVED_AT, run_whole
from layouts.runs import SAMPLES, STEPS, Case, Result, initial, run
from safetensors.torch import load_file

from wanloom.model.dit import keeps_fp32
from wanloom.parallel.mesh import resolve_layout
from wanloom.parallel.pipeline import stage_blocks
from wanloom.parallel.settings import ComputeConfig, ParallelConfig

TESTS = Path(__file__).parents[1]
BOUND = 1e-5  # relative, in fp32
# Adam's first steps turn the smallest gradients into full ones, so a change of the weights is known less well
CHANGE_BOUND = 5e-3
# other orders of bf16 sums: gradients, those of the fp32 parts, changes of weights; tp sums products in bf16
BF16_BOUNDS, BF16_TP_BOUNDS = (1.2e-2, 8e-3, 0.4), (6e-2, 6e-2, 0.6)


def asked(items: list[pytest.Item]) -> list[Case]:
    """The cases of the tests that were chosen: one alone needs few processes and no other case."""
    names = {
        value.name
        for item in items
        if "written" in getattr(item, "fixturenames", ())
        for value in item.callspec.params.values()  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(value, Case)  # other tests have a fixture of that name
    }
    return [case for case in (*CASES, *FAULTS, *SAVED, *RESUMED, ANOTHER) if case.name in names]


@pytest.fixture(scope="session")
def written(tmp_path_factory, request):
    """Folder with a folder for each case."""
    cases = asked(request.session.items)
    if any(case in SAVED for case in cases):
        cases += [*RESUMED, ANOTHER]
    out = tmp_path_factory.mktemp("layouts")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    worker = Path(__file__).with_name("worker.py")
    processes = []
    for rank in range(max(case.world for case in cases)):
        command = [
            sys.executable,
            "-Werror::FutureWarning",
            "-Werror::UserWarning",
            "-Wignore:The .grad attribute of a Tensor that is not a leaf",  # torch's own, while it compiles
            str(worker),
            str(rank),
            f"127.0.0.1:{store.port}",
            str(out),
            *{case.name for case in cases},
        ]
        with (out / f"error-{rank}.txt").open("wb") as errors:
            processes.append(subprocess.Popen(command, env=environment, stderr=errors))
    try:
        for process in processes:
            process.wait(timeout=600)
    finally:
        for process in processes:
            process.kill()
    return out


@pytest.fixture(scope="session")
def alone():
    """The run of one process, by (bf16, samples, known)."""
    found: dict[tuple[bool, int, bool], Result] = {}

    def get(case: Case) -> Result:
        key = case.compute.precision, case.samples, case.known
        if key not in found:
            compute = ComputeConfig(precision=case.compute.precision)
            found[key] = run(Case("one process", 1, compute=compute, samples=case.samples, known=case.known))
        return found[key]

    return get


def read(folder: Path, rank: int) -> Result:
    facts = folder / f"facts-{rank}.json"
    errors = next(path for path in (up / f"error-{rank}.txt" for up in folder.parents) if path.exists())
    assert facts.exists(), f"rank {rank} did not finish:\n" + errors.read_text()
    gradients, weights, averages = (
        load_file(folder / f"{kind}-{rank}.safetensors") for kind in ("gradients", "weights", "averages")
    )
    return Result(gradients, weights, averages, json.loads(facts.read_text()))


def box(result: Result, name: str) -> tuple[slice, ...]:
    return tuple(slice(*part) for part in result.facts["boxes"][name])


def distances(results: list[Result], reference: Result, kind: str, changes: bool = False) -> dict[str, float]:
    """Of every parameter, over every rank's part of it: the norm of the difference over the norm of the reference.

    With `changes` the reference is how far the weights have come from their first values.
    """
    found: dict[str, float] = {}
    for result in results:
        for name, part in getattr(result, kind).items():
            whole = getattr(reference, kind)[name].double()
            size = (whole - initial(name, whole.shape).double()).norm() if changes else whole.norm()
            difference = (part.double() - whole[box(result, name)]).norm() / size
            found[name] = max(found.get(name, 0.0), difference.item())
    return found


def covered(results: list[Result], kind: str) -> dict[str, int]:
    """Of every parameter, how many of its values some rank has."""
    found = {}
    for name in {name for result in results for name in result.facts["shapes"]}:
        holders = [result for result in results if name in result.facts["shapes"]]
        seen = torch.zeros(holders[0].facts["shapes"][name], dtype=torch.bool)
        for result in holders:
            if name in getattr(result, kind):
                seen[box(result, name)] = True
        found[name] = int(seen.sum())
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_equals_one_process(case, written, alone):
    reference = alone(case)
    results = [read(written / case.name, rank) for rank in range(case.world)]
    by_tp = BF16_TP_BOUNDS if "tp" in case.parallel else BF16_BOUNDS
    gradient, gradient_fp32, change = by_tp if case.compute.bf16 else (BOUND, BOUND, CHANGE_BOUND)
    sizes = {name: value.numel() for name, value in reference.weights.items()}
    for kind in ("gradients", "weights", "averages"):
        assert covered(results, kind) == sizes
        found = distances(results, reference, kind)
        off = {n: d for n, d in found.items() if not d <= (gradient_fp32 if keeps_fp32(n) else gradient)}
        assert not off, f"{kind}: {off}"
    off = {n: d for n, d in distances(results, reference, "weights", changes=True).items() if not d <= change}
    assert not off, f"changes of weights: {off}"
    for result in results:
        assert not result.facts["missing"]
        assert set(result.facts["dtypes"].values()) == {"torch.float32"}
        assert result.facts["val_loss"] == pytest.approx(reference.facts["val_loss"], rel=gradient)
        for got, wanted in zip(result.facts["steps"], reference.facts["steps"], strict=True):
            assert got == pytest.approx(wanted, rel=gradient)


@pytest.mark.parametrize("case", [case for case in CASES if case.compute.bf16], ids=lambda case: case.name)
def test_bf16_is_on_the_wire_for_the_linears_of_the_blocks_alone_and_sums_are_fp32(case, written):
    for rank in range(case.world):
        facts = read(written / case.name, rank).facts
        outside = facts["policies"].pop("")
        assert outside == ["None", "torch.float32"]
        assert facts["policies"] and all(
            name.startswith("blocks.") and policy == ["torch.bfloat16", "torch.float32"]
            for name, policy in facts["policies"].items()
        )
        kept = [name for name in facts["shapes"] if name.startswith("blocks.") and keeps_fp32(name)]
        split = {name: [stop - start for start, stop in facts["boxes"][name]] != facts["shapes"][name] for name in kept}
        assert {name for name, is_split in split.items() if is_split} <= {n for n in kept if ".norm_" in n}
        assert "tp" in case.parallel or not any(split.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_samples_of_a_step_are_the_same_on_any_layout(case, written, alone):
    reference = alone(case)
    results = [read(written / case.name, rank) for rank in range(case.world)]
    by_data_rank = {result.facts["data_rank"]: result.facts["keys"] for result in results}
    assert all(result.facts["keys"] == by_data_rank[result.facts["data_rank"]] for result in results)
    assert len({tuple(result.facts["packs"]) for result in results}) == 1
    for number in range(STEPS):
        got = sorted(key for keys in by_data_rank.values() for key in keys[number])
        assert got == sorted(reference.facts["keys"][number])


PLAIN = [case for case in CASES if case.is_plain]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_what_is_exchanged_grows_with_the_packs_only_where_it_must(case, written):
    """Weights are gathered twice a pack, gradients scattered once; copies are summed once a step, however many packs.

    Counted by operator, a stage at a time: a sum for every pack in place of every step would cost time and no number.
    """
    layout = resolve_layout(ParallelConfig(**case.parallel), case.world, case.model, case.samples)
    others = (layout.dp_replicate > 1) + (layout.fsdp > 1)
    # of the axes of a parameter each that FSDP does not manage: whole fp32 parts, those that tp splits, what tp copies
    copies = others if layout.tp == 1 else 2 * others + 2 if others else 1
    ranks = [read(written / case.name, rank).facts for rank in range(case.world)]
    for rank, facts in enumerate(ranks):
        stage = layout.coordinates(rank)["pp"]
        groups = len(stage_blocks(case.model.num_layers, layout.pp, stage)) + 1  # and what is outside of the blocks
        for packs, found in zip(facts["packs"], facts["exchanges"], strict=True):
            sharded = groups * packs * (layout.fsdp > 1)
            assert found.get("allgather_base", 0) == 2 * sharded
            assert found.get("reduce_scatter_base", 0) == sharded
            # of the gradients that FSDP manages, of the other copies, of the norm and of the losses
            assert found["allreduce"] == groups * (layout.dp_replicate > 1) + copies + 2
            neighbours = (stage > 0) + (stage < layout.pp - 1)
            assert found.get("send", 0) == found.get("recv", 0) == 4 * packs * neighbours
    assert any(packs > 1 for packs in ranks[-1]["packs"]) or case.samples < SAMPLES or layout.data_ranks > 2


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name)
def test_a_wrong_gradient_is_seen_though_the_loss_is_right(case, written, alone):
    reference = alone(case)
    results = [read(written / case.name, rank) for rank in range(case.world)]
    first, wanted = results[0].facts["steps"][0], reference.facts["steps"][0]
    assert first[:2] == pytest.approx(wanted[:2], rel=BOUND)
    assert max(distances(results, reference, "gradients").values()) > 0.1


@pytest.fixture(scope="session")
def whole():
    return run_whole()


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
@pytest.mark.parametrize("saved", SAVED, ids=lambda case: case.name)
def test_a_run_goes_on_in_another_layout(saved, case, written, whole):
    results = [read(written / saved.name / case.name, rank) for rank in range(case.world)]
    for kind in ("weights", "averages"):
        assert covered(results, kind) == {name: value.numel() for name, value in whole.weights.items()}
        off = {name: d for name, d in distances(results, whole, kind).items() if not d <= BOUND}
        assert not off, f"{kind}: {off}"
    for result in results:
        for got, wanted in zip(result.facts["steps"], whole.facts["steps"][SAVED_AT:LAST], strict=True):
            assert got == pytest.approx(wanted, rel=BOUND)


@pytest.mark.parametrize("saved", SAVED, ids=lambda case: case.name)
def test_a_checkpoint_of_another_model_is_one_sentence_on_all_ranks(saved, written):
    found = {read(written / saved.name / ANOTHER.name, rank).facts["sentence"] for rank in range(ANOTHER.world)}
    (checkpoint,) = (written / saved.name / "checkpoints").iterdir()
    (sentence,) = found
    assert sentence.startswith(f"{checkpoint} does not fit this model: 36 tensors differ, such as ema.blocks.0.ffn.0.b")
