"""One pack against the peers' reality, a loop over samples of batch size 1: forward and backward, C8.

Trainers on diffusers' transformer that mix sizes run one sample at a time, its caption padded to 512 states. Wanloom
runs the same samples as one pack, eager too. Same random weights at the width of the 1.3B model, fp32; velocity and
every gradient of the sum of the losses are compared first. One block is measured and what is outside of it alone; the
rows are for 30 blocks. On a CPU a small product is nearly as fast as a large one: what is gained here are text slots
and weight gradients that are added up once, on a GPU also the launches.
"""

import torch

from benchmarks.measure import Row, main, take_turns
from benchmarks.pair import at_depth, build_pair, check_equal, draw_samples, run_ours, run_theirs, without_blocks

BLOCKS, DEPTH = 1, 30
MIXES = {  # latent frames, rows, columns; caption
    "4 images of 390 tokens": ([(1, 30, 52)] * 4, [80, 30, 200, 12], 1.2),
    "videos of 780 and 1170 tokens": ([(2, 30, 52), (3, 30, 52)], [80, 150], 1.0),
}
TOY = ([(1, 4, 6), (2, 4, 4)], [80, 150])


def row_of(name: str, toy: bool) -> Row:
    shapes, captions, target = MIXES[name]
    if toy:
        shapes, captions = TOY
    ours, theirs = build_pair("toy" if toy else "1.3B", BLOCKS)
    samples = draw_samples(ours.config, shapes, captions, torch.float32)
    checked = check_equal(ours, theirs, samples)
    ours_rest, theirs_rest = without_blocks(ours, theirs)
    taken = take_turns(
        {
            "diffusers": run_theirs(theirs, samples),
            "wanloom": run_ours(ours, samples),
            "diffusers, outside": run_theirs(theirs_rest, samples),
            "wanloom, outside": run_ours(ours_rest, samples),
        }
    )
    return Row(
        "C8",
        f"{name}, forward and backward, 1.3B, fp32, eager",
        "s",
        at_depth(taken["wanloom"], taken["wanloom, outside"], BLOCKS, DEPTH),
        "diffusers, one sample at a time",
        at_depth(taken["diffusers"], taken["diffusers, outside"], BLOCKS, DEPTH),
        target,
        limit="1.05x to 1.4x on a CPU",
        checked=checked,
        facts={"blocks": BLOCKS, "depth": DEPTH, **taken},
    )


def measure(toy: bool) -> list[Row]:
    """A pack of unlike samples against a loop over them, forward and backward."""
    return [row_of(name, toy) for name in MIXES]


if __name__ == "__main__":
    main(__spec__, measure)
