"""Which weights made this: a short fingerprint of one component folder of a pipeline.

In: a folder with config.json and weight files. Out: 16 hex digits. The one decision: files over 64 MiB are not read
whole (the text encoder has 11 to 23 GB); their size, their head (for safetensors the table of tensors) and one block of
1 MiB in every 64 MiB count. Another training step changes every tensor, so it changes these blocks too.
"""

import hashlib
from pathlib import Path

BLOCK = 1 << 20
STRIDE = 64 * BLOCK
# the folders of a pipeline whose weights encode, by what they are called in a prepared folder
ENCODERS = {"vae": ("vae",), "text-encoder": ("text_encoder", "tokenizer")}
SUFFIXES = {".json", ".safetensors", ".model", ".txt", ".jinja"}  # of everything that is read


def folder_identity(folder: Path) -> str:
    """Fingerprint of the config, weight and vocabulary files directly inside `folder`."""
    return files_identity([p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file()])


def files_identity(files: list[Path]) -> str:
    """Fingerprint of these files, by their names and contents."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for start in range(0, size, STRIDE if size > STRIDE else BLOCK):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def encoder_identity(pipeline: Path, name: str) -> str:
    """Fingerprint of one of `ENCODERS` of a pipeline."""
    return "-".join(folder_identity(pipeline / folder) for folder in ENCODERS[name])
