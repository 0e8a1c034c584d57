"""One study in a database that several `sweeps.run` share, each on its own machine: `--storage URL`.

The trials' files are in one directory that all of them see. A file lock there makes decisions one at a
time; Optuna's heartbeats in the database tell whose process lives. A trial whose process is gone is told as
failed and goes on as another one, from its files, in whichever runner asks first: so each is told exactly
once, and a machine that was only slow finds its trial taken.
"""

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState

from sweeps.directory import is_alive
from training.paths import SweepPaths

HEARTBEAT_S = 20
GRACE_S = 120
"""Without a heartbeat for so long, a trial's process counts as gone."""
ORPHANS_END_S = 30.0
"""Workers whose runner was killed have so long to save their trials, before those go on elsewhere."""
LOOK_S = 5.0
"""Between two looks at what became of other runners' trials."""
_OWNER_ATTR = "owner"


class SharedStudy:
    """What the runners of a shared study keep from each other.

    Args:
        study: in a database, with heartbeats.
        paths: the directory of the sweep, the same for all runners.
    """

    def __init__(self, study: optuna.Study, paths: SweepPaths):
        self.study = study
        self.lock = FileLock(paths.decision_lock)
        self._held: dict[int, int] = {}
        """Number -> Optuna's id of the trials of this process."""
        self._seen_s = -LOOK_S
        self._dead_since_s: dict[int, float] = {}
        """Number -> when its process, on this machine, was first seen to have ended."""
        self._ended = threading.Event()

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Tells the database every `HEARTBEAT_S` seconds that this process lives."""
        thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def ask(self) -> optuna.Trial:
        """`Study.ask`, without its warning that only `Study.optimize` has heartbeats: `beating` has them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Heartbeat of storage")
            return self.study.ask()

    def hold(self, number: int) -> None:
        """The trial is this process's, from now on."""
        trial_id = self._frozen(number)._trial_id
        self._record(trial_id)
        self.study._storage.set_trial_user_attr(trial_id, _OWNER_ATTR, _this_process())
        self._held[number] = trial_id

    def release(self, number: int) -> None:
        self._held.pop(number, None)

    @property
    def held(self) -> list[int]:
        """Numbers of this process's trials that have not ended."""
        return list(self._held)

    def keeps(self, number: int) -> bool:
        """Whether the trial is still this process's: others take it after `GRACE_S` seconds of silence."""
        return not self._frozen(number).state.is_finished()

    def others_train(self) -> bool:
        """Whether a trial is in flight elsewhere: if its process is lost, it goes on here."""
        running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        return any(trial.number not in self._held for trial in running)

    def is_due(self) -> bool:
        """Whether it is time to look at other runners' trials."""
        if time.monotonic() - self._seen_s < LOOK_S:
            return False
        self._seen_s = time.monotonic()
        return True

    def lost(self) -> list[FrozenTrial]:
        """Trials in flight whose process is gone; the caller holds `lock`."""
        running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        stale = set(self.study._storage._get_stale_trial_ids(self.study._study_id))  # pyright: ignore[reportAttributeAccessIssue]
        others = [trial for trial in running if trial.number not in self._held]
        return [trial for trial in others if trial._trial_id in stale or self._is_gone(trial)]

    def _is_gone(self, trial: FrozenTrial) -> bool:
        """Whether its process is known to have ended, and its workers have had time to save and end, too."""
        if not _has_no_process(trial.user_attrs.get(_OWNER_ATTR), trial):
            return False
        since_s = self._dead_since_s.setdefault(trial.number, time.monotonic())
        return time.monotonic() - since_s >= ORPHANS_END_S

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            for trial_id in list(self._held.values()):
                # A database that is away for a moment: the next beat is in time still.
                with contextlib.suppress(optuna.exceptions.StorageInternalError):
                    self._record(trial_id)

    def _record(self, trial_id: int) -> None:
        self.study._storage.record_heartbeat(trial_id)  # pyright: ignore[reportAttributeAccessIssue]

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]


def _this_process() -> str:
    """This process as others on the same machine can find it: boot, process namespace, number."""
    return f"{_machine()} {os.getpid()}"


def _machine() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return "unknown"


def _has_no_process(owner: str | None, trial: FrozenTrial) -> bool:
    """Whether the trial's process is known to have ended, without waiting for its heartbeats."""
    if owner is None:  # asked for, and then killed before it could say so
        started = trial.datetime_start
        return started is not None and datetime.now() - started > timedelta(seconds=GRACE_S)
    machine, _, pid = owner.rpartition(" ")
    if machine == "unknown" or machine != _machine():
        return False
    return not is_alive(pid)
