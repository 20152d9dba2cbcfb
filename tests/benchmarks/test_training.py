"""E1: that both sides train alike, and the benchmark whole."""

import pytest
import torch

from benchmarks import e01_training, tiny_task
from benchmarks.e01_training import BucketRun, Judge, OwnRun, Point, build_theirs, group_samples, reach, shift_levels
from benchmarks.pair import relative
from wanloom.formats.transformer import state_dict_as
from wanloom.objective.flow import sample_sigma

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.manual_seed(0)
    return tiny_task.write_data(tmp_path_factory.mktemp("e01"), e01_training.TOY, dict.fromkeys(e01_training.TOY, 3))


def test_steps_with_the_same_samples_give_the_same_weights(data, monkeypatch):
    """Noise, weighting, clipping, learning rate, AdamW and what decays; a decay so strong that it shows."""
    strong = tiny_task.OPTIMIZER.model_copy(update={"weight_decay": 10.0})
    for module in (tiny_task, e01_training):
        monkeypatch.setattr(module, "OPTIMIZER", strong)
    ours = OwnRun(data, seed=3)
    theirs = BucketRun(data, build_theirs(ours.model), seed=3)
    before = {name: p.detach().clone() for name, p in theirs.model.named_parameters()}
    for _ in range(3):
        batch = ours.next_batch()
        for group in group_samples(batch, True):
            noisy, target, sigma, text = group
            e01_training.add_gradients(theirs.model, noisy, target, sigma, text, batch.num_elements)
        ours.step(batch)
        theirs.update()
    ours.close()
    found = state_dict_as(dict(ours.model.named_parameters()), "diffusers")
    for name, p in theirs.model.named_parameters():
        assert relative(p.detach() - before[name], found[name].detach() - before[name]) < 0.002, name


def test_the_peers_own_step_is_of_one_size_and_of_whole_batches(data):
    theirs = BucketRun(data, build_theirs(tiny_task.WanDiT(tiny_task.CONFIG)), seed=0)
    batches = [next(theirs._batches) for _ in range(4)]
    assert all(len(latents) == len(text) == tiny_task.SAMPLES and text.shape[1] == 512 for latents, text in batches)
    assert {latents.shape[2] for latents, _ in batches[:2]} == {1, 2}  # an epoch has both sizes
    u = torch.rand(100, dtype=torch.float64)
    expected = [sample_sigma(tiny_task.FLOW, (x, 0.5), 16) for x in u.tolist()]
    torch.testing.assert_close(shift_levels(u), torch.tensor(expected, dtype=torch.float64))


def test_the_held_out_loss_is_that_of_training_and_the_same_for_both(data):
    ours = OwnRun(data, seed=0)
    ours.close()
    judge = Judge(data)
    by_tokens, by_samples = judge.losses(ours)
    assert by_tokens == pytest.approx(tiny_task.held_out(ours.model, data), rel=1e-6)
    assert by_samples != by_tokens
    assert judge.losses(BucketRun(data, build_theirs(ours.model), 0)) == (by_tokens, by_samples)


def test_a_loss_is_reached_on_a_straight_line():
    curve = [Point(0.0, 0, 3.0, 9.0), Point(2.0, 16, 2.0, 8.0), Point(4.0, 32, 1.0, 7.0)]
    assert reach(curve, "by_tokens", 1.5) == Point(3.0, 24.0, 1.5, 7.5)
    assert reach(curve, "by_samples", 8.75) == Point(0.5, 4.0, 2.75, 8.75)
    with pytest.raises(ValueError, match="not reached"):
        reach(curve, "by_tokens", 0.5)


def test_a_row_of_the_curves_is_the_mean_of_the_seeds():
    """To a loss of 3, that of the worst: after 2 s and 4 s, and after 4 s and 8 s."""
    fast, slow, slower = ([Point(0.0, 0, 9.0, 9.0), Point(s, int(16 * s), 3.0, 3.0)] for s in (2.0, 4.0, 8.0))
    seconds, *samples = e01_training.rows_of_curves([[fast, slow], [slow, slower]], {}, 1.0)
    assert (list(seconds.ours), list(seconds.theirs)) == ([3.0], [6.0]) and "2.00, 2.00" in seconds.note
    assert all((list(row.ours), list(row.theirs)) == ([48.0], [96.0]) for row in samples)


def test_every_row_is_measured():
    rows = e01_training.measure(toy=True)
    assert [row.unit for row in rows] == ["s", "samples", "samples", "s", "s"]
    assert all(row.claim == "E1" and min(row.ours) > 0 and min(row.theirs) > 0 for row in rows)
    assert "every gradient" in rows[-1].checked
