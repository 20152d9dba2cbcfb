"""`wanloom show DATA --page`: the page of a prepared folder, its latents decoded by the VAE that made them."""

from pathlib import Path
from typing import TYPE_CHECKING

from wanloom.errors import UserError
from wanloom.terminal import say

if TYPE_CHECKING:  # torch is imported only when the command runs
    from wanloom.data.shards import Dataset


def show_page(path: Path, file: Path, model: str | None) -> None:
    """Write the page of a prepared folder. Raises UserError when its VAE is not known or not here."""
    from wanloom.cli.show import describe
    from wanloom.codecs.vae import VaeCodec
    from wanloom.data.shards import Dataset
    from wanloom.dist import pick_device
    from wanloom.files import write_atomic
    from wanloom.formats.pipeline import find_pipeline
    from wanloom.report.data import GENERATOR, DataPage, build_data_page, draw_sheets

    if file.exists() and (not file.is_file() or GENERATOR not in file.read_bytes()[:1000]):
        raise UserError(f"'{file}' is there and is no such page: --out FILE takes another name.")
    source = Dataset.open(path)
    if not len(source.rows("train")):
        raise UserError(f"'{path}' has no samples to train on.")
    name, note = choose_vae(source, model)
    vae = VaeCodec.load(find_pipeline(name, ("vae",)), pick_device())
    sheets = draw_sheets(source, vae, lambda done, count: say(f"decoded {done} of {count}"))
    whose = f"the VAE of {name}" + ("" if note else ", which they were made with")
    page = DataPage(path.resolve().name, describe(source), len(source.rows("train")), whose, note, sheets)
    write_atomic(file, build_data_page(page).encode())
    say(str(file.resolve()))


def choose_vae(source: "Dataset", model: str | None) -> tuple[str, str]:
    """The model whose VAE made the latents, and a note where that is not known for certain.

    Raises UserError for a model with another VAE, and when it has to be named.
    """
    from wanloom.runs.origin import identify, read_settings
    from wanloom.variants import VARIANTS

    made_with = read_settings(source.path).get("vae")
    if model is None:
        for name in (row.hub or key for key, row in VARIANTS.items()):
            if made_with is not None and identify(name, "vae") == made_with:
                return name, ""
        raise UserError(
            f"Which VAE made '{source.path}' cannot be told here: --model names the model that it was prepared for."
        )
    if made_with is None:
        return model, f"Whether these latents were made with this VAE is not known: {source.path} does not say."
    if identify(model, "vae") not in (made_with, None):
        raise UserError(f"'{source.path}' was prepared with another VAE than that of {model}: give its own model.")
    return model, ""
