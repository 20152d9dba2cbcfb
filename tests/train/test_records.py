"""Records survive stops without doubles; TensorBoard reads what is written."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from wanloom.errors import UserError
from wanloom.train.records import Records, read_metrics
from wanloom.train.trackers import TensorBoard


def record(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "loss": loss, "lr": 1e-3, "tokens_per_second": 1234.5}


def test_a_resumed_run_has_every_step_once(tmp_path):
    trackers = Records(tmp_path, 0), TensorBoard(tmp_path, 0)
    for step in range(1, 7):
        for tracker in trackers:
            tracker.write(record(step, step / 10))
    for tracker in trackers:
        tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    trackers = Records(tmp_path, 4), TensorBoard(tmp_path, 4)
    for step in range(5, 8):
        for tracker in trackers:
            tracker.write(record(step, step / 100))
    for tracker in trackers:
        tracker.sync()
        tracker.close()
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
        Records(tmp_path, 3)


def test_a_full_disk_is_a_sentence(tmp_path):
    full = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    records, board = Records(tmp_path, 0), TensorBoard(tmp_path, 0)
    records.close()
    records._jsonl = full
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written: No space left on device"):
        records.write(record(1, 0.5))
    board.close()
    board._file, board._records = full, RecordWriter(full)
    with pytest.raises(UserError, match=r"tfevents.* could not be written: No space left on device"):
        board.write(record(1, 0.5))
    full.close()
