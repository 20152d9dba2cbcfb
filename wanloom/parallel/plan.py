"""How tensor parallelism treats each module: tables of name -> style.

In: nothing. Out: the table for WanDiT. The one decision: what is not in the table is copied to every rank and works on
the rank's own tokens; the sum of its gradients is taken once at the end of a step (params.sum_copies).

`gather`   collects the tokens of the group before the module runs
`column`   splits a Linear by outputs: whole tokens in, the rank's outputs out
`row`      splits a Linear by inputs and leaves every rank its own tokens
`row_all`  splits a Linear by inputs and leaves every rank all rows
`norm`     splits an RMS norm; its sum of squares goes over all ranks
"""

from typing import Literal

Style = Literal["gather", "column", "row", "row_all", "norm"]

ATTENTION: dict[str, Style] = {
    "": "gather",
    "q": "column",
    "k": "column",
    "v": "column",
    "norm_q": "norm",
    "norm_k": "norm",
    "o": "row",
}
BLOCK: dict[str, Style] = {
    **{f"self_attn.{name}".rstrip("."): style for name, style in ATTENTION.items()},
    **{f"cross_attn.{name}".rstrip("."): style for name, style in ATTENTION.items()},
    "ffn": "gather",
    "ffn.0": "column",
    "ffn.2": "row",
}
ROOT: dict[str, Style] = {"text_embedding.0": "column", "text_embedding.2": "row_all"}
