"""`wanloom train` as a user runs it: what it computes and writes, what it starts from, and its mistakes."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from saved_weights import load_weights
from train_runs import SMALL, TIMES, assert_same_bits, losses, words, write_data

from wanloom.checkpoint.saved import find_checkpoint, list_checkpoints, read_state
from wanloom.cli import main
from wanloom.codecs.identity import ENCODERS, encoder_identity
from wanloom.data.mock import MockDataset
from wanloom.data.order import Order
from wanloom.data.tar import END, tar_pair
from wanloom.formats.transformer import state_dict_as
from wanloom.geometry import WAN_21
from wanloom.keys import draw_noise, keyed_fractions, keyed_normal
from wanloom.model.dit import WanDiT
from wanloom.model.flops import forward_flops
from wanloom.runs.recipe import build_run
from wanloom.train.peaks import find_peak
from wanloom.train.records import read_metrics

pytestmark = pytest.mark.slow


def test_two_runs_are_bit_equal_and_write_what_they_promise(tmp_path, capsys):
    settings = ["train.steps=5", "checkpoint.every=2", "log.validate_every=4"]
    assert main(words(tmp_path / "a", *settings)) == 0
    assert main(words(tmp_path / "b", *settings)) == 0
    out = capsys.readouterr().out
    assert "tiny from random weights on cpu with 1 thread in fp32, attention by flash: " in out
    assert "step 2/5  loss" in out and "Done:" in out and "wanloom generate --checkpoint" in out
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert main(words(tmp_path / "c", *settings, "seed=1")) == 0
    assert losses(tmp_path / "a") != losses(tmp_path / "c")

    records = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [r["step"] for r in records] == [2, 4, 5]
    wanted = {"loss", "weighted_loss", "lr", "grad_norm", "samples", "tokens", "packing_efficiency", *TIMES}
    assert all(wanted <= r.keys() and r["balance"] == 1 for r in records)
    assert ["val_loss" in r for r in records] == [False, True, False]
    assert [r["samples"] for r in records] == [8, 16, 20]
    assert [p.name for p in list_checkpoints(tmp_path / "a")] == ["step_0000004", "step_0000005"]
    assert list((tmp_path / "a" / "tensorboard").glob("events.*"))
    assert yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())["batch"]["samples"] == 4
    _, model = load_weights(find_checkpoint(tmp_path / "a"), ema=False)
    _, ema = load_weights(find_checkpoint(tmp_path / "a"), ema=True)
    assert model.keys() == ema.keys() and not torch.equal(model["head.head.weight"], ema["head.head.weight"])


def test_losses_do_not_depend_on_the_packing(tmp_path, capsys):
    for name, budget in (("a", 40), ("b", 20), ("c", 500)):
        assert main(words(tmp_path / name, "train.steps=4", "log.every=1", f"batch.tokens_per_pack={budget}")) == 0
    for name in ("b", "c"):
        for a, other in zip(losses(tmp_path / "a"), losses(tmp_path / name), strict=True):
            assert other["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert len({losses(tmp_path / name)[0]["packing_efficiency"] for name in "abc"}) > 1


def test_three_steps_equal_a_plain_loop_with_diffusers_and_torch(tiny_pipeline, tmp_path):
    """Samples, noise, dropped captions, loss, clipping, warm-up, decay, AdamW and the average, all together."""
    settings = [f"model={tiny_pipeline}", "init=pretrained", "train.steps=3", "caption_dropout=0.4", "ema.decay=0.5"]
    settings += ["seed=3"]
    settings += ["schedule={kind: linear, warmup_steps: 2, min_lr_ratio: 0.0}", "clip_norm=0.5", "flow.shift=2.0"]
    settings += ["flow.sampler=uniform", "flow.mix_uniform_ratio=0", "flow.stratified=true"]
    # a large eps: with a small one the first updates are the signs of gradients, of rounding where those are near zero
    settings += ["optimizer={lr: 1e-2, betas: [0.8, 0.9], eps: 1e-2, weight_decay: 0.1}", "log.every=1"]
    assert main(words(tmp_path, *settings)) == 0
    config, weights = load_weights(find_checkpoint(tmp_path), ema=False)
    _, average = load_weights(find_checkpoint(tmp_path), ema=True)

    transformer = WanTransformer3DModel.from_pretrained(tiny_pipeline / "transformer")
    matrices = {name for name, p in WanDiT(config).named_parameters() if p.dim() == 2}
    matrices = set(state_dict_as({name: weights[name] for name in matrices}, "diffusers"))
    groups = [[p for n, p in transformer.named_parameters() if (n in matrices) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-2,
    )
    expected = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    source = MockDataset("1x64x64,9x32x32,5x48x32", 64, WAN_21)
    index, order = source.rows("train"), Order([1024], [Fraction(1)], seed=3)
    empty, dropped = keyed_normal((1, 64), "mock", "empty text"), 0  # the empty caption of --mock
    for step, lr in enumerate((0.005, 0.01, 0.01)):
        loss, count, flops = torch.zeros(()), 0, 0
        for position in range(4 * step, 4 * step + 4):
            row = index[order.at(position).index]
            sample, name = source.read(row), f"0/{row.key}"
            u = (position % 4 + keyed_fractions(2, 3, "sigma", name, 0)[0]) / 4
            sigma = 2 * u / (1 + u)
            clean = sample.tensors["latents"].float()
            noise = draw_noise(tuple(clean.shape), 3, name, 0)
            drops = keyed_fractions(1, 3, "caption_dropout", name, 0)[0] < 0.4
            states, dropped = empty if drops else sample.tensors["text"], dropped + drops
            text = torch.cat([states, torch.zeros(512 - len(states), 64)])
            noisy = (1 - sigma) * clean + sigma * noise
            velocity = transformer(noisy[None], torch.tensor([1000 * sigma]), text[None], return_dict=False)[0][0]
            loss = loss + (1 + 2 * sigma) * (velocity - (noise - clean)).square().sum()
            count += clean.numel()
            flops += 3 * forward_flops(config, clean[0].numel() // 4)
        (loss / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * p.detach() for n, p in transformer.named_parameters()}
        record = read_metrics(tmp_path / "metrics.jsonl")[step]
        assert record["weighted_loss"] == pytest.approx(loss.item() / count, rel=1e-4)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.5
        assert record["lr"] == pytest.approx(lr)
        per_token = record["model_tflops_per_gpu"] * 1e12 / record["tokens_per_second"]
        assert per_token == pytest.approx(flops / (count / 64), rel=1e-6)
    assert 0 < dropped < 12, "both kinds of captions are needed"
    for found, wanted in (
        (state_dict_as(weights, "diffusers"), dict(transformer.named_parameters())),
        (state_dict_as(average, "diffusers"), expected),
    ):
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name].detach(), rtol=1e-4, atol=1e-5)


def test_bf16_is_what_runs_when_it_is_asked_for(tmp_path, tiny_pipeline):
    settings = [f"model={tiny_pipeline}", "init=pretrained", "train.steps=1", "log.every=1"]
    found = {}
    for precision in ("fp32", "bf16"):
        assert main(words(tmp_path / precision, *settings, f"compute.precision={precision}")) == 0
        found[precision] = losses(tmp_path / precision)[0]["loss"]
    assert 1e-6 < abs(found["bf16"] / found["fp32"] - 1) < 0.02
    _, weights = load_weights(find_checkpoint(tmp_path / "bf16"), ema=False)
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_mfu_is_the_published_convention_over_the_peak_of_the_gpu(tmp_path, monkeypatch, capsys):
    """The model's FLOPs by hand, on a CPU that says it is an H200; fp32 and a GPU of another name have none."""
    gpu = torch.device("cuda")
    monkeypatch.setattr("wanloom.runs.train.find_peak", lambda device, bf16: find_peak(gpu, bf16))
    settings = ["train.steps=1", "log.every=1", "--mock=5x48x32"]  # four samples of 2 x 3 x 2 tokens
    for name, precision, device in (("a", "bf16", "NVIDIA H200"), ("b", "fp32", "NVIDIA H200"), ("c", "bf16", "X")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, device=device: device)
        assert main(words(tmp_path / name, *settings, f"compute.precision={precision}")) == 0
    out = capsys.readouterr().out
    assert out.count(" TFLOP/s per GPU, MFU ") == 1
    assert out.count("The bf16 peak of X is not known: the log has no MFU.") == 1
    found = [read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in "abc"]
    assert ["mfu" in record for record in found] == [True, False, False]
    d, f, s, t = 128, 512, 12, 512
    block = 2 * s * (6 * d * d + 2 * d * f) + 4 * t * d * d + 4 * s * d * (s + t)
    outside = 2 * s * 64 * d * 2 + 2 * t * (64 * d + d * d) + 2 * (256 * d + 7 * d * d)
    flops = 4 * 3 * (6 * block + outside)
    assert found[0]["mfu"] == pytest.approx(flops / found[0]["seconds"] / 989e12, rel=1e-6)


