"""Trains a queue of trials, several at once in one pack, each into its own directory.

`run_pack(trials, options)` asks `trials` for a job whenever a slot is free and tells it how each one ended.
After an evaluation a trial's state is saved, so that a killed process loses no more than the steps since
then: the same job again goes on from there. Where steps are fast and states large, that is not after every
one of them: saving takes a tenth of the time at most. A trial begins with the longest stage that is stored
of it, and stores those that others will need. Out of memory, the youngest trial gives up its slot and
continues, from its last step, when another one has ended.
"""

import collections
import contextlib
import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from training.checkpoint import SavedState, capture, load_state, restore, save_state
from training.config import TrialConfig
from training.engine import ENGINE, PackedEngine
from training.evaluate import mean_loss
from training.exceptions import ModelError
from training.fork import fork_trial, save_stage
from training.job import Job, JobOptions, Trials
from training.paths import recover_directory, write_json
from training.planner import check_slots, describe_plan, plan_slots
from training.prepared import Prepared, model_key, prepare
from training.progress import Display
from training.recorder import TrialRecorder, begin_trial, end_with_fault, is_disk_full
from training.samples import Sampler
from training.tracking import Tracker
from training.trial import StepResult, TrialState

_SHORT_SAVE_S = 0.05
"""A state that is saved faster than this is saved after every evaluation."""


def run_pack(trials: Trials, options: JobOptions) -> None:
    """Trains until `trials` has nothing and every slot is empty.

    Args:
        trials: gives jobs and is told of them. An exception that it raises ends the pack: the trials in
            flight keep their state, and the same jobs go on from there.
        options: slots, tracker, terminal.

    Raises:
        KeyboardInterrupt: `options.stop` was set; every trial's state is saved.
    """
    with options.display as display:
        pack = _Pack(trials, options, display)
        try:
            pack.run()
        finally:
            pack.close()


class _TrialsError(Exception):
    """What the queue has raised, and no trial."""

    def __init__(self, error: Exception):
        self.error = error


@dataclass(kw_only=True)
class _Slot:
    """A trial in the pack and all that goes with it."""

    job: Job
    prepared: Prepared
    trial: TrialState
    recorder: TrialRecorder
    tracker: Tracker
    saved: float = 0.0
    """When its state was saved last."""
    save_s: float = 0.0
    """Seconds that this took."""


