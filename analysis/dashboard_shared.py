"""Whose the steps are that several trials have in their metrics, because they began with the same stage."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.lines import STEP, TIME, TRAIN
from analysis.live import LiveTrial


def drawn_from(trials: Sequence[LiveTrial]) -> list[float]:
    """Step after which each trial has steps that no other of `trials` draws.

    A fork's metrics begin with the very lines of the trial that it was forked from, times included. They
    belong to whoever began first; if that one is not among `trials`, to the first of its forks.
    """
    rows = [_train_rows(trial) for trial in trials]
    first = [0.0] * len(trials)
    groups: dict[Any, list[np.ndarray]] = {}
    for index in sorted(range(len(trials)), key=lambda i: _began_s(trials[i])):
        trial, mine = trials[index], rows[index]
        if not len(mine):
            continue
        group = groups.setdefault((mine[0, TIME], mine[0, TRAIN]), [])
        saved = trial.steps_saved
        limit = len(mine) if saved is None else int(np.searchsorted(mine[:, STEP], saved, "right"))
        num_same = 0
        for theirs in group if limit else ():
            num_same = max(num_same, _num_same(mine[:limit], theirs))
            if num_same == limit:
                break
        if num_same:
            first[index] = float(mine[num_same - 1, STEP])
        group.append(mine)
    return first


def _train_rows(trial: LiveTrial) -> np.ndarray:
    return trial.metrics.series(TRAIN)


def _began_s(trial: LiveTrial) -> float:
    """When the trial trained its first own step; while it does not say which that is, when it began."""
    if trial.steps_saved is None:
        return trial.began_s
    rows = trial.metrics.series(TRAIN)
    own = rows[int(np.searchsorted(rows[:, STEP], trial.steps_saved, "right")) :]
    return float(own[0, TIME]) if len(own) else np.inf


def _num_same(mine: np.ndarray, theirs: np.ndarray) -> int:
    """Rows at the start that are the same, by bisection: no row's time comes again elsewhere."""
    low, high = 0, min(len(mine), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        mine_there, theirs_there = mine[middle - 1], theirs[middle - 1]
        if mine_there[TIME] == theirs_there[TIME] and mine_there[TRAIN] == theirs_there[TRAIN]:
            low = middle
        else:
            high = middle - 1
    return low
