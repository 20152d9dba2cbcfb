"""The training loop: steps until the last one, a checkpoint now and then, a clean end whatever happens.

In: everything as arguments: model, optimizer, batches, trackers, and routines such as the held-out loss. Out:
checkpoints, records, and how the run ended. The one decision: the state of a run is the tensors and a handful of
numbers, all in the checkpoint; nothing else is remembered, so a resumed run is the same run. SIGTERM and SIGINT let the
current step finish, save and leave.
"""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from wanloom.checkpoint.writer import Checkpointer
from wanloom.dist import gather, highest, is_lost, rank, together, world_size
from wanloom.errors import UserError, sentence_of
from wanloom.memory import out_of, short_of
from wanloom.model.dit import WanDiT
from wanloom.objective.settings import FlowConfig
from wanloom.parallel.mesh import Mesh
from wanloom.signals import StopSignal
from wanloom.train.ema import Ema
from wanloom.train.optim import AdamW, learning_rate
from wanloom.train.peaks import peak_memory_gib
from wanloom.train.progress import ProgressLine
from wanloom.train.settings import LogConfig, ScheduleConfig, TrainConfig
from wanloom.train.step import Batch, NonFiniteError, StepResult, train_step
from wanloom.train.trackers import Tracker

OUTPUT_CLOSED, SAVE_FAILED = 2**8, 2**16  # among numbers of signals
TRIED = 10  # steps after the first, from which the end of the run is told
NAMED_KEYS = 16  # samples named in the error; the file beside it has them all


@dataclass
class RunState:
    """The numbers of a run at a step; all of them go into the checkpoint."""

    step: int = 0  # steps done; the next one starts at position step * batch.samples of the data
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, over all starts
    window: dict[str, float] = field(default_factory=dict)  # sums since the last record


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    model: WanDiT
    trained: Mapping[str, nn.Parameter]  # those that are learned, by name; the others have no gradient
    mesh: Mesh
    optimizer: AdamW
    ema: Ema | None
    facts: Mapping[str, Any]  # stored in every checkpoint: model, versions, fingerprint of the data
    recipe: str  # run.yaml

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the run has made, by its name in a checkpoint; not copies, so they can be filled too."""
        named = {f"model.{name}": p.detach() for name, p in self.trained.items()}
        named |= {f"optimizer.{name}": t for name, t in self.optimizer.state().items()}
        return named | ({f"ema.{name}": t for name, t in self.ema.tensors().items()} if self.ema else {})


class Routine(NamedTuple):
    """What is done every so many steps, by all ranks together; its numbers go into the record of the step."""

    every: int
    call: Callable[[int], Mapping[str, float]]  # of the steps that are done


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know."""

    train: TrainConfig
    lr: float
    schedule: ScheduleConfig
    flow: FlowConfig
    clip_norm: float | None
    log: LogConfig
    peak_tflops: float | None = None  # of a GPU of the run; without it there is no MFU
    helps: Sequence[str] = ()  # which settings take less memory, the best first


