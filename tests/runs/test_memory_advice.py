"""What helps is sized from what was asked, and the best comes first."""

import pytest
import torch

from wanloom import memory
from wanloom.errors import UserError
from wanloom.model.dit import DiTConfig
from wanloom.parallel.mesh import ParallelConfig, resolve_layout
from wanloom.runs.memory import check_run, find_helps, rank_states
from wanloom.runs.recipe import build_run

SMALL = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)  # the 1.3B
CLIP = 32_760  # tokens of 81 frames of 480 x 832


def helps(*settings: str, device: str = "cuda", config: DiTConfig = SMALL, largest: int = CLIP) -> list[str]:
    run = build_run("wan2.1-t2v-1.3b", ["run_dir=x", "data.path=x", *settings])
    layout = resolve_layout(ParallelConfig(), 1, config, run.batch.samples)
    return find_helps(run, config, layout, largest, device, rank_states(run, config, layout))


def test_the_best_is_what_saves_most():
    long = helps("compute.recompute=none", "batch.tokens_per_pack=131040", "compute.precision=bf16")
    best = ["compute.offload_activations", "compute.recompute", "batch.tokens_per_pack"]
    assert [words.split(" (")[0].split("=")[0] for words in long] == best
    assert "batch.tokens_per_pack=32760 in place of 131040 (about " in long[2]
    short = helps(
        "compute.recompute=full",
        "batch.tokens_per_pack=32760",
        "ema.decay=0.999",
        "compute.offload_activations=true",
        "compute.precision=bf16",
    )
    assert short[0].startswith("twice as many GPUs (`nproc=2`) (about ") and short[1].startswith(
        "ema.decay=null (about 5.3"
    )
    alone = helps(
        "compute.recompute=full",
        "batch.tokens_per_pack=32760",
        "ema.decay=null",
        "compute.precision=bf16",
        device="cpu",
    )
    assert len(alone) == 1 and alone[0].startswith("smaller or shorter clips, as the largest sample has 32,760 tokens")


def test_what_cannot_fit_is_refused_by_a_lower_bound(monkeypatch):
    run = build_run("wan2.1-t2v-1.3b", ["run_dir=x", "data.path=x", "ema.decay=null", "compute.recompute=full"])
    layout = resolve_layout(ParallelConfig(), 1, SMALL, run.batch.samples)
    states = rank_states(run, SMALL, layout)
    asked = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(device) or 1 << 62)
    check_run(run, SMALL, layout, CLIP, torch.device("cuda"), 1)
    assert asked == ["cuda", "cpu"], "the copies of a checkpoint are on the host"
    monkeypatch.setattr(memory, "free_bytes", lambda device: states.parameters * 4 if device == "cuda" else 1 << 62)
    with pytest.raises(UserError, match=r"The memory of the GPU \(cuda\) is not enough to train .* What helps"):
        check_run(run, SMALL, layout, CLIP, torch.device("cuda"), 1)
    monkeypatch.setattr(memory, "free_bytes", lambda device: states.parameters * 6)
    with pytest.raises(UserError, match="The memory of this machine is not enough"):
        check_run(run, SMALL, layout, CLIP, torch.device("cuda"), 8)


def test_a_refusal_gives_no_advice_that_leaves_it_as_it_is(monkeypatch):
    """It counts the largest sample alone, so a smaller pack would be refused with the same words."""
    run = build_run("tiny", ["run_dir=x", "data.path=x", "batch.tokens_per_pack=90000000"])
    layout = resolve_layout(ParallelConfig(), 1, SMALL, run.batch.samples)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 62)
    later = check_run(run, SMALL, layout, CLIP, torch.device("cpu"), 1)
    assert later[0].startswith("batch.tokens_per_pack=32760 in place of 90000000")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 30)
    with pytest.raises(UserError, match="is not enough to train") as caught:
        check_run(run, SMALL, layout, CLIP, torch.device("cpu"), 1)
    assert "What helps, the best first: compute.recompute=full" in str(caught.value)
    assert "tokens_per_pack" not in str(caught.value) and "90,000,000" not in str(caught.value)
