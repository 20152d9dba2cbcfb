"""What a run shows: a line a record without a terminal, a live one on it."""

import io
import re

from rich.console import Console

from wanloom.train import progress as module
from wanloom.train.progress import ProgressLine, format_seconds


def record(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "lr": 1e-3, "tokens_per_second": 1234.5}


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
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
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
