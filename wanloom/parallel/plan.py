"""How tensor parallelism splits the model: a table of module -> over which dim each of its parameters is cut.

The one decision: what is not in the table is copied to every rank and works on the rank's own tokens; the sum of its
gradients is taken once at the end of a step (params.sum_copies). Where a layer's result is then a part of a sum, the
table names its exchange: `tokens` leaves every rank the sum of its own tokens, `all` the sum of all rows.
"""

import re
from typing import Literal, NamedTuple


class Split(NamedTuple):
    """The dims over which the parameters of a layer are cut, and what its result needs."""

    dims: dict[str, int]
    exchange: Literal["", "tokens", "all"] = ""


COLUMN = Split({"weight": 0, "bias": 0})  # a Linear by its outputs
ROW = Split({"weight": 1}, "tokens")  # by its inputs
NORM = Split({"weight": 0}, "all")  # an RMS norm over all heads: one number a token is summed
ATTENTION = {"q": COLUMN, "k": COLUMN, "v": COLUMN, "norm_q": NORM, "norm_k": NORM, "o": ROW}
TABLE = {
    "text_embedding.0": COLUMN,
    "text_embedding.2": ROW._replace(exchange="all"),
    **{f"blocks.N.self_attn.{name}": split for name, split in ATTENTION.items()},
    **{f"blocks.N.cross_attn.{name}": split for name, split in ATTENTION.items()},
    "blocks.N.ffn.0": COLUMN,
    "blocks.N.ffn.2": ROW,
}
# these are given the tokens of all ranks
GATHERING = {"blocks.N.self_attn", "blocks.N.cross_attn", "blocks.N.ffn"}


def row_of(module: str) -> str:
    """The name of a module, as the table has it."""
    return re.sub(r"^blocks\.\d+", "blocks.N", module)


def split_dim(parameter: str) -> int | None:
    """The dim over which a parameter is cut; None for one that every rank has."""
    module, _, name = parameter.rpartition(".")
    split = TABLE.get(row_of(module))
    return split.dims.get(name) if split else None
