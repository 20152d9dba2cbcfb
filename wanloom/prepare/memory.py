"""What a batch of clips takes of memory at least, and which settings of prepare make it less.

In: the settings, and the shape of a batch `(B, F, H, W)`. Out: a UserError before anything is loaded, or what helps.
The one decision: only what is certain is refused beforehand: the pixels of a batch as they were decoded and as the VAE
takes them. What the VAE makes of them inside is many times that; it is left to the allocator, and told by its error.
"""

from typing import TYPE_CHECKING

from wanloom.memory import check_memory

if TYPE_CHECKING:
    from wanloom.prepare.settings import PrepareConfig

BYTES = 3 + 3 * 4  # of a pixel: uint8 and fp32
Shape = tuple[int, int, int, int]


def check_batch(config: "PrepareConfig", device: str) -> None:
    """Raises UserError when a batch of the one size that all clips get cannot fit."""
    from wanloom.prepare.encode import default_batch

    height, width = config.framing.height, config.framing.width
    if height is None or width is None or config.framing.keep_aspect:
        return  # no file is known yet
    frames = config.timing.frames if config.timing.mode == "video" else 1
    shape = config.batch_size or default_batch(frames * height * width), frames, height, width
    needed = BYTES * shape[0] * frames * height * width
    check_memory(needed, device, describe_batch(shape), find_helps(config, shape))


def describe_batch(shape: Shape) -> str:
    """What is done, to go after "not enough to"."""
    count, frames, height, width = shape
    return f"encode {count} x {frames} frames of {width}x{height} pixels"


def find_helps(config: "PrepareConfig", shape: Shape) -> list[str]:
    """The settings that make it less, the best first."""
    count, frames, height, width = shape
    helps = [f"`batch_size={count // 2}` in place of {count}"] if count > 1 else []
    if config.framing.height is None:
        helps.append(f"a smaller `max_area` than {height * width}")
    else:
        helps.append(f"a smaller `height` and `width` than {height} and {width}")
    if frames > 1:
        helps.append(f"fewer `frames` than {frames}")
    helps = [f"{words}, in a new folder" for words in helps]
    if config.workers > 1:
        helps.append(f"`workers={config.workers // 2}` in place of {config.workers}")
    return helps[:3]