SMALL_AT_X = ["train", *SMALL, "run_dir={tmp}/x", "train.steps=2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny"], "Say where checkpoints and metrics go: run_dir=FOLDER."),
        (["train", "tiny", "run_dir={tmp}/x"], "Say once where the training data is"),
        (["train", "tiny", "run_dir={tmp}/x", "data.path={tmp}/none"], "There is no folder"),
        (["train", "tiny", "run_dir={tmp}/x", "--mock", "1x64x60"], "is no shape"),
        (["train", "tiny", "--mock", "17x64x64", "run_dir={tmp}/x", "batch.tokens_per_pack=79"], "has 80 tokens"),
        (["train", "tiny", "run_dir=/proc/x", "--mock", "1x64x64"], "/proc/x cannot be written"),
        (["train", "tinny", "run_dir={tmp}/x"], "Did you mean 'tiny'?"),
        (["train", "tiny", "run_dir={tmp}/x", "optimizer.learning_rate=1"], "There is no setting"),
        (["train", "tiny", "run_dir={tmp}/x", "batch.samples=0"], "batch.samples"),
        ([*SMALL_AT_X, "compute.kernel=sdpa"], "compute.kernel"),
        ([*SMALL_AT_X, "compute.kernel=cudnn"], "The attention kernel 'cudnn' needs a CUDA device and bf16"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, arguments, message):
    assert main([word.format(tmp=tmp_path) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_prepared_folder_and_the_empty_caption_of_a_pipeline(tmp_path, prepared, tiny_pipeline, capsys):
    """From a pipeline's own weights, on shards, with the states of the empty caption from its encoder."""
    from wanloom.codecs.text import TextCodec

    folder, _ = prepared
    settings = [
        f"model={tiny_pipeline}",
        "init=pretrained",
        f"run_dir={tmp_path}/x",
        "batch.samples=4",
        "train.steps=2",
    ]
    assert main(["train", "tiny", f"data.path={folder}", *settings]) == 2
    assert "another text encoder" in capsys.readouterr().err
    assert main(["train", "tiny", "--mock=1x64x64", *settings]) == 0
    assert main(["show", f"{tmp_path}/x"]) == 0
    assert "step_0000002: 8 samples" in capsys.readouterr().out

    from wanloom.runs.empty_text import empty_text

    run = build_run("tiny", [f"model={tiny_pipeline}", f"data.path={folder}"])
    states = empty_text(run, tmp_path, 64, torch.device("cpu"))
    expected = TextCodec.load(tiny_pipeline, "cpu").encode([""])[0]
    assert states is not None and torch.equal(states, expected) and states.shape == (1, 64)
    assert torch.equal(empty_text(run, tmp_path, 64, torch.device("cpu")), states)
    assert json.loads((find_checkpoint(tmp_path / "x") / "state.json").read_text())["model"]["dim"] == 128


def test_other_states_of_the_empty_caption_are_not_trained_on(tmp_path, tiny_pipeline, capsys):
    """A flipped bit, and a file that is whole but another one."""
    from safetensors.torch import save_file

    from wanloom.runs.empty_text import sum_of

    write_data(tmp_path / "data")
    settings = [f"model={tiny_pipeline}", f"data.path={tmp_path}/data", f"run_dir={tmp_path}/run"]
    command = ["train", *SMALL[:1], *SMALL[2:], *settings, "caption_dropout=0.5"]
    path = tmp_path / "run" / "empty_text.safetensors"
    assert main([*command, "train.steps=1"]) == 0
    whole = path.read_bytes()

    def resume() -> str:
        assert main([*command, "train.steps=2"]) == 2
        return capsys.readouterr().err

    flipped = bytearray(whole)
    flipped[-2] ^= 1
    path.write_bytes(flipped)
    assert f"{path} is damaged (its content has changed): delete it, and it is made again" in resume()
    path.write_bytes(whole[:50])
    assert f"{path} is damaged (it cannot be read: " in resume()
    save_file({"text": torch.ones(1, 8)}, path)
    assert "it holds torch.float32 (1, 8), and not fp32 (L, 64)" in resume()
    save_file({"text": torch.ones(1, 64)}, path, metadata={"sha256": sum_of(torch.ones(1, 64))})
    assert f"{path} is not what this run was started with: restore it" in resume()
    path.unlink()
    assert main([*command, "train.steps=2"]) == 0
    assert path.read_bytes() == whole


def test_prepared_data_is_compared_to_the_model_at_every_start(tmp_path, tiny_pipeline, capsys):
    """Another VAE is an error, another text encoder a note; a held-out loss without held-out samples is an error."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    for number in range(4):
        tensors = {"latents": torch.randn(16, 1, 4, 4).bfloat16(), "text": torch.randn(3, 64)}
        pair = tar_pair(f"{number}", tensors, {"caption": "x"})
        (tmp_path / "data" / "train" / f"shard-{number:06d}.tar").write_bytes(pair + END)
    settings = [f"model={tiny_pipeline}", f"data.path={tmp_path}/data", f"run_dir={tmp_path}/run"]
    command = ["train", *SMALL[:1], *SMALL[2:], *settings, "caption_dropout=0"]

    def train(steps: int, *more: str, **changes: str) -> int:
        (tmp_path / "data" / "prepare.json").write_text(
            json.dumps({"settings": {**{name: encoder_identity(tiny_pipeline, name) for name in ENCODERS}, **changes}})
        )
        return main([*command, f"train.steps={steps}", *more])

    assert train(1) == 0 and "Note:" not in capsys.readouterr().out
    assert train(2, vae="0" * 16) == 2
    assert f"{tmp_path}/data was prepared with another VAE than that of {tiny_pipeline}" in capsys.readouterr().err
    assert train(2, **{"text-encoder": "0-0"}) == 0
    assert "was prepared with other text encoder files" in capsys.readouterr().out
    assert train(3, "log.validate_every=2") == 2
    assert "log.validate_every=2 asks for a held-out loss, but the data has no val split" in capsys.readouterr().err


def test_a_run_starts_from_the_weights_of_another_or_their_average(tmp_path, capsys):
    """As by hand: a step at a rate that rounds to nothing, or nearly, leaves the weights of the checkpoint."""
    assert main(words(tmp_path / "first", "train.steps=3")) == 0
    checkpoint = find_checkpoint(tmp_path / "first")
    still = ["train.steps=1", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "schedule.warmup_steps=0"]
    found = {}
    for name, init in (("raw", "first"), ("ema", "first:ema"), ("step", f"first/checkpoints/{checkpoint.name}")):
        assert main(words(tmp_path / name, *still, f"init={tmp_path}/{init}")) == 0
        _, found[name] = load_weights(find_checkpoint(tmp_path / name), ema=False)
    out = capsys.readouterr().out
    assert f"tiny from {tmp_path}/first:ema weights" in out
    for name, ema in (("raw", False), ("ema", True), ("step", False)):
        _, wanted = load_weights(checkpoint, ema=ema)
        assert all(torch.equal(found[name][key], value) for key, value in wanted.items()), name
    assert not all(torch.equal(found["raw"][key], found["ema"][key]) for key in found["raw"])
    assert main(words(tmp_path / "raw", *still, f"init={tmp_path}/first", "train.steps=2")) == 0, "it goes on"
    shutil.rmtree(tmp_path / "first")
    assert main(words(tmp_path / "raw", *still, f"init={tmp_path}/first", "train.steps=3")) == 0, "by its own weights"
    assert main(words(tmp_path / "x", f"init={tmp_path}/first", "train.steps=1")) == 2
    assert "neither random nor pretrained nor the folder of a run" in capsys.readouterr().err
    for wrong, message in (
        ("init=pretraned", "neither random nor pretrained nor the folder of a run"),
        (f"init={tmp_path}", "holds no checkpoint"),
    ):
        assert main(words(tmp_path / "x", wrong, "train.steps=1")) == 2
        assert message in capsys.readouterr().err


def test_a_run_says_how_long_it_is_before_it_starts(tmp_path, capsys):
    assert main(words(tmp_path / "a", "train.epochs=0.0125", "checkpoint.minutes=1e-9")) == 0
    out = capsys.readouterr().out
    assert (
        "4 steps pass over each sample 0.016 times; the first checkpoint comes after the last step or 1e-09 min" in out
    )
    assert [read_state(path)["step"] for path in list_checkpoints(tmp_path / "a")] == [3, 4], (
        "minutes go by at each step"
    )
    recipe = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())
    assert recipe["train"]["steps"] == 4 and recipe["train"]["epochs"] is None
    assert main(words(tmp_path / "b", "train.steps=13")) == 0
    out = capsys.readouterr().out
    assert "A step takes " in out and " s: the run ends in about 0:0" in out


def test_a_folder_of_other_things_is_no_run_dir(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"")
    assert main(words(Path("clips"), "train.steps=1")) == 2
    assert "'clips' is not empty and is no folder of a run (it holds 'a.mp4')" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["a.mp4"]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train.log").write_text("")
    assert main(words(Path("logs"), "train.steps=1")) == 0
    assert main(["train", "tiny", "data.path=nothing", "run_dir=x"]) == 2
    error = capsys.readouterr().err
    assert f"There is no folder 'nothing' in {tmp_path}: relative paths begin where the command runs" in error
    assert main(words(Path("x"), "compute.offload_activations=true")) == 2
    assert "compute.offload_activations=true has no effect on a CPU" in capsys.readouterr().err


def test_mock_needs_no_shapes_and_stands_anywhere(tmp_path, capsys):
    settings = ["train.steps=1", "batch.samples=4", "caption_dropout=0"]
    assert main(["train", "tiny", "--mock", f"run_dir={tmp_path}/a", *settings]) == 0
    assert main(["train", "--mock", "tiny", f"run_dir={tmp_path}/b", *settings]) == 0
    assert main(["train", "tiny", *settings, f"run_dir={tmp_path}/c", "--mock", "17x64x64,1x64x64*4"]) == 0
    runs = [yaml.safe_load((tmp_path / name / "run.yaml").read_text())["data"] for name in "abc"]
    assert runs[0] == runs[1] == runs[2] and runs[0]["mock"] == "17x64x64,1x64x64*4"