@dataclass
class _Pack:
    trials: Trials
    options: JobOptions
    display: Display
    slots: list[_Slot] = field(default_factory=list)
    """The oldest trial first."""
    waiting: collections.deque[Job] = field(default_factory=collections.deque)
    """Trials that gave up their slot, or that need another base model than the pack's."""
    engine: PackedEngine | None = None
    model_key: str = ""
    num_slots: int = 0
    base_losses: dict[str, pd.DataFrame] = field(default_factory=dict)
    number: int = 0
    """Of the next adapter."""
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.options.num_samples, self.display.console.print)

    def run(self) -> None:
        while True:
            self._stop_if_asked()
            self._fill()
            if not self.slots:
                if not self.waiting:
                    return
                self._close_engine()  # what waits needs another base model
                continue
            self._step()

    def close(self) -> None:
        """Leaves the trials that are still training as unfinished ones."""
        for slot in self.slots:
            slot.recorder.close()
            slot.tracker.finish({"state": "interrupted"})
        self.slots.clear()
        self._close_engine()

    def _stop_if_asked(self) -> None:
        if not self.options.stop.is_set():
            return
        for slot in self.slots:
            save_state(capture(slot.trial, slot.recorder.record()), slot.job.paths.state)
        raise KeyboardInterrupt

    def _fill(self) -> None:
        """Gives free slots to trials; asks for one more only when it can begin."""
        while not self.num_slots or len(self.slots) < self.num_slots:
            job = self._next()
            if job is None:
                return
            try:
                if not self._admit(job):
                    return
            except _TrialsError as wrapped:
                raise wrapped.error from None
            except Exception as error:
                if is_disk_full(error):
                    raise
                self.trials.done(job, error)
                continue
            slot = self.slots[-1] if self.slots else None
            if slot is not None and slot.job is job and slot.trial.step:
                # What its process was stopped before; or all of its steps are a stage's.
                self._guard(slot, lambda slot=slot: self._after_step(slot))

    def _next(self) -> Job | None:
        for job in self.waiting:
            if not self.slots or model_key(job.config) == self.model_key:
                self.waiting.remove(job)
                return job
        # One trial of another base model waits until the pack is empty; more would only pile up.
        job = None if self.waiting and self.model_key else self.trials.next_job()
        if job is not None and self.slots and model_key(job.config) != self.model_key:
            self.waiting.append(job)
            return None
        return job

    def _admit(self, job: Job) -> bool:
        """Gives the trial a slot, or its end if what it takes over decides it.

        Returns:
            False if memory has no slot for it: it waits.
        """
        state = job.state or _saved(job)
        if state is None:
            shutil.rmtree(job.paths.root, ignore_errors=True)  # what a killed process had begun
        begin_trial(job.config, job.paths, job.info, ENGINE)
        tracker: Tracker | None = None
        trial: TrialState | None = None
        try:
            prepared = prepare(job.config)
            if state is None and job.stages is not None:
                state = fork_trial(job.config, prepared.content, job.paths, job.stages)
            engine = self._engine(prepared, job.config)
            reason = self._ask(self.trials.began, job, state.step if state else 0)
            if reason is not None:
                self._end_at_once(job, prepared, state, reason)
                return True
            self.number += 1
            trial = engine.admit(job.config, prepared.train, f"trial{self.number}")
            if state is not None:
                restore(trial, state)
            tracker = self.options.tracker(job)
            recorder = TrialRecorder(
                job.paths,
                tracker,
                self.display.add(job.label, job.config.max_steps),
                self._base_losses(prepared),
                state.record if state else None,
            )
        except _TrialsError:
            raise
        except BaseException as error:
            if trial is not None:
                with contextlib.suppress(ValueError):  # it may not have come as far as that
                    self.engine.retire(trial)  # pyright: ignore[reportOptionalMemberAccess]
            if isinstance(error, torch.OutOfMemoryError) and self.slots:
                self._give_up_slot(job, len(self.slots) + 1)
                if tracker is not None:
                    tracker.finish({"state": "interrupted"})
                return False
            end_with_fault(error, job.paths, tracker)
            raise
        self.slots.append(
            _Slot(job=job, prepared=prepared, trial=trial, recorder=recorder, tracker=tracker)
        )
        return True

    def _engine(self, prepared: Prepared, config: TrialConfig) -> PackedEngine:
        if self.engine is not None and self.model_key != prepared.model_key:
            self._close_engine()
        if self.engine is None:
            self.engine = PackedEngine(prepared.model)
            self.model_key = prepared.model_key
            plan = plan_slots(self.engine, config, prepared.train)
            check_slots(plan, self.options.slots)
            self.num_slots = self.options.slots or plan.slots
            self.display.console.print(f"  {describe_plan(plan, self.num_slots)}")
        return self.engine

    def _close_engine(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine, self.model_key, self.num_slots = None, "", 0
        self.base_losses.clear()

    def _base_losses(self, prepared: Prepared) -> pd.DataFrame:
        key = prepared.data_key
        if key not in self.base_losses:
            assert self.engine is not None
            self.base_losses[key] = self.engine.evaluate(None, prepared.validation)
        return self.base_losses[key]

    def _step(self) -> None:
        assert self.engine is not None
        started = time.perf_counter()
        num_tokens = {id(slot.trial): slot.trial.num_tokens for slot in self.slots}
        try:
            results = self.engine.step()
        except torch.OutOfMemoryError as error:
            self._shrink(error)
            return
        time_s = time.perf_counter() - started
        taken = {id(trial): result for trial, result in results}
        for slot in self.slots:
            result = taken.get(id(slot.trial))
            after = result.num_tokens if result else slot.trial.num_tokens
            num_tokens[id(slot.trial)] = after - num_tokens[id(slot.trial)]
        total = sum(num_tokens.values())
        for slot in list(self.slots):
            # The pack's time is shared out by tokens: the trials' times add up to the pack's.
            slot.recorder.train_time_s += time_s * num_tokens[id(slot.trial)] / total
            result = taken.get(id(slot.trial))
            if result is not None:
                self._guard(slot, lambda slot=slot, result=result: self._log(slot, result, time_s))
        for slot in list(self.slots):
            if self.options.stop.is_set():
                return  # what is due then is done when the trial goes on
            if id(slot.trial) in taken:
                self._guard(slot, lambda slot=slot: self._after_step(slot))

    def _log(self, slot: _Slot, result: StepResult, time_s: float) -> None:
        slot.recorder.log_step(
            result.step,
            train_loss=result.train_loss,
            learning_rate=result.learning_rate,
            num_tokens=result.num_tokens,
            step_time_s=time_s,
            grad_norm=result.grad_norm,
        )
        if not math.isfinite(result.train_loss):
            self._end(slot, "failed", f"train/loss is {result.train_loss} at step {result.step}")

    def _after_step(self, slot: _Slot) -> None:
        """Evaluates and stores where that is due, and ends the trial where it ends."""
        job, trial, recorder = slot.job, slot.trial, slot.recorder
        if job.stop_reason is not None and not trial.is_done:
            self._prune(slot, job.stop_reason)
            return
        is_due = trial.step % job.config.eval_steps == 0 and recorder.last_eval_step != trial.step
        if is_due and not self._evaluate(slot):
            return
        if trial.step in job.branches and trial.step > recorder.steps_saved:
            self._store(slot)
        if trial.is_done:
            # Its last evaluation is no other trial's, so it comes after the stage.
            if recorder.last_eval_step == trial.step or self._evaluate(slot):
                self._end(slot, "complete")
            return
        if is_due:
            self._save(slot)
            assert recorder.last_loss is not None
            reason = self._ask(self.trials.evaluated, job, trial.step, recorder.last_loss)
            if reason is not None:
                self._prune(slot, reason)

    def _save(self, slot: _Slot) -> None:
        """Keeps the trial's state for the process that may have to go on with it."""
        started = time.monotonic()
        if slot.save_s > _SHORT_SAVE_S and started - slot.saved < 10 * slot.save_s * len(
            self.slots
        ):
            return
        save_state(capture(slot.trial, slot.recorder.record()), slot.job.paths.state)
        slot.saved = time.monotonic()
        slot.save_s = slot.saved - started

    def _prune(self, slot: _Slot, reason: str) -> None:
        if any(step > slot.trial.step for step in slot.job.branches):
            self._store(slot)  # for those that wait for more of it
        self._end(slot, "pruned", reason)

    def _store(self, slot: _Slot) -> None:
        job = slot.job
        if job.stages is not None:
            state = capture(slot.trial, slot.recorder.record())
            save_stage(state, job.config, slot.prepared.content, job.paths, job.stages)
            self._ask(self.trials.stored, job, state.step)

    def _evaluate(self, slot: _Slot) -> bool:
        """Whether the validation loss is finite; if not, the trial has ended."""
        assert self.engine is not None
        started = time.perf_counter()
        lora, name = self.engine.lora, slot.trial.adapter.name
        losses = self.engine.evaluate(slot.trial, slot.prepared.validation)
        slot.recorder.train_time_s += time.perf_counter() - started
        slot.recorder.log_eval(slot.trial.step, losses, lambda path: lora.save(name, path))
        loss = mean_loss(losses)
        if not math.isfinite(loss):
            self._end(slot, "failed", f"eval/loss is not finite at step {slot.trial.step}")
            return False
        if self.options.num_samples:
            self._sample(slot, loss)
        return True

    def _sample(self, slot: _Slot, loss: float) -> None:
        """Lets the trial answer the fixed prompts, if it leads. That is not its training's time."""
        assert self.engine is not None
        if self._ask(self.trials.leads, slot.job, slot.trial.step, loss):
            opened = self.engine.unpacked(slot.trial)
            self.sampler.write(slot.job, slot.prepared, slot.trial.step, opened)

    def _end(self, slot: _Slot, state: str, reason: str | None = None) -> None:
        """Writes the result; the slot is free for another trial."""
        result = slot.recorder.result(state, reason)
        self._leave(slot)
        self._tell_end(slot.job, slot.prepared, slot.tracker, result)

    def _end_at_once(
        self, job: Job, prepared: Prepared, state: SavedState | None, reason: str
    ) -> None:
        """Ends a trial as pruned by the evaluations that it takes over, without a slot and its memory."""
        base_losses = self._base_losses(prepared)
        if state and job.stages is not None and any(step > state.step for step in job.branches):
            save_stage(state, job.config, prepared.content, job.paths, job.stages)
            self._ask(self.trials.stored, job, state.step)  # for those that wait for more of it
        # Only now, since what may fail above would leave the tracker's run without its end.
        tracker = self.options.tracker(job)
        progress = self.display.add(job.label, job.config.max_steps)
        record = state.record if state else None
        recorder = TrialRecorder(job.paths, tracker, progress, base_losses, record)
        result = recorder.result("pruned", reason)
        recorder.close()
        self._tell_end(job, prepared, tracker, result)

    def _tell_end(
        self, job: Job, prepared: Prepared, tracker: Tracker, result: dict[str, Any]
    ) -> None:
        result = {**result, **prepared.splits.hashes}
        write_json(job.paths.result, result)
        shutil.rmtree(job.paths.state, ignore_errors=True)
        tracker.finish(result)
        self._ask(self.trials.done, job, result)

    def _ask(self, question: Callable[..., Any], *args: Any) -> Any:
        """What goes wrong in the answer is no fault of the trial's."""
        try:
            return question(*args)
        except Exception as error:
            raise _TrialsError(error) from error

    def _guard(self, slot: _Slot, work: Callable[[], None]) -> None:
        """A fault that is one trial's own ends that trial, and its pack-mates go on."""
        try:
            work()
        except _TrialsError as wrapped:
            raise wrapped.error from None
        except Exception as error:
            if slot not in self.slots or is_disk_full(error):
                raise  # it came from `trials`, or every trial would meet it
            self._fail(slot, error)

    def _fail(self, slot: _Slot, error: Exception) -> None:
        self._leave(slot)
        end_with_fault(error, slot.job.paths, slot.tracker)
        self.trials.done(slot.job, error)

    def _leave(self, slot: _Slot) -> None:
        assert self.engine is not None
        self.slots.remove(slot)
        slot.recorder.close()
        self.engine.retire(slot.trial)

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        """Takes the youngest trial out of the pack; it waits for a slot with its state."""
        torch.cuda.empty_cache()
        youngest = self.slots[-1]
        if len(self.slots) == 1:
            reason = (
                "out of memory with one trial: lower per_device_train_batch_size or max_length, or set "
                "gradient_checkpointing or load_in_4bit"
            )
            fault = ModelError(reason)
            fault.__cause__ = error
            self._fail(youngest, fault)
            return
        job = youngest.job
        job.state = capture(youngest.trial, youngest.recorder.record())
        save_state(job.state, job.paths.state)  # it may wait for long
        self._give_up_slot(job, len(self.slots))
        self._leave(youngest)
        youngest.tracker.finish({"state": "interrupted"})

    def _give_up_slot(self, job: Job, num: int) -> None:
        """The pack of `num` trials goes on with one fewer; this one waits until another has ended."""
        self.num_slots = num - 1
        warnings.warn(
            f"out of memory with {num} trials: going on with {self.num_slots}",
            RuntimeWarning,
            stacklevel=2,
        )
        self.waiting.appendleft(job)


def _saved(job: Job) -> SavedState | None:
    """The state that an earlier process left, if it is of these settings."""
    recover_directory(job.paths.state)
    state = load_state(job.paths.state)
    return state if state is not None and state.settings == job.config.to_dict() else None
