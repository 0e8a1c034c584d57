"""Who is told about a trial while it trains: W&B, or nobody. The local files are `recorder.py`'s.

A tracker has `log(row, metrics)` and `finish(result)`. What goes to W&B goes through a thread of the run's
own, so that neither a slow network nor a missing one holds up training; an error of W&B is one warning, and
the trial goes on without it. The rows of a run are those of metrics.jsonl, by number: a run that is opened
again, after a crash or by `sweeps.sync`, is sent what W&B has not received, and nothing twice.
"""

import math
import os
import queue
import re
import secrets
import string
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from training.paths import TrialPaths, read_json, write_json

ReportTo = Literal["wandb", "none"]
LogModel = Literal["none", "best", "all"]

SUMMARY_KEYS = (
    "state",
    "reason",
    "best_step",
    "eval/loss",
    "base_eval/loss",
    "last_eval/loss",
    "train/loss",
    "num_steps",
    "train_time_s",
    "tokens",
    "forked_from",
    "steps_saved",
    "train_hash",
    "validation_hash",
    "test_hash",
)
"""What of `result.json` becomes the run's summary; `eval/loss` is then that of the best step."""

ADAPTER_KEY = "adapter_artifact"
"""In the summary of a run whose adapter is uploaded: the artifact's NAME:ALIAS."""
FINISH_TIMEOUT_S = 120.0
"""Longest that the end of a run waits for W&B to take it; what it does not take, `sweeps.sync` sends."""
INTERRUPTED_TIMEOUT_S = 20.0
"""The same when the process is told to end."""
_init_lock = threading.Lock()
_adapter_lock = threading.Lock()


class Tracker(Protocol):
    """Receives one trial's metrics."""

    def log(self, row: int, metrics: Mapping[str, Any]) -> None:
        """`row` is the number of the line in metrics.jsonl, from 0; `metrics` has `step` and `time`."""
        ...

    def finish(self, result: Mapping[str, Any]) -> None:
        """`result` is the trial's `result.json`, or `{"state": "interrupted"}`."""
        ...


class NullTracker:
    """Tells nobody."""

    def log(self, row: int, metrics: Mapping[str, Any]) -> None:
        pass

    def finish(self, result: Mapping[str, Any]) -> None:
        pass


@dataclass(kw_only=True)
class WandbRun:
    """Which W&B run a trial is."""

    project: str
    entity: str | None = None
    group: str | None = None
    """The sweep's name."""
    name: str | None = None
    """Shown in W&B's list of runs."""
    id: str | None = None
    """A run of this id is continued if it is there; without one W&B chooses."""
    sweep_id: str | None = None
    """Of the W&B sweep that it is a run of."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Every setting of the trial."""
    log_model: LogModel = "none"
    """Whether the adapter is uploaded."""
    must_be_online: bool = False
    """An error where it would else be kept offline."""


class WandbTracker:
    """One W&B run: online with an API key, else offline in `directory`/wandb.

    Args:
        directory: the trial's directory.
        run: which run it is.
        on_stop: called, from another thread, when W&B asks that the run be stopped.
    """

    def __init__(self, directory: Path, run: WandbRun, on_stop: Callable[[], None] | None = None):
        self.paths, self.spec = TrialPaths(directory), run
        self.on_stop = on_stop or (lambda: None)
        self.problem: str | None = None
        """What the thread has met last."""
        self.warned_of: str | None = None
        self.queue: queue.SimpleQueue[tuple[int, Mapping[str, Any]] | None] = queue.SimpleQueue()
        self.result: Mapping[str, Any] = {}
        self.num_rows = 0
        self.thread = threading.Thread(target=self._tell, name=f"W&B {run.name}", daemon=True)
        self.thread.start()

    def log(self, row: int, metrics: Mapping[str, Any]) -> None:
        self.queue.put((row, metrics))
        self.num_rows = row + 1
        self._warn()

    def finish(self, result: Mapping[str, Any]) -> None:
        self.result = result
        self.queue.put(None)
        self._warn()

    def wait(self, timeout_s: float) -> bool:
        """Whether W&B has taken everything, after at most `timeout_s` seconds."""
        self.thread.join(timeout_s)
        self._warn()
        return not self.thread.is_alive()

    def _warn(self) -> None:
        """The thread's warnings come from the thread that trains, where they can be seen and caught."""
        problem = self.problem
        if problem and problem != self.warned_of:
            self.warned_of = problem
            warnings.warn(problem, RuntimeWarning, stacklevel=3)

    def _tell(self) -> None:
        """The thread: opens the run, sends it what comes, closes it."""
        doing = "is not told"
        try:
            run = self._open()
            doing = "is not told any more"
            first = run.starting_step
            while (item := self.queue.get()) is not None:
                if item[0] >= first:
                    _log(run, *item)
            doing = "could not be told the result"
            self._finish(run)
        except Exception as error:  # noqa: BLE001 - whatever W&B meets must not stop training
            self.problem = f"W&B {doing}: {_first_line(error)}"

    def _open(self) -> Any:
        import wandb

        spec = self.spec
        settings = {
            "project": spec.project,
            "entity": spec.entity,
            "group": spec.group,
            "name": spec.name,
            "config": dict(spec.config),
            "dir": self.paths.root,
            "id": spec.id,
            "resume": "allow" if spec.id else None,
            "reinit": "create_new",  # several runs may be open in one process
        }

        def options() -> Any:
            chosen = wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
                # Without it, Stop in W&B would interrupt the process, and so every trial in its pack.
                stop_fn=self.on_stop,
            )
            if spec.sweep_id:
                chosen.sweep_id = spec.sweep_id
            return chosen

        mode = "online" if spec.must_be_online else _mode()
        with _init_lock:
            try:
                run = wandb.init(mode=mode, settings=options(), **settings)
            except Exception as error:
                if mode != "online" or spec.must_be_online:
                    raise
                self.problem = f"W&B is kept offline: {_first_line(error)}"
                run = wandb.init(mode="offline", settings=options(), **settings)
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def _finish(self, run: Any) -> None:
        result = self.result
        run.summary.update({key: result[key] for key in SUMMARY_KEYS if key in result})
        if reason := result.get("reason"):
            run.write_logs(f"{result['state']}: {reason}")
        if self.paths.log.is_file():
            run.write_logs(self.paths.log.read_text("utf-8", errors="replace"))
        self._log_model(run)
        run.finish(exit_code=0 if result["state"] in ("complete", "pruned") else 1)
        if not run.offline and self.paths.result.is_file():  # else it was interrupted
            _check_arrived(run, self.num_rows)
            receipt = {"run": f"{run.entity}/{run.project}/{run.id}", "url": run.url}
            write_json(self.paths.wandb_receipt, {**receipt, "log_model": self.spec.log_model})

    def _log_model(self, run: Any) -> None:
        is_scored = self.result.get("state") == "complete" and self.paths.adapter.is_dir()
        if self.spec.log_model == "none" or not is_scored:
            return
        name = artifact_name(f"{self.spec.group or run.sweep_id or run.id}-adapter")
        with _adapter_lock:  # of two that end together, the worse one must not take the alias last
            is_best = is_best_so_far(self.paths, self.result)
            if is_best or self.spec.log_model == "all":
                log_adapter(run, self.paths, self.result, name, ["best"] if is_best else [])


