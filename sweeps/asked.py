"""The runner's side of `sweeps.requests`: what users ask for, put into the study, each request once."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from sweeps.requests import (
    ADD_SEEDS,
    QUEUE_SETTING,
    STOP_TRIAL,
    pending_requests,
    settle_request,
)
from sweeps.waiting import (
    CONTINUES_ATTR,
    REQUEST_ATTR,
    SEED_ATTR,
    asked_setting,
    further_seed,
    seeds_of,
)
from training.paths import SweepPaths, read_json

STOPPED_BY_REQUEST = "stopped by request"


@dataclass
class AskedFor:
    """Requests of one sweep.

    Args:
        study: where trials are queued.
        paths: of the sweep, whose requests these are.
        lock: no other runner of a shared study puts the same ones into it.
    """

    study: optuna.Study
    paths: SweepPaths
    lock: AbstractContextManager[Any] = field(default_factory=nullcontext)
    stopped: set[int] = field(default_factory=set)
    """Trials that are to end at their next evaluation."""
    _changed_ns: int = 0
    """Of the directory, as far as it has been read: asking again costs one call of the system."""

    def take(self, *, again: bool = False) -> bool:
        """Puts new requests into the study; whether there were any.

        Args:
            again: read them though none is new: a trial that was to stop has ended.
        """
        try:
            changed_ns = self.paths.requests.stat().st_mtime_ns
        except OSError:
            return False
        if changed_ns == self._changed_ns and not again:
            return False
        self._changed_ns = changed_ns
        with self.lock:
            requests = pending_requests(self.paths)
            for request in requests:
                try:
                    is_settled = self._is_settled(request)
                except (OSError, ValueError, LookupError, TypeError):
                    # Of a trial that is gone: it would stop every start from now on.
                    is_settled = True
                if is_settled:
                    settle_request(self.paths, request)
        return bool(requests)

    def _is_settled(self, request: dict[str, Any]) -> bool:
        """Does what is asked; False where it has to wait, as a stop does for the trial's evaluation."""
        trials = self.study.get_trials(deepcopy=False)
        asked = [t for t in trials if t.user_attrs.get(REQUEST_ATTR) == request["id"]]
        action = request["action"]
        if action == STOP_TRIAL:
            number = _last_of(trials, request["number"])
            self.stopped.add(number)
            is_over = number >= len(trials) or trials[number].state.is_finished()
            return is_over or self.paths.trial(number).result.is_file()
        if action == ADD_SEEDS:
            for number in request["numbers"]:
                self._add_seeds(trials, number, request, asked)
        if action == QUEUE_SETTING and not asked:
            self.study.add_trial(asked_setting(self.study, request["params"], request["id"]))
        return True

    def _add_seeds(
        self,
        trials: list[FrozenTrial],
        number: int,
        request: dict[str, Any],
        asked: list[FrozenTrial],
    ) -> None:
        """Queues those that a start which was killed in the middle of it has not queued."""
        own = read_json(self.paths.trial(number).config)["settings"]["seed"]
        seeds = [t.user_attrs[SEED_ATTR] for t in seeds_of(trials, number)]
        num_left = request["num_seeds"] - len(seeds_of(asked, number))
        start = max([own, *seeds]) + 1
        for seed in range(start, start + num_left):
            self.study.add_trial(further_seed(trials[number], seed, request["id"]))


def _last_of(trials: list[FrozenTrial], number: int) -> int:
    """The trial, or the one that has taken its place in another process."""
    continued_by = {t.user_attrs.get(CONTINUES_ATTR): t.number for t in trials}
    while number in continued_by:
        number = continued_by[number]
    return number
