"""What Megatron-Energon wants to find beside the shards, so that its loaders open a prepared folder as it is.

In: the shards with their samples. Out: `.nv-meta/` (dataset.yaml, captions.yaml, split.yaml, .info.json) and one
`<shard>.tar.idx` each. The one decision: these few files are written here and not by Energon's own preparation, so they
are there without the extra installed and are the same bytes every time; a test opens the folder with Energon itself.
Samples are crude, no type of Energon's has latents; captions.yaml shows them as texts to its command line. Not
written is index.sqlite, which only its joins and random access by key read: `energon prepare` adds it.
Format: Megatron-Energon 7 (https://nvidia.github.io/Megatron-Energon).
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from wanloom.files import write_atomic

META = ".nv-meta"
CAPTIONS = "captions.yaml"  # another view of the samples: Energon's command line shows no crude ones


def write_energon(out: Path, shards: Mapping[str, Sequence[int]]) -> None:
    """Write the metadata of `shards`: of each (such as "train/shard-000000.tar") where its samples start and end."""
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name, offsets in shards.items():
        splits[name.split("/")[0]].append(name)
        write_atomic(out / f"{name}.idx", struct.pack(f"<{len(offsets)}Q", *offsets))
    info = {"energon_version": None, "shard_counts": {name: len(starts) - 1 for name, starts in shards.items()}}
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write_atomic(out / META / ".info.json", (json.dumps(info, indent=2) + "\n").encode())
    captions = {
        "__module__": "megatron.energon",
        "__class__": "StandardWebdatasetFactory",
        "sample_type": {"__module__": "megatron.energon", "__class__": "TextSample"},
        "field_map": {"text": "json[caption]"},
    }
    write_atomic(out / META / CAPTIONS, yaml.safe_dump(captions, sort_keys=False).encode())
    write_atomic(out / META / "dataset.yaml", yaml.safe_dump(dataset, sort_keys=False).encode())
    write_atomic(out / META / "split.yaml", yaml.safe_dump({"split_parts": splits, "exclude": []}).encode())
