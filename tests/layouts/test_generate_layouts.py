"""Several processes make the latents that one makes, whatever they share: branches, tokens, layers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generate_ranks import CASES, SIZES, make, requests
from safetensors.torch import load_file

from wanloom.parallel.mesh import ONE_PROCESS, Layout, Mesh
from wanloom.sample.generate import generate
from wanloom.sample.settings import GenerateConfig

ROOT = Path(__file__).parents[2]
RANKS = 4
# of the largest latent; measured: 2.3e-6 and 1.0e-2. In fp32 sums go in another order, and guidance 5 makes their
# rounding up to 9 times larger in each of 4 steps; bf16 keeps 3 digits, and its rounding goes the same way
BOUNDS = {"fp32": 1e-5, "bf16": 3e-2}


@pytest.fixture(scope="module")
def found(tiny_pipeline, tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What every rank got."""
    folder = tmp_path_factory.mktemp("generate")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    words = [*command, str(Path(__file__).parent / "generate_ranks.py"), str(tiny_pipeline), str(folder)]
    result = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return [load_file(folder / f"rank{i}.safetensors") for i in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_latents_are_those_of_one_process(name, found, tiny_pipeline):
    case = CASES[name]
    expected = next(make(tiny_pipeline, case))
    assert len(expected) == len(SIZES)
    for number, want in expected.items():
        got = [rank[f"{name}.{number}"] for rank in found if f"{name}.{number}" in rank]
        assert len(got) == case.layout.world and all(torch.equal(got[0], other) for other in got)
        assert (want - requests()[int(number)].noise).norm() > 0.3 * want.norm(), "it went somewhere"
        difference = ((got[0] - want).abs().max() / want.abs().max()).item()
        assert difference < BOUNDS[case.precision]


def test_there_is_no_third_branch():
    mesh = Mesh(ONE_PROCESS, torch.device("cpu"))
    for layout, guidance in ((Layout(dp_shard=2), 1.0), (Layout(dp_shard=3), 5.0)):
        mesh.layout = layout
        with pytest.raises(ValueError, match="has no branches for"):
            next(generate(torch.nn.Identity(), requests(), GenerateConfig(guidance=guidance), mesh=mesh))
