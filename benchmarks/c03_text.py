"""What unused text slots cost on images: training (C3) and one step of the sampler (C4), against diffusers.

The image has 390 tokens (240x416). Diffusers pads every caption to 512 states; wanloom folds the unused slots into one
key, which is exact. Same random weights, fp32; outputs (and in C3 every gradient) are compared first.

C3 is forward and backward at the width of the 1.3B model, caption of 80 states. C4 is one step as WanPipeline takes it:
two calls of the transformer, with the caption (80 states) and the negative prompt (126, as long as Wan's own), guidance
5, no gradients; wanloom has both branches in one pack, and the keys and values of the text from before the first step,
as `generate` does: they are made once for all steps, outside of the timed region. What that takes is in the facts
("wanloom, text once"). The update of the scheduler is left out: both use the same one.
A few blocks are measured and what is outside of them alone; the rows are for the published depth.
"""

import torch

from benchmarks.c01_dit import compare
from benchmarks.measure import Row, main, take_turns
from benchmarks.pair import (
    Samples,
    at_depth,
    build_pair,
    draw_samples,
    relative,
    run_theirs,
    without_blocks,
)

IMAGE, CAPTION, NEGATIVE = (1, 30, 52), 80, 126
DEPTHS = {"1.3B": 30, "14B": 40}
GUIDANCE = 5.0


def train_rows(toy: bool) -> list[Row]:
    blocks, depth = (1 if toy else 2), DEPTHS["1.3B"]
    ours, theirs = build_pair("toy" if toy else "1.3B", blocks)
    samples = draw_samples(ours.config, [(1, 4, 6) if toy else IMAGE], [CAPTION], torch.float32)
    checked, taken = compare(ours, theirs, samples, {})
    peer = at_depth(taken["diffusers"], taken["diffusers, outside"], blocks, depth)
    what = f"image, forward and backward, 1.3B, caption of {CAPTION} states, fp32"
    facts = {"blocks": blocks, "depth": depth, **taken}
    rows = []
    for name, target in (("compiled", 1.25), ("eager", None)):
        values = at_depth(taken[name], taken["wanloom, outside"], blocks, depth)
        rows.append(
            Row(
                "C3",
                f"{what}, {name}",
                "s",
                values,
                "diffusers, eager",
                peer,
                target,
                limit="1.15x of FLOPs, times 1.04x to 1.06x of elementwise work",
                checked=checked,
                facts=facts,
            )
        )
    return rows


def both_branches(samples: Samples) -> Samples:
    """The negative prompt sees the latents and the level of the prompt."""
    first = len(samples.pack.tokens) // 2
    samples.pack.tokens[first:] = samples.pack.tokens[:first]
    samples.latents[1].copy_(samples.latents[0])
    samples.sigma[1] = samples.sigma[0]
    return samples


@torch.no_grad()
def step_row(width: str, blocks: int, target: float, toy: bool) -> Row:
    depth = DEPTHS[width]
    ours, theirs = build_pair("toy" if toy else width, blocks)
    shape, lens = ((1, 4, 6), (5, 9)) if toy else (IMAGE, (CAPTION, NEGATIVE))
    samples = both_branches(draw_samples(ours.config, [shape] * 2, lens, torch.float32))
    ours_rest, theirs_rest = without_blocks(ours, theirs)
    text_kv = ours.text_kv(samples.pack)

    def step(run):
        def call():
            with torch.no_grad():
                prompt, negative = run().chunk(2)
                return negative + GUIDANCE * (prompt - negative)

        return call

    def sample(model):
        return step(lambda: model(samples.pack, samples.sigma, text_kv=text_kv))

    functions = {
        "diffusers": step(run_theirs(theirs, samples, backward=False)),
        "wanloom": sample(ours),
        "diffusers, outside": step(run_theirs(theirs_rest, samples, backward=False)),
        "wanloom, outside": sample(ours_rest),
        "wanloom, text once": torch.no_grad()(lambda: ours.text_kv(samples.pack)),
    }
    difference = relative(functions["wanloom"](), functions["diffusers"]())
    assert difference <= 1e-4, difference  # guidance makes what differs up to 9 times larger
    taken = take_turns(functions)
    return Row(
        "C4",
        f"image, one step of the sampler, {width}, fp32, eager",
        "s",
        at_depth(taken["wanloom"], taken["wanloom, outside"], blocks, depth),
        "diffusers, eager",
        at_depth(taken["diffusers"], taken["diffusers, outside"], blocks, depth),
        target,
        limit=f"{'1.18' if width == '1.3B' else '1.25'}x of FLOPs",
        checked=f"guided velocity within {difference:.0e} of diffusers', relative norm",
        facts={"blocks": blocks, "depth": depth, **taken},
    )


def measure(toy: bool) -> list[Row]:
    """Images with short captions, in training and in one step of the sampler, against diffusers."""
    return [*train_rows(toy), step_row("1.3B", 2, 1.18, toy), step_row("14B", 1, 1.22, toy)]


if __name__ == "__main__":
    main(__spec__, measure)
