"""The GPU script end to end at toy size on a CPU: every phase, its checks, what it keeps, and when it stops."""

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import __main__ as script
from benchmarks.gpu import ladder, models, packing, whole
from benchmarks.gpu.instruments import (
    Bench,
    Case,
    Line,
    attention_kinds,
    difference_problem,
    distance,
    kernel_problem,
)
from wanloom.variants import VARIANTS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The file of a whole run."""
    path = tmp_path_factory.mktemp("gpu") / "toy.json"
    assert script.main(["--toy", "--out", str(path)]) == 0
    return path


class H200(Bench):
    def __init__(self, device, toy):
        super().__init__(device, toy)
        self.is_h200 = True


def lines_in(path):
    return {
        line["name"]: Line(**line) for case in json.loads(path.read_text())["cases"].values() for line in case["lines"]
    }


def test_every_phase_runs_and_nothing_is_wrong(toy):
    found = lines_in(toy)
    assert {name.split()[0] for name in found} == {f"P{i}" for i in range(8)}
    assert not [line for line in found.values() if line.problem]
    unmeasured = {name for name, line in found.items() if line.value is None}
    assert all("left out" in found[name].note for name in unmeasured)
    rows = [found[ladder.name_of(ladder.SHAPES[0], row)] for row in ladder.ROWS]
    assert [line.facts["by"] for line in rows] == ["DiffusersModel"] + ["WanDiT"] * 5
    assert all(line.facts["attention"] == ["flash"] for line in rows)
    # the same weights and data in all of them, to bf16's rounding, and packing changes nothing
    assert len({line.facts["loss"] for line in rows[1:]}) == 1
    assert rows[0].facts["loss"] == pytest.approx(rows[1].facts["loss"], rel=5e-3)
    for mix in packing.MIXES:
        loop, packed = (found[f"P4 {mix} {way}"].facts for way in ("loop", "packed"))
        assert packed["loss"] == pytest.approx(loop["loss"], rel=1e-4) and packed["tokens"] == loop["tokens"]


def test_a_later_call_goes_on_and_a_short_one_begins_less(toy, tmp_path, monkeypatch, capsys):
    before = toy.read_bytes()
    assert script.main(["--toy", "--out", str(toy)]) == 0
    assert toy.read_bytes() == before and "P2 14b x4 37440 E / A" in capsys.readouterr().out
    path, made = tmp_path / "new.json", []

    def case(name, seconds):
        return Case(name, seconds, lambda: made.append(name) or [Line(name, 1.0, "x")])

    cases = [case("P0 a", 30), case("P0 b", 300), case("P0 c", 50)]
    monkeypatch.setattr(script, "PHASES", {"P0": script.Phase(lambda bench: iter(cases), script.none)})
    words = ["--toy", "--out", str(path), "--phases", "P0"]
    assert script.main([*words, "--minutes", "1"]) == 0
    assert "Left for a later call, 1: P0 b\n" in capsys.readouterr().out
    assert script.main([*words, "--minutes", "8"]) == 0
    assert made == ["P0 a", "P0 c", "P0 b"] and list(lines_in(path)) == made
    assert "Left" not in capsys.readouterr().out


def test_a_case_that_fails_is_written_down_and_tried_again(tmp_path, monkeypatch, capsys):
    def fail():
        raise RuntimeError("no such kernel\nmore")

    path, made = tmp_path / "x.json", []
    good = Case("P0 good", 0, lambda: made.append(1) or [Line("P0 good", 2.0, "x")])
    memory = Case("P0 memory", 0, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("16 GiB")))
    cases = [Case("P0 bad", 0, fail), good, memory]
    monkeypatch.setattr(script, "PHASES", {"P0": script.Phase(lambda bench: iter(cases), script.none)})
    words = ["--toy", "--out", str(path), "--phases", "P0"]
    assert script.main(words) == 1
    found = lines_in(path)
    assert found["P0 bad"].problem == "RuntimeError: no such kernel"
    assert found["P0 memory"].problem == "out of memory"
    cases[0] = Case("P0 bad", 0, lambda: [Line("P0 bad", 1.0, "x")])
    assert script.main(words) == 1, "memory does not grow"
    assert lines_in(path)["P0 bad"].value == 1 and made == [1]
    assert "no such kernel" in capsys.readouterr().err


def test_a_mistake_in_the_script_stops_it_and_keeps_what_there_is(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    cases = [Case("P0 good", 0, lambda: [Line("P0 good", 2.0, "x")]), Case("P0 bad", 0, lambda: {}["none"])]
    monkeypatch.setattr(script, "PHASES", {"P0": script.Phase(lambda bench: iter(cases), script.none)})
    with pytest.raises(KeyError):
        script.main(["--toy", "--out", str(path), "--phases", "P0"])
    assert list(lines_in(path)) == ["P0 good"]


@pytest.mark.parametrize("name", ["machine", "versions"])
def test_a_file_of_another_machine_is_not_gone_on_with(toy, tmp_path, name):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(json.loads(toy.read_text()) | {name: {"gpu": "another"}}))
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=f"with another {name}: choose another file"):
        script.main(["--toy", "--out", str(path)])
    assert path.read_bytes() == before


def test_a_missed_bound_is_told_on_an_h200_alone(monkeypatch, capsys):
    cases = [Case("P0 slow", 0, lambda: [Line("P0 slow", 2.0, "s", expect="1", at_most=1.0)])]
    monkeypatch.setattr(script, "PHASES", {"P0": script.Phase(lambda bench: iter(cases), script.none)})
    assert script.main(["--toy", "--phases", "P0"]) == 0
    said = capsys.readouterr().out
    assert "FAIL" not in said and "<= 1" not in said and "nothing is judged here" in said
    monkeypatch.setattr(script, "Bench", H200)
    assert script.main(["--toy", "--phases", "P0"]) == 0
    said = capsys.readouterr().out
    assert "FAIL" in said and "1 out of bounds" in said and "nothing is judged" not in said


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64>>", {"flash"}),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31_64x128x128_4x1x1", {"cudnn"}),
        ("fmha_cutlassB_bf16_aligned_64x64_k128_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", {"efficient"}),
        ("triton_tem_fused_flex_attention_0", {"flex"}),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", set()),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW", set()),
    ],
)
def test_kernels_are_told_apart_by_name(name, kind):
    assert attention_kinds(["void at::native::elementwise_kernel", name]) == kind
    assert (kernel_problem([name], {"cudnn"}) == "") == (kind == {"cudnn"})
    assert kernel_problem([], {"cudnn"}), "what was not seen was not asserted"


def facts_of(bench, **changes):
    config = models.config_of(bench, "14b")
    model = models.build_model(bench, config, "flash", **changes)
    data = models.draw_input(bench, config, [models.grid_of(bench, 37440)])
    loss = models.forward_backward(bench, model, [data]).item()
    return {"loss": loss} | models.gradient_facts(model)


def test_a_wrong_variant_is_seen(monkeypatch):
    """Without the rotation of queries and keys, without the gates, with another attention kernel, not finite."""
    bench = Bench(CPU, toy=True)
    plain = facts_of(bench)
    assert difference_problem(facts_of(bench, recompute="cheap"), plain) == ""
    monkeypatch.setattr("wanloom.model.dit.apply_rope", lambda x, rotation: x)
    assert difference_problem(facts_of(bench), plain)
    monkeypatch.undo()
    monkeypatch.setattr("wanloom.model.dit.add_gated", lambda x, y, gate, layout: x + y)
    assert difference_problem(facts_of(bench), plain)
    assert difference_problem(plain | {"loss": float("nan")}, plain)
    assert "efficient" in kernel_problem(["fmha_cutlassF_bf16_aligned_64x128_rf_sm80"], {"cudnn"})


def test_the_kernel_for_packs_gets_the_lengths_of_the_samples(monkeypatch):
    """Its stand-in attends sample by sample from the running ends it is given."""

    def varlen_attn(q, k, v, q_ends, k_ends, q_longest, k_longest):
        assert q_longest == k_longest == 18 and q_ends.dtype == torch.int32
        parts = [tensor.tensor_split(q_ends.tolist()[1:-1]) for tensor in (q, k, v)]
        done = [scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)) for part in zip(*parts, strict=True)]
        return torch.cat([x.transpose(0, 1) for x in done])

    monkeypatch.setattr(packing, "varlen_attn", varlen_attn)
    bench = Bench(CPU, toy=True)
    model = packing.build(bench)
    data = models.draw_input(bench, model.config, [(1, 2, 3), (3, 2, 3), (1, 2, 3)])
    with torch.no_grad():
        wanted = model(data.pack, data.sigma)
        for block in model.blocks.values():
            block.self_attn.attend = packing.Varlen(data.pack.video_lens, CPU)
        assert distance(model(data.pack, data.sigma), wanted) < 1e-5


def test_padding_and_the_flops_of_a_frozen_model_by_hand():
    assert packing.padded((1, 2, 3, 4, 9, 5)) == [4, 4, 4, 4, 9, 9]
    # published shares: linears 46.7% and their text part 0.1%, attention 53.2%; of a LoRA, 0.84 of a full step
    config = VARIANTS["wan2.1-t2v-14b"].shape
    share = whole.needed_flops(config, 32760, True) / whole.needed_flops(config, 32760, False)
    assert share == pytest.approx(0.84, abs=0.01)


def test_every_case_has_its_own_name_and_grids_are_what_their_names_say():
    bench = Bench(CPU, toy=False)
    bench.on_gpu = True
    cases = [case for phase in script.PHASES.values() for case in phase.cases(bench)]
    assert len({case.name for case in cases}) == len(cases)
    for tokens in models.GRIDS:
        assert models.size_of(bench, tokens) == tokens


def test_mistakes_are_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, message in ((["--phases", "P9", "--toy"], "there is no phase P9"), ([], "there is no GPU")):
        with pytest.raises(SystemExit):
            script.main(words)
        assert message in capsys.readouterr().err
