"""What a queue of trials is made of: `Trials` gives `Job`s and takes `Outcome`s, `JobOptions` hold for all.

Light to import, so that a command that decides what to train need not load what trains it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from training.config import TrialConfig
from training.paths import TrialPaths
from training.progress import Display
from training.tracking import (
    FINISH_TIMEOUT_S,
    LogModel,
    ReportTo,
    Tracker,
    WandbRun,
    make_tracker,
    wait_for_trackers,
)

if TYPE_CHECKING:
    from training.checkpoint import SavedState

Engine = Literal["packed", "trl"]

STOPPED_IN_WANDB = "stopped in W&B"

Outcome = dict[str, Any] | Exception
"""result.json's content, or the fault that ended the trial."""


@dataclass(kw_only=True)
class Job:
    """One trial to train."""

    config: TrialConfig
    paths: TrialPaths
    info: dict[str, Any] | None = None
    """More for config.json: `number`, `name`, `params`, `retry_of`, `sweep`, `wandb_id`."""
    label: str = ""
    """Stands before its lines on the terminal."""
    state: SavedState | None = None
    """Where it goes on, if it has begun."""
    stages: Path | None = None
    """Directory of the stages that it may fork, and may store; None if it shares none."""
    branches: tuple[int, ...] = ()
    """Steps after which other trials part from it: it is stored there."""
    prefixes: dict[str, int] | None = field(default=None, repr=False, compare=False)
    """`prefix_hash` of each branch, once it has been asked for."""
    stop_reason: str | None = field(default=None, compare=False)
    """Why the trial is to end after its next step; another thread may set it."""

    @property
    def number(self) -> int:
        """The trial's, in its sweep."""
        assert self.info is not None
        return self.info["number"]

    @property
    def name(self) -> str:
        return (self.info or {}).get("name", self.paths.root.name)


class Trials:
    """Where trials come from, and who is told what becomes of them; a pack asks between its steps."""

    def next_job(self) -> Job | None:
        """The next trial to begin; None while there is none. Asked whenever a slot is free."""
        raise NotImplementedError

    def began(self, job: Job, step: int) -> str | None:
        """A trial has its slot and stands after `step` steps; why it ends there, or None."""
        return None

    def evaluated(self, job: Job, step: int, loss: float) -> str | None:
        """A validation loss, at an evaluation before the trial's last; why it ends there, or None."""
        return None

    def leads(self, job: Job, step: int, loss: float) -> bool:
        """Whether no other trial's validation loss at `step` is known to be lower; asked at every evaluation
        where leaders are sampled."""
        return True

    def stored(self, job: Job, step: int) -> None:
        """A stage of the trial's first steps can be forked from now on."""

    def done(self, job: Job, outcome: Outcome) -> None:
        """How a trial has ended. An exception raised here ends the run; the others can go on later."""
        raise NotImplementedError


@dataclass(kw_only=True)
class JobOptions:
    """How trials are run."""

    slots: int = 0
    """Most trials at once; 0 is as many as memory and device make sense of."""
    report_to: ReportTo = "wandb"
    group: str | None = None
    """W&B's group: the sweep's name."""
    project: str = "loraloom"
    entity: str | None = None
    """W&B's user or team; None is the key's own."""
    sweep_id: str | None = None
    """Of the W&B sweep that the trials are runs of."""
    log_model: LogModel = "none"
    """Which adapters are uploaded to W&B."""
    num_samples: int = 0
    """Prompts that a trial answers at evaluations at which it leads; 0 is none."""
    display: Display = field(default_factory=Display)
    """The terminal's view of all trials."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set: save every trial's state and raise KeyboardInterrupt."""
    trackers: list[Tracker] = field(default_factory=list)
    """All that have been opened."""

    def tracker(self, job: Job) -> Tracker:
        """Opens the tracker's run of one trial."""

        def stop() -> None:
            job.stop_reason = STOPPED_IN_WANDB

        run = WandbRun(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=job.name,
            id=(job.info or {}).get("wandb_id"),
            sweep_id=self.sweep_id,
            config=job.config.to_dict(),
            log_model=self.log_model,
        )
        tracker = make_tracker(self.report_to, job.paths.root, run, stop)
        self.trackers.append(tracker)
        return tracker

    def close_trackers(self, timeout_s: float = FINISH_TIMEOUT_S) -> int:
        """Waits until W&B has what it was told; returns the number of runs that it has not taken."""
        left = wait_for_trackers(self.trackers, timeout_s)
        self.trackers.clear()
        if left:
            self.display.console.print(
                f"W&B: {left} runs could not be sent; python -m sweeps.sync sends them later"
            )
        return left
