"""What a run takes of memory at least, and which of its settings make it less.

In: a run, its layout, and the tokens of its largest sample. Out: a UserError before anything is loaded, or what helps,
with numbers. The one decision: what is refused is refused by a lower bound: weights, gradients, moments and average,
which are exact, and half of the estimate of what the largest sample keeps until its backward pass.
"""

from collections.abc import Collection

import torch

from wanloom.errors import UserError, nearest
from wanloom.memory import check_memory, in_gib
from wanloom.model.dit import on_meta
from wanloom.model.settings import DiTConfig
from wanloom.parallel.memory import States, activation_bytes, held_params, state_bytes
from wanloom.parallel.mesh import Layout
from wanloom.runs.recipe import Run

MOST_HELPS = 3


def rank_states(run: Run, config: DiTConfig, layout: Layout, names: Collection[str] | None = None) -> States:
    """What a rank of the first stage holds from step to step when `names`, by default all, are trained.

    Raises UserError for a name that the model does not have.
    """
    model = on_meta(config)
    known = [name for name, _ in model.named_parameters()]
    if unknown := sorted(set(names or ()) - set(known)):
        raise UserError(f"The model has no parameter '{unknown[0]}'.{nearest(unknown[0], known)}")
    return state_bytes(held_params(model, layout, 0), layout, bool(run.ema.decay), run.compute.bf16, names)


def check_run(
    run: Run,
    config: DiTConfig,
    layout: Layout,
    largest: int,
    device: torch.device,
    local_ranks: int,
    names: Collection[str] | None = None,
) -> list[str]:
    """What helps where memory runs out later. Raises UserError when the run cannot fit this machine."""
    states = rank_states(run, config, layout, names)
    helps = find_helps(run, config, layout, largest, device.type, states)
    doing = f"train {run.model} on a sample of {largest:,} tokens"
    copies = states.gradients + states.moments + states.average  # for the checkpoint, on the host: of what is trained
    own = copies + states.parameters
    if not run.compute.offload_activations:
        own += activation_bytes(config, layout, largest, run.compute.recompute, run.compute.bf16) // 2
    small = run.model_copy(update={"batch": run.batch.model_copy(update={"tokens_per_pack": largest})})
    least = find_helps(small, config, layout, largest, device.type, states)  # a refusal counts no larger pack
    if device.type == "cuda":
        check_memory(own, str(device), doing, least)
    check_memory(local_ranks * (copies + (0 if device.type == "cuda" else own)), "cpu", doing, least)
    return helps


def find_helps(run: Run, config: DiTConfig, layout: Layout, largest: int, device: str, states: States) -> list[str]:
    """The settings that save most here, the best first, with what they save of a rank's memory."""
    pack, bf16 = max(run.batch.tokens_per_pack, largest), run.compute.bf16

    def kept(tokens: int = pack, recompute: str = run.compute.recompute, half: bool = bf16) -> int:
        return activation_bytes(config, layout, tokens, recompute, half)  # pyright: ignore[reportArgumentType]

    on_gpu = device == "cuda"
    found = [
        (kept() - kept(largest), f"batch.tokens_per_pack={largest} in place of {pack}"),
        (kept() - kept(recompute="full"), "compute.recompute=full"),
        (kept() if on_gpu and not run.compute.offload_activations else 0, "compute.offload_activations=true"),
        (kept() - kept(half=True), "compute.precision=bf16"),
        (states.average, "ema.decay=null"),
        (states.total // 2 if on_gpu else 0, f"twice as many GPUs (`nproc={2 * layout.world}`)"),
        (kept(largest) - kept(largest // 2), f"smaller or shorter clips, as the largest sample has {largest:,} tokens"),
    ]
    best = sorted((entry for entry in found if entry[0] > 0), reverse=True)[:MOST_HELPS]
    return [f"{words} (about {in_gib(saved)} less)" for saved, words in best]
