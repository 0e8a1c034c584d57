"""A sweep's directory from the runner's side: whose it is, who holds it, what it knows already.

`locked(paths)` makes the one process that may write; `copy_known` saves training a point twice. What the
directory says about its trials is read by `sweeps.ledger`.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sweeps.environment import describe_environment
from sweeps.ledger import TrialRecord
from sweeps.spec import SweepDefinition, read_definition
from training.config import TrialConfig
from training.exceptions import SweepError
from training.paths import (
    SweepPaths,
    TrialPaths,
    read_json,
    write_directory,
    write_json,
    write_text,
)

ORPHANS_END_S = 60.0
"""Longest that workers may take to save their trials after their runner was killed."""


def check_directory(
    definition: SweepDefinition, paths: SweepPaths, *, is_shared: bool = False
) -> None:
    """Refuses a directory that is another sweep's, or no sweep's at all.

    Args:
        definition: the sweep that wants it.
        paths: the directory.
        is_shared: whether the study is in a database, and not in the directory.

    Raises:
        SweepError: with what stands in the way; nothing has been touched.
    """
    check_owner(definition, paths)
    if is_shared and paths.study.is_file():
        raise SweepError(
            f"{paths.root}: has its study in {paths.study.name}, but --storage is given: go on without it"
        )
    if paths.definition.is_file():
        has_trials = paths.trials.is_dir() and any(paths.trials.iterdir())
        if not is_shared and not paths.study.is_file() and has_trials:
            raise SweepError(
                f"{paths.root}: has trials, but {paths.study.name} is missing (a sweep with --storage "
                "needs it each time)"
            )
    elif paths.root.is_dir() and not all(_is_own(path, paths) for path in paths.root.iterdir()):
        raise SweepError(f"{paths.root}: has files, but no {paths.definition.name}: not a sweep's")


def check_owner(definition: SweepDefinition, paths: SweepPaths) -> None:
    """Refuses a directory that is another sweep's.

    Raises:
        SweepError: with the first key that differs.
    """
    if paths.root.exists() and not paths.root.is_dir():
        raise SweepError(f"{paths.root} is a file, but must be free for the sweep's directory")
    if paths.definition.is_file():
        difference = read_definition(paths.definition).difference(definition)
        if difference:
            raise SweepError(
                f"{paths.root}: holds another sweep: {difference} is not as in {definition.path}; "
                "give this one another name or --output_dir"
            )


@contextmanager
def locked(paths: SweepPaths, *, is_shared: bool = False) -> Iterator[IO[str]]:
    """Holds the sweep's lock, in an open file that worker processes inherit.

    With `is_shared` others may hold it in the same way: the runners of a study in a database.

    The kernel frees it when all that have the file open have ended, however they end: so workers whose
    runner was killed are waited for, up to `ORPHANS_END_S` seconds.

    Raises:
        SweepError: another process runs the sweep.
    """
    paths.root.mkdir(parents=True, exist_ok=True)
    with open(paths.lock, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + ORPHANS_END_S
        while not _try_lock(file, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX):
            file.seek(0)
            owner = file.read().strip()
            if is_alive(owner) or time.monotonic() > deadline:
                raise SweepError(
                    f"{paths.root}: is being run by process {owner or 'unknown'}, but one at a time "
                    "must be"
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file


def allocate_trial(paths: SweepPaths) -> int:
    """The next free number, given once, however many processes ask."""
    paths.trials.mkdir(parents=True, exist_ok=True)
    while True:
        taken = [int(path.name[1:-5]) for path in paths.trials.glob(".[0-9]*.lock")]
        number = max(taken, default=-1) + 1
        try:
            os.close(os.open(paths.trial_lock(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        return number


def is_locked(paths: SweepPaths) -> bool:
    """Whether a process runs the sweep, or workers of a killed one save their trials."""
    try:
        with open(paths.lock, "r+", encoding="utf-8") as file:  # NFS wants it writable
            return not _try_lock(file)
    except OSError:
        return False


def _try_lock(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_alive(owner: str) -> bool:
    """Whether a process of this machine has that number; not where it is no number."""
    try:
        os.kill(int(owner), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def write_definition(definition: SweepDefinition, paths: SweepPaths) -> None:
    """Writes `sweep.yaml`, and `environment.json` when the sweep starts for the first time."""
    write_text(paths.definition, definition.text)
    if not paths.environment.is_file():
        write_json(paths.environment, describe_environment())


def continue_files(chain: Sequence[TrialPaths], paths: TrialPaths) -> None:
    """Gives a trial what another one had saved whose process is gone: history, evaluations, state.

    Args:
        chain: the trials that it continues, the last one first; one may have been lost before it had files.
        paths: of the trial.
    """
    lost = next((trial for trial in chain if trial.root.is_dir()), None)
    if paths.root.is_dir() or lost is None:
        return
    own = (lost.config, lost.result, lost.log, lost.wandb, lost.wandb_receipt)
    left_out = shutil.ignore_patterns(".*", *(path.name for path in own))

    def write(root: Path) -> None:
        for attempt in range(3):
            try:
                shutil.copytree(lost.root, root, dirs_exist_ok=True, ignore=left_out)
                return
            except shutil.Error:  # its last worker is just putting a state in the place of another
                if attempt == 2:
                    raise
                time.sleep(1)

    write_directory(paths.root, write)
    shutil.rmtree(lost.state, ignore_errors=True)


def copy_known(
    known: TrialRecord, paths: TrialPaths, config: TrialConfig, info: dict[str, Any]
) -> dict[str, Any]:
    """Gives the trial the known one's files, adapter included, so that it stands on its own."""
    result = {
        **known.result,
        "same_as": known.number,
        "steps_saved": known.result.get("num_steps", 0),
    }
    engine = read_json(known.paths.config).get("engine")

    def write(root: Path) -> None:
        copy = TrialPaths(root)
        # Sending the same W&B run twice would count it twice.
        paths = known.paths
        names = (path.name for path in (paths.state, paths.log, paths.wandb, paths.wandb_receipt))
        left_out = shutil.ignore_patterns(*names)
        shutil.copytree(known.paths.root, root, dirs_exist_ok=True, ignore=left_out)
        write_json(copy.config, {"settings": config.to_dict(), "engine": engine, **info})
        write_json(copy.result, result)

    write_directory(paths.root, write)
    return result


def _is_own(path: Path, paths: SweepPaths) -> bool:
    """Whether a start that was killed before it wrote the definition can have left `path`.

    The report on a CSV of the sweep's name may be there, too.
    """
    own = (".", paths.lock.name, paths.decision_lock.name, paths.study.name, paths.report.name)
    return path.name.startswith(own)
