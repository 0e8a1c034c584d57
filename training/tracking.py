"""Who is told about a trial while it trains: W&B, or nobody. The local files are `recorder.py`'s.

A tracker has `log(step, metrics)` and `finish(result)`. None of them may break or stop training: an
error of W&B is one warning, and the trial goes on without it.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

ReportTo = Literal["wandb", "none"]

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
)
"""What of `result.json` becomes the run's summary; `eval/loss` is then that of the best step."""


class Tracker(Protocol):
    """Receives one trial's metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def finish(self, result: Mapping[str, Any]) -> None:
        """`result` is the trial's `result.json`, or `{"state": "interrupted"}`."""
        ...


class NullTracker:
    """Tells nobody."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def finish(self, result: Mapping[str, Any]) -> None:
        pass


class WandbTracker:
    """One W&B run: online with an API key, else offline in `directory`/wandb (send: `wandb sync`).

    Args:
        directory: the trial's directory.
        group: the sweep's name.
        name: shown in W&B's list of runs.
        config: every setting of the trial.
        project: W&B project.
    """

    def __init__(
        self, directory: Path, *, group: str | None, name: str, config: dict, project: str
    ):
        import wandb

        settings = {
            "project": project,
            "group": group,
            "name": name,
            "config": config,
            "dir": directory,
            "reinit": "create_new",  # several runs may be open in one process
            "settings": wandb.Settings(silent=True, console="off", disable_git=True),
        }
        mode = _mode()
        try:
            self.run: Any = wandb.init(mode=mode, **settings)
        except Exception as error:
            if mode != "online":
                raise
            _warn(error, "is kept offline")
            self.run = wandb.init(mode="offline", **settings)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        self.failed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.failed:
            return
        try:
            self.run.log({"step": step, **metrics})
        except Exception as error:  # noqa: BLE001 - whatever W&B meets must not stop training
            self.failed = True
            _warn(error, "is not told any more")

    def finish(self, result: Mapping[str, Any]) -> None:
        try:
            self.run.summary.update({key: result[key] for key in SUMMARY_KEYS if key in result})
            self.run.finish(exit_code=0 if result["state"] in ("complete", "pruned") else 1)
        except Exception as error:  # noqa: BLE001 - as above
            _warn(error, "could not be told the result")


def make_tracker(
    report_to: ReportTo,
    directory: Path,
    *,
    group: str | None,
    name: str,
    config: dict,
    project: str,
) -> Tracker:
    """The tracker that `report_to` names; one that cannot start becomes a warning and nobody."""
    if report_to == "none":
        return NullTracker()
    try:
        return WandbTracker(directory, group=group, name=name, config=config, project=project)
    except Exception as error:  # noqa: BLE001 - as above
        _warn(error, "is not told")
        return NullTracker()


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


def _warn(error: Exception, consequence: str) -> None:
    cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
    warnings.warn(f"W&B {consequence}: {cause}", RuntimeWarning, stacklevel=3)
