"""Where a pipeline is: `tiny` is shipped here, a folder is itself, anything else is a name on the Hugging Face hub."""

from pathlib import Path

from wanloom.config import expand_home
from wanloom.errors import UserError

NOTE = "wanloom.json"  # beside a model: where its weights come from, and how it is sampled
# what a converted folder takes from the pipeline that its weights belong to, by its layout
TAKEN = {"diffusers": ("vae", "text_encoder", "tokenizer", "scheduler"), "original": ("tokenizer",)}
TINY = Path(__file__).parents[1] / "assets" / "tiny"


def find_pipeline(name: str, parts: tuple[str, ...] = ()) -> Path:
    """The folder of a pipeline in diffusers layout; from the hub only `parts` (sub-folders) are fetched.

    Raises UserError when there is no such folder and the hub does not have it or cannot be reached.
    """
    check_name(name, parts)
    if name == "tiny":
        return TINY
    path = Path(expand_home(name))
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["model_index.json", NOTE, *(f"{part}/*" for part in parts)] if parts else None
    expected = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except expected as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The model '{name}' is no folder here and could not be fetched: {reason}") from error


def full_name(name: str) -> str:
    """The name of a pipeline as it is found from every folder."""
    folder = Path(expand_home(name))
    return str(folder.resolve()) if name != "tiny" and folder.exists() else name


def check_name(name: str, parts: tuple[str, ...] = ()) -> None:
    """Raises UserError for what cannot be a pipeline by its name, or by its folder; nothing is fetched."""
    path = Path(expand_home(name))
    if name == "tiny":
        return
    if path.exists():
        check_parts(path, parts)
        return
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"There is no model '{name}': give a folder in diffusers layout, a name on the Hugging Face hub such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or 'tiny'."
        )
    if name.startswith("Wan-AI/") and not name.endswith("-Diffusers"):
        raise UserError(
            f"'{name}' is in the layout of Wan's own code, whose VAE and text encoder are pickles: give "
            f"{name}-Diffusers, the same model in diffusers layout."
        )


def check_parts(folder: Path, parts: tuple[str, ...]) -> None:
    """Raises UserError when a part is missing; a transformer may also lie in the folder itself."""
    missing = [part for part in parts if part != "transformer" and not (folder / part).is_dir()]
    if not missing:
        return
    if any(folder.glob("*.pth")) or (folder / "google").is_dir():
        raise UserError(
            f"'{folder}' is in the layout of Wan's own code, whose VAE and text encoder are pickles, which are not "
            "read: give the same model in diffusers layout, on the hub under a name that ends in -Diffusers."
        )
    raise UserError(
        f"'{folder}' has no {', '.join(missing)}: give a whole pipeline in diffusers layout, or its name on the hub."
    )


def find_local(name: str, parts: tuple[str, ...]) -> Path | None:
    """The folder of a pipeline if these sub-folders of it are on this machine already; nothing is fetched."""
    path = TINY if name == "tiny" else Path(expand_home(name))
    if not path.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(name, allow_patterns=[f"{part}/*" for part in parts], local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            return None
    return path if all((path / part).is_dir() for part in parts) else None
