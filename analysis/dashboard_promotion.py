"""Promotions begun from the dashboard: `python -m deploy.promote` as a process of its own, and its log.

It goes on when the dashboard ends. What it prints stands in `promoted/promote.log`; the promotion lock, which
`deploy.promote` holds while it builds, says whether one begun elsewhere is at work.
"""

import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from analysis.lines import file_end, is_locked
from analysis.readable import read_checked_trial
from training.exceptions import SweepError
from training.paths import SweepPaths

_LOG_BYTES = 4096


@dataclass(frozen=True)
class PromotionState:
    """What is known of the last promotion."""

    text: str
    """One line."""
    is_running: bool
    log: str
    """End of promote.log; empty if it was not begun here."""


class Promotions:
    """Promotions of all sweeps, one at a time in each."""

    def __init__(self) -> None:
        self._processes: dict[Path, tuple[int, subprocess.Popen[bytes]]] = {}
        self._lock = threading.Lock()

    def start(self, paths: SweepPaths, number: int) -> None:
        """Begins to promote trial `number`.

        Raises:
            SweepError: another promotion is running, or the trial is not complete.
        """
        if not paths.trial(number).config.is_file():
            raise SweepError(f"{paths.trial(number).root}: no such trial")
        trial = read_checked_trial(paths.trial(number))
        if trial.state != "complete":
            raise SweepError(
                f"{trial.paths.root}: the trial is {trial.state}, but must be complete"
            )
        with self._lock:
            if self._is_ours_alive(paths) or is_locked(paths.promotion_lock):
                raise SweepError(f"{paths.root}: another promotion is running")
            paths.promoted.mkdir(parents=True, exist_ok=True)
            command = [
                sys.executable,
                "-m",
                "deploy.promote",
                str(paths.root),
                "--trial",
                str(number),
            ]
            with open(paths.promotion_log, "wb") as log:
                process = subprocess.Popen(
                    command,
                    cwd=Path(__file__).parents[1],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C here ends the dashboard alone
                )
            self._processes[paths.root] = (number, process)

    def state(self, paths: SweepPaths) -> PromotionState | None:
        """The last promotion; None if there has been none."""
        log = file_end(paths.promotion_log, _LOG_BYTES)
        number, process = self._processes.get(paths.root, (None, None))
        if process is not None:
            status = process.poll()
            if status is None:
                return PromotionState(f"Trial {number} is being promoted.", True, log)
            if status:
                return PromotionState(f"The promotion of trial {number} failed.", False, log)
            return PromotionState(f"Trial {number} was promoted: {_current(paths)}.", False, log)
        # Only a promotion makes a draft: without one the lock need not be touched.
        if paths.promotion_draft.is_dir() and is_locked(paths.promotion_lock):
            return PromotionState("A promotion is running.", True, log)
        current = _current(paths)
        if not log and not current:
            return None
        return PromotionState(f"Version in use: {current or 'none'}.", False, log)

    def _is_ours_alive(self, paths: SweepPaths) -> bool:
        _, process = self._processes.get(paths.root, (0, None))
        return process is not None and process.poll() is None


def _current(paths: SweepPaths) -> str:
    try:
        return f"promoted/{paths.current_promotion.read_text('utf-8').strip()[:40]}"
    except (OSError, ValueError):
        return ""
