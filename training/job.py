"""What a queue of trials is made of: a `Job` goes in, an `Outcome` comes out, `JobOptions` hold for all.

Light to import, so that a command that decides what to train need not load what trains it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from training.config import TrialConfig
from training.paths import TrialPaths
from training.progress import Display
from training.tracking import ReportTo, Tracker, make_tracker

if TYPE_CHECKING:
    from training.checkpoint import SavedState

Engine = Literal["packed", "trl"]

Outcome = dict[str, Any] | Exception
"""result.json's content, or the fault that ended the trial."""


@dataclass(kw_only=True)
class Job:
    """One trial to train."""

    config: TrialConfig
    paths: TrialPaths
    info: dict[str, Any] | None = None
    """More for config.json: `number`, `name`, `params`, `retry_of`, `sweep`."""
    label: str = ""
    """Stands before its lines on the terminal."""
    state: SavedState | None = None
    """Where it goes on, if it has begun."""

    @property
    def name(self) -> str:
        return (self.info or {}).get("name", self.paths.root.name)


@dataclass(kw_only=True)
class JobOptions:
    """How trials are run."""

    slots: int = 0
    """Most trials at once; 0 is as many as memory and device make sense of."""
    report_to: ReportTo = "wandb"
    group: str | None = None
    """W&B's group: the sweep's name."""
    project: str = "loraloom"
    display: Display = field(default_factory=Display)
    """The terminal's view of all trials."""

    def tracker(self, job: Job) -> Tracker:
        """Opens the tracker's run of one trial."""
        return make_tracker(
            self.report_to,
            job.paths.root,
            group=self.group,
            name=job.name,
            config=job.config.to_dict(),
            project=self.project,
        )
