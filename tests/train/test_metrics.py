"""Records survive stops without doubles; TensorBoard reads what is written."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wanloom.errors import UserError
from wanloom.train.metrics import Metrics, ProgressLine, format_seconds, read_metrics


def record(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "lr": 1e-3, "tokens_per_second": 1234.5}


def test_a_resumed_run_has_every_step_once(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 7):
        metrics.write(record(step, step / 10))
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    metrics = Metrics(tmp_path, 4)
    for step in range(5, 8):
        metrics.write(record(step, step / 100))
    metrics.sync()
    metrics.close()
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in found[3:]] == [(4, 0.4), (5, 0.05), (6, 0.06), (7, 0.07)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(e.step, round(e.value, 6)) for e in events.Scalars("loss")]
    assert shown == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.05), (6, 0.06), (7, 0.07)]


@pytest.mark.parametrize(
    "line", ["garbage{", "[1]", '{"step": "2"}', '{"step": 2, "loss": null}', '{"loss": 1}', "\0\0\0\0", "\xff"]
)
def test_a_damaged_record_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"Line 2 of .*metrics.jsonl is damaged: delete the line"):
        Metrics(tmp_path, 3)


def test_a_full_disk_is_a_sentence(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics._jsonl.close()
    metrics._jsonl = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written: No space left on device"):
        metrics.write(record(1, 0.5))
    metrics.close()


def test_without_a_terminal_there_is_a_line_per_record():
    out = io.StringIO()
    with ProgressLine(10, 30, Console(file=out, width=200)) as progress:
        progress.advance(20)
        progress.show(record(20, 0.25) | {"val_loss": 0.5})
    assert out.getvalue().startswith("step 20/30  loss 0.2500  lr 1.00e-03  1,234 tokens/s  val loss 0.5000  0:00 left")


def test_the_balance_is_shown_where_ranks_can_wait_for_each_other():
    for ranks in (1, 8):
        out = io.StringIO()
        with ProgressLine(10, 30, Console(file=out, width=200), ranks) as progress:
            progress.show(record(20, 0.25) | {"balance": 1.034})
        assert ("tokens/s  balance 1.03  0:00 left" in out.getvalue()) == (ranks > 1)


def test_the_speed_is_shown_where_it_can_be_compared():
    out = io.StringIO()
    with ProgressLine(10, 30, Console(file=out, width=200)) as progress:
        progress.show(record(20, 0.25) | {"model_tflops_per_gpu": 325.77, "mfu": 325.77 / 989})
        progress.show(record(30, 0.25) | {"model_tflops_per_gpu": 0.01})
    first, second = out.getvalue().splitlines()
    assert "1,234 tokens/s  326 TFLOP/s per GPU, MFU 32.9%  " in first and "TFLOP" not in second


def test_the_time_left_is_at_the_speed_of_now_and_not_of_a_slow_start(monkeypatch):
    clock = iter([0.0, 1000.0, 1010.0])  # the start, step 10 after a stall, step 20
    monkeypatch.setattr("wanloom.train.metrics.time.monotonic", lambda: next(clock))
    out = io.StringIO()
    with ProgressLine(0, 120, Console(file=out, width=200)) as progress:
        progress.show(record(10, 0.5))
        progress.show(record(20, 0.5))
    assert out.getvalue().splitlines()[-1].endswith("1:40 left")


def test_on_a_terminal_the_line_is_live():
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, highlight=False)
    with ProgressLine(0, 30, console) as progress:
        progress.advance(20)
        progress.show(record(20, 0.25))
        progress.say("[not markup] a message")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "20/30" in shown and "loss 0.2500" in shown and "[not markup] a message" in shown


def test_seconds_read_well():
    assert [format_seconds(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]


def test_on_a_terminal_held_out_losses_and_the_last_one_stay_in_view():
    out = io.StringIO()
    with ProgressLine(0, 30, Console(file=out, width=120, force_terminal=True, highlight=False)) as progress:
        progress.show(record(10, 0.75))
        progress.show(record(20, 0.25) | {"val_loss": 0.5})
        progress.show(record(30, 0.125))
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n").splitlines()
    kept = [line for line in lines if line.startswith("step ") and "tokens/s" in line and "\u2501" not in line]
    assert [line.split()[1] for line in kept] == ["20/30", "30/30"] and kept[0].endswith("val loss 0.5000")


def test_the_end_of_a_run_is_told_from_the_time_of_a_step():
    out = io.StringIO()
    progress = ProgressLine(0, 1000, Console(file=out, width=200))
    progress.say_end(2.0, 989, 489)
    progress.say_end(2.0, 989, 2000)
    first, second = out.getvalue().splitlines()
    assert first.startswith("A step takes 2 s: the run ends in about 32:58 (") and first.endswith(
        "; it saves in 16:18."
    )
    assert "saves" not in second
