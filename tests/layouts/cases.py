"""The layouts that are run."""

from layouts.runs import MODEL, Case

from wanloom.parallel.settings import ComputeConfig

CASES = (
    Case("dp 2", 2, {"dp_replicate": 2}),
    Case("fsdp 2", 2),
    Case("fsdp 4", 4),
    Case("fsdp 8 with idle ranks", 8, samples=8),
    Case("hsdp 2x2", 4, {"dp_replicate": 2}),
    Case("tp 2", 2, {"tp": 2}),
    Case("ulysses 2", 2, {"cp": 2, "context": "ulysses"}),
    Case("ring 2", 2, {"cp": 2, "context": "ring"}),
    Case("ring 3", 3, {"cp": 3, "context": "ring"}),
    Case("ring 2 x ulysses 2", 4, {"cp": 4, "cp_ulysses": 2}),
    Case("pp 2", 2, {"pp": 2}),
    Case("pp 3", 3, {"pp": 3}),
    Case("fsdp 2 x cp 2", 4, {"cp": 2}),
    Case("fsdp 2 x tp 2", 4, {"tp": 2}),
    Case("fsdp 2 x cp 2 x tp 2", 8, {"cp": 2, "tp": 2}),
    Case("pp 2 x fsdp 2", 4, {"pp": 2}),
    Case("pp 2 x hsdp 2x1 x tp 2", 8, {"pp": 2, "dp_replicate": 2, "tp": 2}),
    Case("cheap, fsdp 2", 2, compute=ComputeConfig(recompute="cheap")),
    Case("attention, ring 2", 2, {"cp": 2, "context": "ring"}, compute=ComputeConfig(recompute="attention")),
    Case("attention, fsdp 2 x tp 2", 4, {"tp": 2}, compute=ComputeConfig(recompute="attention")),
    Case("full, pp 2 x fsdp 2", 4, {"pp": 2}, compute=ComputeConfig(recompute="full")),
    Case(
        "full offloaded, fsdp 2 x cp 2 x tp 2",
        8,
        {"cp": 2, "tp": 2},
        compute=ComputeConfig(recompute="full", offload_activations=True),
    ),
    Case("cheap offloaded, fsdp 2", 2, compute=ComputeConfig(recompute="cheap", offload_activations=True)),
    Case("bf16 attention, fsdp 2 x cp 2", 4, {"cp": 2}, compute=ComputeConfig(precision="bf16", recompute="attention")),
    Case("bf16 full, fsdp 2", 2, compute=ComputeConfig(precision="bf16", recompute="full")),
    Case("bf16 cheap, fsdp 2 x tp 2", 4, {"tp": 2}, compute=ComputeConfig(precision="bf16", recompute="cheap")),
    Case("compiled, fsdp 2", 2, compute=ComputeConfig(compile="block")),
    Case("ring 2 x tp 2", 4, {"cp": 2, "tp": 2, "context": "ring"}),
    Case("pp 2 x ulysses 2", 4, {"pp": 2, "cp": 2}),
    Case("pp 2 x ring 2 x tp 2 with known frames", 8, {"pp": 2, "cp": 2, "tp": 2, "context": "ring"}, known=True),
    Case("bf16 fsdp 2", 2, compute=ComputeConfig(precision="bf16")),
    Case("bf16 fsdp 2 x tp 2", 4, {"tp": 2}, compute=ComputeConfig(precision="bf16")),
    Case("bf16 pp 2 x fsdp 2", 4, {"pp": 2}, compute=ComputeConfig(precision="bf16")),
)
# the loss is right and a gradient wrong: what a comparison of losses would let through
FAULTS = (
    Case("tp without the sum over copies", 2, {"tp": 2}, fault="sum_copies"),
    Case("fsdp without the sum over copies", 2, fault="sum_copies"),
    Case("fsdp that divides by its ranks", 2, fault="divide"),
    Case("tp whose all-reduce has no adjoint", 2, {"tp": 2}, fault="all_reduce"),
)
SAVED = (
    Case("saved on fsdp 4", 4),
    Case("saved on pp 2 x tp 2", 4, {"pp": 2, "tp": 2}),
)
# each goes on from each of these
RESUMED = (
    Case("cp 2 x tp 2", 4, {"cp": 2, "tp": 2}),
    Case("pp 2 x fsdp 2", 4, {"pp": 2}),
    Case("one process", 1),
)
ANOTHER = Case("another model on fsdp 2", 2, model=MODEL.model_copy(update={"ffn_dim": 96}))
