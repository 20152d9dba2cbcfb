"""What `tools/same_run.py` compares, on made-up items and files; a whole run takes two minutes, by hand."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("same_run", ROOT / "tools" / "same_run.py")
assert spec is not None and spec.loader is not None
same_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(same_run)


def save(path: Path, **tensors: np.ndarray) -> dict[str, str]:
    save_file(tensors, path)
    return same_run.read_tensors(path.parent, path)


def test_one_bit_of_one_tensor_is_named(tmp_path, capsys):
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    other = weight.copy()
    other.view(np.uint32)[1, 2] ^= 1
    first = {"tensors": save(tmp_path / "a.safetensors", weight=weight, bias=weight[0])}
    same = {"tensors": save(tmp_path / "a.safetensors", bias=weight[0], weight=weight.copy())}
    second = {"tensors": save(tmp_path / "a.safetensors", weight=other, bias=weight[0])}
    assert same_run.compare(first, same) == {"tensors": []} and same_run.show("AB", first, same, 9)
    assert capsys.readouterr().out == "tensors 2 equal\n"
    [(name, one, two)] = same_run.compare(first, second)["tensors"]
    assert name == "a.safetensors: weight" and one.startswith("F32 [2, 3] rms 3.02") and one != two
    assert not same_run.show("AB", first, second, 9)
    assert f"tensors 2: 1 DIFFER\n  {name}\n      A: {one}\n      B: {two}\n" in capsys.readouterr().out


def test_type_shape_and_sign_of_zero_differ(tmp_path):
    zeros = np.zeros(4, np.float32)
    kinds = (zeros, -zeros, zeros.reshape(2, 2), zeros.view(np.int32), zeros.astype(np.float16))
    found = [save(tmp_path / "a.safetensors", x=kind)["a.safetensors: x"] for kind in kinds]
    assert len(set(found)) == len(kinds)


def test_what_only_one_has_is_missing(capsys):
    first, second = {"shards": {"a": "1", "b": "2"}}, {"shards": {"a": "1"}, "latents": {"video 0": "3"}}
    found = same_run.compare(first, second)
    assert found == {"shards": [("b", "2", "missing")], "latents": [("video 0", "missing", "3")]}
    assert not same_run.show("AB", first, second, 0)
    assert "shards 2: 1 DIFFER\n  and 1 more, with --all\n" in capsys.readouterr().out


def test_records_are_compared_without_times_to_the_last_bit(tmp_path):
    def read(**record: float) -> dict[str, str]:
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **record}) + "\n")
        return same_run.read_metrics(tmp_path / "metrics.jsonl")

    first = read(loss=0.3, seconds=1.0, mfu=0.1)
    assert first == read(loss=0.3, seconds=2.0, tokens_per_second=3.0)
    assert {name[-4:] for name, *_ in same_run.compare({"": first}, {"": read(loss=0.1 + 0.2)})[""]} == {"loss"}


def test_json_is_compared_without_versions_times_and_the_folder(tmp_path):
    found = []
    for i in range(2):
        work = tmp_path / str(i)
        work.mkdir()
        value = {"seed": 3, "checkpoint": f"{work}/one", "versions": {"torch": i}, "at": [{"seconds": i, "a": 1}]}
        (work / "x.json").write_text(json.dumps(value))
        found.append(same_run.read_json(work, work / "x.json"))
    assert found[0] == found[1] == {"x.json: seed": "3", "x.json: checkpoint": '"./one"', "x.json: at": '[{"a": 1}]'}


def test_a_command_that_fails_is_shown_with_its_last_lines(tmp_path):
    revision, words = same_run.Revision("there", "", tmp_path), ("-c", "print('so far'); raise SystemExit(3)")
    with pytest.raises(same_run.ToolError, match=r"there: `python -c .* exit code 3(.|\n)*    so far"):
        same_run.run_python(revision, words, tmp_path, same_run.threading.Event())


def test_a_decoder_that_is_gone_is_an_error():
    with pytest.raises(ImportError, match=r"needs `wanloom\.codecs\.vae\.VaeCodec\.decode`, which is gone"):
        same_run.load_watched(lambda _: None, ModuleType("wanloom.codecs.vae"))


def test_the_working_tree_is_never_kept():
    assert same_run.Revision(".", "", ROOT).kept is None
    kept = same_run.Revision("main", "abc", ROOT).kept
    assert kept.parent == ROOT / "build" / "same_run" and kept.name.startswith("abc-")


def test_media_have_the_same_bytes_in_every_run(tmp_path):
    for name in "ab":
        same_run.make_media(tmp_path / name)
    files = [same_run.read_files(tmp_path / name, (tmp_path / name).rglob("*.*")) for name in "ab"]
    assert files[0] == files[1] and len(files[0]) == 2 * (7 + 5) + 1
