"""How many pixels and frames a latent stands for, and every size that follows from it.

In: a size in pixels and frames. Out: that of its latents or tokens, and back, or a UserError with the nearest legal
one. The one decision: these numbers are a property of the VAE, so a `Geometry` comes from its config.json or from the
table of models and is handed on; nothing else in the package knows them.
"""

import math
from dataclasses import dataclass

from wanloom.errors import UserError

PATCH = (1, 2, 2)  # latents of a token (frames, rows, columns), in every Wan


@dataclass(frozen=True)
class Geometry:
    """How a VAE divides a video; the first frame is a latent frame of its own."""

    pixels: int  # rows and columns of a latent
    frames: int  # of a latent frame after the first
    channels: int  # of the latents
    fps: int  # frames per second of what the model has seen

    def __str__(self) -> str:
        return f"{self.frames}x{self.pixels}x{self.pixels} with {self.channels} channels"

    @property
    def grid(self) -> int:
        """Pixels of a token, rows and columns: height and width are multiples of it."""
        return self.pixels * PATCH[1]

    def check_side(self, name: str, value: int) -> None:
        """Raises UserError with the nearest legal values for a height or width that is no multiple of a token's."""
        if value < self.grid or value % self.grid:
            raise UserError(
                f"The {name} is {value}, it must be a multiple of {self.grid}: {_around(value, self.grid, 0)}."
            )

    def check_frames(self, frames: int) -> None:
        """Raises UserError with the nearest legal values for a number of frames that fills no latent frames."""
        if frames < 1 or (frames - 1) % self.frames:
            legal = _around(frames, self.frames, 1)
            raise UserError(f"The number of frames is {frames}, it must be {self.frames}n+1: {legal}.")

    def most_frames(self, frames: int) -> int:
        """The largest legal number of frames that is at most `frames`."""
        return (frames - 1) // self.frames * self.frames + 1

    def latents_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of the latents of a video in pixels. Raises UserError with the nearest legal values."""
        self.check_side("height", height)
        self.check_side("width", width)
        self.check_frames(frames)
        return self.channels, (frames - 1) // self.frames + 1, height // self.pixels, width // self.pixels

    def video_shape(self, latent_frames: int, rows: int, columns: int) -> tuple[int, int, int]:
        """Frames, height and width in pixels of latents of this size."""
        return self.frames * (latent_frames - 1) + 1, self.pixels * rows, self.pixels * columns

    def count_tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of a video in pixels. Raises UserError as `latents_shape` does."""
        return math.prod(self.latents_shape(frames, height, width)[1:]) // math.prod(PATCH)


def _around(value: int, step: int, rest: int) -> str:
    """The legal values `step * n + rest` next to `value`, in words."""
    below = (value - rest) // step * step + rest
    smallest = rest or step
    return f"try {smallest}" if below < smallest else f"try {below} or {below + step}"


WAN_21 = Geometry(pixels=8, frames=4, channels=16, fps=16)
WAN_22 = Geometry(pixels=16, frames=4, channels=48, fps=24)  # of TI2V-5B; A14B has the VAE of Wan 2.1
