"""Who leads a sweep at a step: the trial with the lowest held-out loss there so far. Leaders are sampled."""

import math

from sweeps.ledger import METRIC, read_sweep
from training.paths import SweepPaths


class Leaders:
    """The lowest held-out loss at every step. Where several machines train one sweep, each knows those
    that were there at its first question, and its own.

    Args:
        paths: the sweep's directory, read once, at the first question.
    """

    def __init__(self, paths: SweepPaths):
        self.paths = paths
        self.lowest: dict[int, float] | None = None

    def takes_lead(self, step: int, loss: float) -> bool:
        """Whether no trial's loss at `step` is lower; this one is remembered."""
        if self.lowest is None:
            self.lowest = {}
            for trial in read_sweep(self.paths.root).all_trials:
                for line in trial.metrics():
                    if line.get(METRIC) is not None:
                        self._add(line["step"], line[METRIC])
        self._add(step, loss)
        return loss <= self.lowest[step]

    def _add(self, step: int, loss: float) -> None:
        assert self.lowest is not None
        self.lowest[step] = min(loss, self.lowest.get(step, math.inf))
