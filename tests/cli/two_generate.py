"""`wanloom generate` as each of two ranks for `test_generate_ranks.py`: it notes each costly thing it does."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wanloom import cli
from wanloom.codecs.text import TextCodec
from wanloom.codecs.vae import VaeCodec
from wanloom.runs import generate

NOTES = Path(sys.argv[1])


def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        with (NOTES / f"{os.environ['RANK']}.txt").open("a") as file:
            file.write(f"{name}\n")
        return function(*arguments)

    return noted


TextCodec.load = noting("text encoder", TextCodec.load)
VaeCodec.load = noting("VAE", VaeCodec.load)
generate.write_result = noting("write", generate.write_result)
generate.load_model = noting("transformer", generate.load_model)
sys.exit(cli.main(sys.argv[2:]))
