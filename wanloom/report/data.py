"""One self-contained HTML page of a prepared folder: what training will see of it.

In: the samples and the VAE that made them. Out: the page as text, with a contact sheet of decoded latents for each of a
few samples, spread evenly. The one decision: latents are decoded, not files shown, so what the codec loses is seen for
what it is. A long clip is decoded for its first frames only: the VAE is causal, so they are those of the whole.
Captions and names come from outside and are escaped.
"""

import base64
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from wanloom.codecs.vae import VaeCodec
from wanloom.data.shards import Dataset
from wanloom.dist import pick_device
from wanloom.errors import UserError
from wanloom.files import write_atomic
from wanloom.formats.pipeline import find_pipeline
from wanloom.geometry import Geometry
from wanloom.media.write import write_sheet
from wanloom.runs.origin import identify, read_settings
from wanloom.variants import VARIANTS

NUM_SAMPLES = 24
LATENT_FRAMES = 5  # of a clip, at most: 17 frames
GENERATOR = b'<meta name="generator" content="wanloom show --page">'  # in the first bytes of every such page


@dataclass(frozen=True)
class Sheet:
    """One sample on the page."""

    key: str
    caption: str
    size: str
    picture: str  # data URI


@dataclass(frozen=True)
class DataPage:
    """Everything the page shows."""

    name: str
    summary: str
    num_samples: int
    vae: str  # whose it is, in words
    note: str  # what could not be checked
    sheets: Sequence[Sheet]


def write_page(
    source: Dataset, file: Path, model: str | None, summary: str, on_sheet: Callable[[int, int], None]
) -> None:
    """Write the page of a prepared folder, which `summary` tells of; `on_sheet` as of `draw_sheets`.

    Raises UserError when the file is another one, the folder empty, or its VAE not known or not here.
    """
    if file.exists() and (not file.is_file() or GENERATOR not in file.read_bytes()[:1000]):
        raise UserError(f"'{file}' is there and is no such page: `out` takes another name.")
    if not len(source.rows("train")):
        raise UserError(f"'{source.path}' has no samples to train on.")
    name, note = choose_vae(source, model)
    vae = VaeCodec.load(find_pipeline(name, ("vae",)), pick_device())
    sheets = draw_sheets(source, vae, on_sheet)
    whose = f"the VAE of {name}" + ("" if note else ", which they were made with")
    page = DataPage(Path(source.path).resolve().name, summary, len(source.rows("train")), whose, note, sheets)
    write_atomic(file, build_data_page(page).encode())


def choose_vae(source: Dataset, model: str | None) -> tuple[str, str]:
    """The model whose VAE made the latents, and a note where that is not known for certain.

    Raises UserError for a model with another VAE, and when it has to be named.
    """
    made_with = read_settings(source.path).get("vae")
    if model is None:
        for name in (row.hub or key for key, row in VARIANTS.items()):
            if made_with is not None and identify(name, "vae") == made_with:
                return name, ""
        raise UserError(
            f"Which VAE made '{source.path}' cannot be told here: `model` names the model that it was prepared for."
        )
    if made_with is None:
        return model, f"Whether these latents were made with this VAE is not known: {source.path} does not say."
    if identify(model, "vae") not in (made_with, None):
        raise UserError(f"'{source.path}' was prepared with another VAE than that of {model}: give its own model.")
    return model, ""


def draw_sheets(source: Dataset, vae: VaeCodec, on_sheet: Callable[[int, int], None]) -> list[Sheet]:
    """Contact sheets of samples to train on; `on_sheet` gets how many are made, and of how many.

    Raises UserError for latents that the VAE does not take.
    """
    index, geometry = source.rows("train"), vae.geometry
    count = min(NUM_SAMPLES, len(index))
    sheets = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        for number in range(count):
            row = index[number * len(index) // count]
            latents = source.read(row).tensors["latents"]
            if len(latents) != geometry.channels:
                raise UserError(
                    f"The latents of '{row.key}' have {len(latents)} channels, those of this VAE have "
                    f"{geometry.channels}: `model` names the model that the folder was prepared for."
                )
            write_sheet(path, vae.decode(latents[:, :LATENT_FRAMES].float()))
            picture = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
            sheets.append(Sheet(row.key, row.caption, size_of(geometry, row.frames, row.height, row.width), picture))
            on_sheet(number + 1, count)
    return sheets


def size_of(geometry: Geometry, latent_frames: int, height: int, width: int) -> str:
    """Pixels of a sample with latents of this size, width first, and which of its frames are shown."""
    frames, rows, columns = geometry.video_shape(latent_frames, height, width)
    shown = geometry.video_shape(min(latent_frames, LATENT_FRAMES), height, width)[0]
    pixels = f"{columns}x{rows}"
    if latent_frames == 1:
        return pixels
    return f"{pixels}, {frames} frames" + (f", the first {shown} shown" if shown < frames else "")


def build_data_page(page: DataPage) -> str:
    """The page as HTML text."""
    room = files("wanloom.report")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(room.joinpath("data.html").read_text(encoding="utf-8"))
    return template.render(page=page, css=Markup(room.joinpath("page.css").read_text(encoding="utf-8")))
