"""wanloom trains, fine-tunes and samples the Wan video diffusion models.

`wanloom.train` and the others below are what the commands run, for a notebook; docs/python.md shows them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported by the first call
    from torch import Tensor

    from wanloom.runs.generate import Prompt
    from wanloom.runs.prepare import Prepared, Progress
    from wanloom.runs.train import Ended
    from wanloom.runs.trained import LoadedRun

__version__ = "0.1.0"

for _room in ("prepare", "train"):  # before the functions: the first import of a room would take the function's name
    import_module(f"wanloom.{_room}")


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    model: str = "tiny",
    device: str | None = None,
    on_progress: "Callable[[Progress], None]" = lambda progress: None,
    **settings: Any,
) -> "Prepared":
    """Prepare as `wanloom prepare` does: videos and images with captions in `source` to a training set in `out`.

    `settings` are the options of the command, such as `frames=17`. The same call goes on where it was stopped, and
    `on_progress` is called after every sample. Returns the report on every file, on rank 0 of several. Raises UserError
    for a mistake.
    """
    from wanloom.dist import process_group
    from wanloom.runs.prepare import prepare

    with process_group():
        return prepare(source, out, model, device, on_progress, **settings)


def train(
    recipe: str | Path | Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    training_mode: str | None = None,
    mock: str | bool | None = None,
) -> "Ended":
    """Train as `wanloom train` does: from the newest checkpoint of `run_dir`, to the last step or to a Ctrl-C.

    `recipe` is the name of a shipped one, a YAML file or a mapping; `settings` replace its own, as `{"train.steps": 9}`
    or `{"train": {"steps": 9}}`. `mock` trains on made-up data: True, or shapes such as `"17x64x64,1x64x64*4"`. Returns
    where the run ended. Raises UserError for a mistake. Started by torchrun, each process is a rank of the run.
    """
    from wanloom.dist import process_group
    from wanloom.runs.recipe import MIX
    from wanloom.runs.train import train_recipe

    with process_group():
        return train_recipe(recipe, settings or {}, training_mode, MIX if mock is True else mock or None)


def load_run(run: str | Path, *, ema: bool = False, device: str | None = None) -> "LoadedRun":
    """The model of a run, ready to use: the weights of its newest checkpoint, or of the checkpoint that `run` names.

    `ema` takes the averaged weights. Linears are fp32, gradients are off. Raises UserError where there is none.
    """
    from wanloom.dist import process_group
    from wanloom.runs.trained import load_run

    with process_group():
        return load_run(Path(run), ema, device)


def generate(
    prompts: "str | Prompt | Sequence[str | Prompt]", **settings: Any
) -> "Iterator[tuple[Tensor, dict[str, Any]]]":
    """Yields frames `(F, H, W, 3)` uint8 and the facts that repeat them, for each prompt as soon as it is made.

    `settings` are the options of `wanloom generate` by their names: model, checkpoint, ema, height, width, frames,
    seed, steps and so on. Raises UserError, at once, for what cannot be. Started by torchrun, all processes make each
    video together, and the first gets it.
    """
    from wanloom.runs.generate import start

    return start(prompts, settings)