@dataclass
class Trainer:
    """One run, from its state to its last step."""

    parts: Parts
    settings: Settings
    state: RunState
    batches: Iterable[Batch]
    checkpointer: Checkpointer
    trackers: Sequence[Tracker]  # of the first rank; the others have none
    progress: ProgressLine
    routines: Sequence[Routine] = ()

    def run(self) -> signal.Signals | None:
        """Take the steps that are left. Returns the signal that stopped the run, or None at its end.

        Raises UserError, the same on every rank, when a loss or gradient is not finite, when the disk is full, when
        what it says can no longer be printed, and whatever `batches` raises; in each case the save in the background is
        finished first, and all but the first two save the last step before. Not when a rank is lost.
        """
        lost = False
        try:
            with self.progress, StopSignal("this step and saving") as stop:
                self.checkpointer.prepare(self.parts.tensors())
                self._tick = self._saved = time.monotonic()
                self._first = self.state.step + 1, 0.0  # the first step of this start, and the seconds up to its end
                return self._steps(iter(self.batches), stop)
        except RuntimeError as error:
            lost = is_lost(error)
            raise
        finally:
            self.checkpointer.close(wait=not lost)
            for tracker in self.trackers:
                tracker.close()

    def _steps(self, batches: Iterator[Batch], stop: StopSignal) -> signal.Signals | None:
        while self.state.step < self.settings.train.steps:
            with self._saved_before_the_end(), together():
                batch = next(batches)
            self._count(batch, self._update(batch))
            # the ranks hear of these at different times
            wish = stop.received or (OUTPUT_CLOSED if self.progress.closed else 0)
            wish = SAVE_FAILED if self.checkpointer.failed else wish
            wish, is_due = divmod(highest(2 * wish + self._is_due()), 2)  # in one exchange
            with self._saved_before_the_end():
                record = self._record()
                with together():
                    self._report(record)
            if wish == SAVE_FAILED:
                self.checkpointer.wait()
            ends = self.state.step == self.settings.train.steps or wish
            if ends or is_due or self.state.step % self.checkpointer.config.every == 0:
                with self._saved_before_the_end(), together():
                    for tracker in self.trackers:
                        tracker.sync()
                self._save()
            if ends:
                self.checkpointer.wait()
                return self._leave(wish)
        return None

    def _is_due(self) -> bool:
        """Whether `checkpoint.minutes` have gone by since the last save, or the start."""
        minutes = self.checkpointer.config.minutes
        return minutes is not None and time.monotonic() - self._saved > 60 * minutes

    def _leave(self, wish: int) -> signal.Signals | None:
        """How the run ends, now that all is saved."""
        if wish != OUTPUT_CLOSED:
            return signal.Signals(wish) if wish else None
        reason = gather(self.progress.closed and self.progress.closed.strerror)
        raise UserError(
            f"What the run says could no longer be printed ({next(filter(None, reason))}), so it saved step "
            f"{self.state.step} and ended. The same command goes on; to need no reader, send it to a file: > train.log"
        )

    @contextmanager
    def _saved_before_the_end(self) -> Iterator[None]:
        """A mistake in the block, the same on all ranks, ends the run; what was learned is saved before."""
        try:
            yield
        except (UserError, OSError) as error:
            raise UserError(f"{sentence_of(error)} {self._keep()}") from error
        except (MemoryError, RuntimeError) as error:
            if (told := self._explain_memory(error)) is None:
                raise
            raise told from error

    def _explain_memory(self, error: MemoryError | RuntimeError) -> UserError | None:
        """What to tell when memory runs out before the optimizer's step; the weights are whole then, and saved.

        Of several ranks the others do not know of it, and wait for this one: nothing can be saved. None for any other
        error.
        """
        where = out_of(error)
        if where is None:
            return None
        for param in self.parts.trained.values():
            param.grad = None
        kept = self._keep() if world_size() == 1 else self.checkpointer.describe_last()
        return UserError(f"{short_of(where, f'take step {self.state.step + 1}', self.settings.helps)} {kept}")

    def _keep(self) -> str:
        """Save the last step, if that can be done; returns what to tell of it."""
        with suppress(UserError):  # of a save that failed in the background; this one may go well
            self.checkpointer.wait()
        if self.state.step in (0, self.checkpointer.last_step):
            return self.checkpointer.describe_last()
        try:
            self._save()
            self.checkpointer.wait()
        except UserError as error:
            return str(error)
        return f"Step {self.state.step} was saved before the run ended: {self.checkpointer.last}."

    def _update(self, batch: Batch) -> StepResult:
        parts, settings, done = self.parts, self.settings, self.state.step
        try:
            result = train_step(parts.model, parts.trained, parts.mesh, batch, settings.flow, settings.clip_norm)
        except NonFiniteError as error:
            self.checkpointer.wait()
            raise self._explain(error) from error
        except (MemoryError, RuntimeError) as error:
            if (told := self._explain_memory(error)) is None:
                raise
            raise told from error
        parts.optimizer.step(self._learning_rate(done))
        if parts.ema is not None:
            parts.ema.update(done)
        return result

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self.settings.schedule, self.settings.lr, step, self.settings.train.steps)

    def _count(self, batch: Batch, result: StepResult) -> None:
        """Book a finished step in the state."""
        state, totals, now = self.state, batch.totals, time.monotonic()
        seconds, self._tick = now - self._tick, now
        state.step += 1
        state.samples += totals.num_samples
        state.tokens += totals.num_tokens
        state.seconds += seconds
        sums = {
            "steps": 1,
            "loss": result.loss,
            "weighted_loss": result.weighted_loss,
            "grad_norm": result.grad_norm,
            "packing_efficiency": totals.efficiency,
            "balance": totals.balance,
            "tokens": totals.num_tokens,
            "flops": totals.flops,
            "seconds": seconds,
        }
        state.window = {key: state.window.get(key, 0) + value for key, value in sums.items()}

    def _record(self) -> dict[str, float] | None:
        """The record of the steps since the last one, when one is due; every rank makes it."""
        state, log = self.state, self.settings.log
        due = [routine for routine in self.routines if state.step % routine.every == 0]
        last = state.step == self.settings.train.steps
        # not at a stop: its records would differ from those of a run that was not stopped
        if not (last or due or state.step % log.every == 0):
            return None
        # a sample that cannot be read ends the run here, and the window is saved with it
        numbers = {name: value for routine in due for name, value in routine.call(state.step).items()}
        sums, state.window = state.window, {}
        record: dict[str, float] = {"step": state.step}
        means = ("loss", "weighted_loss", "grad_norm", "packing_efficiency", "balance")
        record |= {k: sums[k] / sums["steps"] for k in means}
        record |= {
            "lr": self._learning_rate(state.step - 1),
            "samples": state.samples,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_second": sums["tokens"] / sums["seconds"],
            "model_tflops_per_gpu": sums["flops"] / sums["seconds"] / 1e12 / world_size(),
            "peak_memory_gib": max(gather(peak_memory_gib(self.parts.mesh.device))),
        }
        if self.settings.peak_tflops:
            record["mfu"] = record["model_tflops_per_gpu"] / self.settings.peak_tflops
        if due:
            self._tick = time.monotonic()  # not part of the speed
        return record | numbers

    def _report(self, record: dict[str, float] | None) -> None:
        self.progress.advance(self.state.step)
        first, seconds = self._first
        if self.state.step == first:  # which compiles, and fills what is read ahead
            self._first = first, self.state.seconds
        elif self.state.step == first + TRIED:
            a_step, left = (self.state.seconds - seconds) / TRIED, self.settings.train.steps - self.state.step
            every = self.checkpointer.config.every
            self.progress.say_end(a_step, left, every - self.state.step % every)
        if record is not None:
            for tracker in self.trackers:
                tracker.write(record)
            self.progress.show(record)

    def _save(self) -> None:
        self._saved = time.monotonic()
        state = {**asdict(self.state), **self.parts.facts}
        self.checkpointer.save(self.state.step, self.parts.tensors(), state, self.parts.recipe)

    def _explain(self, error: NonFiniteError) -> UserError:
        """What to tell when a step went wrong: whether by its weights, its samples, or by what it computes of them."""
        begin = f"The {error.what} of step {error.step + 1} is not finite"
        unchanged = "The weights were not changed by this step."
        last = self.checkpointer.describe_last()
        if error.weights:
            return UserError(
                f"{begin}, because {len(error.weights)} of the model's weights were not before it, such as "
                f"{error.weights[0]}: the samples are not the cause. {last} Go on from a checkpoint before the loss "
                "rose, with a lower optimizer.lr or clip_norm."
            )
        if error.samples:
            return UserError(
                f"{begin}, because the latents or text states of these samples are not: "
                f"{self._list(error.samples, error)}. The weights are not the cause. {unchanged} {last} Prepare these "
                "samples again, or leave them out."
            )
        return UserError(
            f"{begin}, with the samples {self._list(error.keys, error)}. Weights and samples are finite: it is the "
            f"computing that overflows. {unchanged} {last} Lower optimizer.lr or clip_norm, or use "
            "compute.precision=fp32."
        )

    def _list(self, names: Sequence[str], error: NonFiniteError) -> str:
        """The names of samples; all of them go to a file when they are many."""
        listed = ", ".join(names[:NAMED_KEYS])
        if len(names) <= NAMED_KEYS:
            return listed
        path = self.checkpointer.run_dir / f"not_finite_step_{error.step + 1}.txt"
        if rank() == 0:
            path.write_text("\n".join(names) + "\n")
        return f"{listed} and {len(names) - NAMED_KEYS} more, all in {path}"
