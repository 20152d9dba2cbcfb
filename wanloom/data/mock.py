"""Made-up samples of any mix of shapes, for measuring a model or a layout without a dataset.

In: shapes in pixels, such as `81x480x832,1x480x832*4` (frames x height x width, and how many of each). Out: the
interface of `shards.Dataset`. The one decision: a sample is random numbers keyed by its row, so a mock run is as
repeatable as a real one.
"""

import re
from itertools import cycle, islice

from wanloom.data.index import Index, Row, build_table, read_table
from wanloom.data.shards import Sample
from wanloom.errors import UserError
from wanloom.geometry import Geometry
from wanloom.keys import keyed_fractions, keyed_normal
from wanloom.model.sequence import grid_of

SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)(?:\*(\d+))?")
MIN_TEXT, MAX_TEXT = 8, 128  # states of a caption; few real captions are longer


def parse_shapes(text: str, geometry: Geometry) -> list[tuple[int, int, int, int]]:
    """Shapes of latents, one for each part of the mix. Raises UserError for a shape the VAE cannot make."""
    out = []
    for part in text.split(","):
        match = SHAPE.fullmatch(part.strip())
        if not match:
            raise UserError(
                f"'{part}' is no shape: write frames x height x width, like 81x480x832, with *4 for four of it."
            )
        frames, height, width, count = (int(group or 1) for group in match.groups())
        try:
            out += [geometry.latents_shape(frames, height, width)] * count
        except UserError as error:
            raise UserError(f"'{part}' is no shape. {error}") from error
        if not count:
            raise UserError(f"'{part}' is no shape: at least one of it is needed.")
    return out


class MockDataset:
    """Random latents and text states in the shapes of `shapes`, in turn, every shape as often as it is asked for.

    So `size` is rounded up to whole turns.
    """

    def __init__(self, shapes: str, text_dim: int, geometry: Geometry, size: int = 1024, val_size: int = 16) -> None:
        mix = parse_shapes(shapes, geometry)
        self.path = f"mock {shapes}"
        self._text_dim = text_dim
        splits = ["train"] * (-(-size // len(mix)) * len(mix)) + ["val"] * val_size
        rows = [
            self._row(i, split, shape)
            for i, (split, shape) in enumerate(zip(splits, islice(cycle(mix), len(splits)), strict=True))
        ]
        self._indices = read_table(build_table(rows), self.path).splits

    def rows(self, split: str) -> Index:
        """The samples of "train" or "val"."""
        return self._indices[split]

    def read(self, row: Row) -> Sample:
        """The sample of a row: latents in bf16 as in a prepared folder."""
        latents = keyed_normal((row.channels, row.frames, row.height, row.width), "mock", "latents", row.offset)
        text = keyed_normal((row.text_len, self._text_dim), "mock", "text", row.offset)
        return Sample(row.key, {"latents": latents.bfloat16(), "text": text}, row.caption)

    @staticmethod
    def _row(number: int, split: str, shape: tuple[int, int, int, int]) -> Row:
        frames, rows, cols = grid_of(shape)
        (fraction,) = keyed_fractions(1, "mock", "text length", number)
        return Row(
            key=f"mock-{number:06d}",
            split=split,
            shard="",
            offset=number,  # there is no file: it only keys the values
            size=0,
            frames=shape[1],
            height=shape[2],
            width=shape[3],
            channels=shape[0],
            tokens=frames * rows * cols,
            text_len=MIN_TEXT + int(fraction * (MAX_TEXT + 1 - MIN_TEXT)),
            caption="",
            source="",
            sha256="",
        )