def log_adapter(
    run: Any, paths: TrialPaths, result: Mapping[str, Any], name: str, aliases: list[str]
) -> None:
    """Uploads a trial's adapter and evaluations as a version of the artifact `name`."""
    import wandb

    metadata = {key: result.get(key) for key in ("eval/loss", "base_eval/loss", "best_step")}
    artifact = wandb.Artifact(name, type="model", metadata=metadata)
    artifact.add_dir(str(paths.adapter), name="adapter")
    artifact.add_dir(str(paths.evaluations), name="eval")
    artifact.add_file(str(paths.config))
    logged = run.log_artifact(artifact, aliases=["latest", run.id, *aliases])
    if not run.offline:
        logged.wait(timeout=int(FINISH_TIMEOUT_S))
    run.summary[ADAPTER_KEY] = f"{name}:{run.id}"


def is_best_so_far(paths: TrialPaths, result: Mapping[str, Any]) -> bool:
    """Whether no trial beside this one has ended with a lower loss."""
    others = set(paths.root.parent.glob("*/result.json")) - {paths.result}
    losses = [read_json(other).get("eval/loss") for other in others]
    loss = result.get("eval/loss")
    return loss is not None and all(loss <= other for other in losses if other is not None)


def artifact_name(text: str) -> str:
    """`text` with W&B's rules for names: letters, digits, dashes, underscores and dots."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:128]


def new_run_id() -> str:
    """Eight letters and digits, as W&B's own ids of runs."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def make_tracker(
    report_to: ReportTo,
    directory: Path,
    run: WandbRun,
    on_stop: Callable[[], None] | None = None,
) -> Tracker:
    """The tracker that `report_to` names."""
    return NullTracker() if report_to == "none" else WandbTracker(directory, run, on_stop)


def wait_for_trackers(trackers: list[Tracker], timeout_s: float) -> int:
    """Waits until W&B has taken what is on its way; returns the number of runs that it has not."""
    deadline = time.monotonic() + timeout_s
    own = [tracker for tracker in trackers if isinstance(tracker, WandbTracker)]
    return sum(not tracker.wait(max(0.0, deadline - time.monotonic())) for tracker in own)


def _log(run: Any, row: int, metrics: Mapping[str, Any]) -> None:
    values = dict(metrics)
    if "time" in values:
        values["_timestamp"] = values.pop("time")
    # JSON has no NaN, so that metrics.jsonl says null; W&B knows it.
    values = {name: math.nan if value is None else value for name, value in values.items()}
    run.log(values, step=row, commit=True)
    if "eval/loss" in values:
        run.write_logs(f"step {values['step']}: eval/loss {values['eval/loss']:.4f}")


def _check_arrived(run: Any, num_rows: int) -> None:
    """A run whose upload was refused once ends as if all were well: W&B's client does not say so."""
    import wandb

    path = f"{run.entity}/{run.project}/{run.id}"
    for pause_s in (0, 1, 3, 10):  # the server may take a moment
        time.sleep(pause_s)
        there = wandb.Api().run(path)
        if there.state != "running" and there.lastHistoryStep >= num_rows - 1:
            return
    raise RuntimeError(f"only {there.lastHistoryStep + 1} of {num_rows} rows have arrived")


def _mode() -> Literal["online", "offline", "disabled"]:
    """As W&B's own settings say; where they say nothing, online if there is an API key."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    if "WANDB_MODE" in os.environ and settings.mode in ("online", "offline", "disabled"):
        return settings.mode
    # Without this question, `wandb.init` would stop a terminal's user to ask for a key.
    auth = wbauth.authenticate_session(
        host=settings.base_url, source="loraloom", prompt=False, update_session=False
    )
    return "online" if auth else "offline"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
