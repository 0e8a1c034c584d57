"""Every file name of a sweep on disk, and the atomic writes that put files there.

`SweepPaths` is `runs/<sweep>/`, `TrialPaths` one of its `trials/0007/` (or the `--output_dir` of
`python -m training.run`). A file that another process may read appears whole or not at all:
temporary file in the same directory, fsync, rename.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrialPaths:
    """Files of one trial."""

    root: Path

    @property
    def config(self) -> Path:
        """Settings, written before anything can fail."""
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, append-only; a torn last line is skipped by readers."""
        return self.root / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """Final record; its presence says that the trial has ended."""
        return self.root / "result.json"

    @property
    def log(self) -> Path:
        """Traceback of the fault that ended the trial."""
        return self.root / "trial.log"

    @property
    def adapter(self) -> Path:
        """PEFT adapter at the best step."""
        return self.root / "adapter"

    @property
    def state(self) -> Path:
        """Working files of a trial in flight; removed when it ends."""
        return self.root / "state"

    @property
    def wandb(self) -> Path:
        """W&B's own files of an offline run, for `wandb sync`."""
        return self.root / "wandb"

    @property
    def wandb_receipt(self) -> Path:
        """Says where in W&B the whole trial is; missing while W&B lacks some of it."""
        return self.root / "wandb.json"

    def eval_losses(self, step: int) -> Path:
        """Per-example validation losses at `step` (0 is the base model)."""
        return self.evaluations / f"{step}.parquet"

    @property
    def evaluations(self) -> Path:
        """Directory of `eval_losses`."""
        return self.root / "eval"

    def test_losses(self, step: int) -> Path:
        """Per-example test losses at `step`, written when the trial is scored for promotion."""
        return self.root / "test" / f"{step}.parquet"

    def train_losses(self, step: int) -> Path:
        """The same of training examples that the trial has seen."""
        return self.root / "train" / f"{step}.parquet"

    @property
    def samples(self) -> Path:
        """Directory of `sample`; a trial that never led its sweep has none."""
        return self.root / "samples"

    def sample(self, step: int) -> Path:
        """Answers to the sweep's fixed prompts at `step` (0 is the base model's)."""
        return self.samples / f"{step}.json"


@dataclass(frozen=True)
class PromotionPaths:
    """Files of one promoted version, `promoted/0001/`."""

    root: Path

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def adapter_gguf(self) -> Path:
        """The adapter alone, for `llama-cli --lora` over the base model's GGUF."""
        return self.root / "adapter.gguf"

    def gguf(self, name: str, quantization: str) -> Path:
        return self.root / f"{name}-{quantization}.gguf"

    @property
    def modelfile(self) -> Path:
        return self.root / "Modelfile"

    @property
    def card(self) -> Path:
        return self.root / "README.md"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def quantization_picture(self) -> Path:
        return self.root / "quantization.png"

    @property
    def verification(self) -> Path:
        return self.root / "verification.json"


@dataclass(frozen=True)
class SweepPaths:
    """Files of one sweep, `runs/<sweep>/`."""

    root: Path

    @property
    def definition(self) -> Path:
        """The sweep YAML as it was given."""
        return self.root / "sweep.yaml"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def study(self) -> Path:
        """The embedded Optuna study (SQLite)."""
        return self.root / "study.db"

    @property
    def lock(self) -> Path:
        """Held by the one process that writes this sweep."""
        return self.root / "run.lock"

    @property
    def decision_lock(self) -> Path:
        """Held by one of the runners of a shared study at a time, while it decides what comes next."""
        return self.root / "decide.lock"

    @property
    def trials(self) -> Path:
        return self.root / "trials"

    def trial(self, number: int) -> TrialPaths:
        return TrialPaths(self.trials / f"{number:04d}")

    def trial_lock(self, number: int) -> Path:
        """Held while an agent trains the trial; its name is the trial's number, given once."""
        return self.trials / f".{number:04d}.lock"

    @property
    def stages(self) -> Path:
        """Stretches of steps that trials share, each in a directory named by its content."""
        return self.root / "stages"

    @property
    def decisions(self) -> Path:
        """One JSON object a line for every time that a trial might have been pruned."""
        return self.root / "pruning.jsonl"

    @property
    def requests(self) -> Path:
        """What users ask of a sweep from outside its process, one file each until it is in the study."""
        return self.root / "requests"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def promoted(self) -> Path:
        return self.root / "promoted"

    @property
    def current_promotion(self) -> Path:
        """Text file holding the promoted version in use, e.g. `0001`."""
        return self.promoted / "current"

    @property
    def promotion_lock(self) -> Path:
        """Held by the one process that promotes from this sweep."""
        return self.promoted / ".lock"

    @property
    def promotion_log(self) -> Path:
        """What the last promotion begun from the dashboard printed."""
        return self.promoted / "promote.log"

    @property
    def promotion_draft(self) -> Path:
        """A version in the making; renamed to its number when it is whole."""
        return self.promoted / ".draft"

    @property
    def publication(self) -> Path:
        """Text file holding the version that is being published, from its rename until it is current."""
        return self.promoted / ".publishing"

    def promotion(self, number: int) -> PromotionPaths:
        return PromotionPaths(self.promoted / f"{number:04d}")


def cache_dir() -> Path:
    """Where prepared models and built wheels are kept: `$LORALOOM_CACHE` or `~/.cache/loraloom`."""
    return Path(os.environ.get("LORALOOM_CACHE") or Path.home() / ".cache" / "loraloom")


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary_path)`, then renames the file it made to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with _full_disk_is_an_os_error(path):
            write(temporary)
        _fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    write_atomic(path, lambda temporary: _write_utf8(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinities are refused (not JSON)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary_directory)`, then puts that directory in the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        with _full_disk_is_an_os_error(path):
            write(temporary)
        sync_directory(temporary)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _fsync(path.parent)  # the new one has its name on the disk before the old one is deleted
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Waits until everything in the directory is on the disk."""
    for directory, _, names in os.walk(path):
        for name in [*names, "."]:
            _fsync(Path(directory, name))


def recover_directory(path: Path) -> None:
    """Puts in order what `write_directory` leaves behind when it is killed: the old version, drafts."""
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)
    for draft in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(draft, ignore_errors=True)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _fsync(path: Path) -> None:
    """Waits until the file's bytes, or the directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not to be had on some network disks
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _full_disk_is_an_os_error(path: Path) -> Iterator[None]:
    """safetensors says in words alone that the disk is full; told by name, it need not be imported."""
    try:
        yield
    except Exception as error:
        code = re.search(r"os error (\d+)", str(error))
        is_full = code is not None and int(code[1]) in (errno.ENOSPC, errno.EDQUOT)
        if type(error).__name__ != "SafetensorError" or not is_full:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
