"""Stores a trial's first steps as a stage (`training.stage`), and begins another trial with it.

A stage holds the state of the trial that trained it, and what that one had measured until then: a trial that
begins with it has a whole history.
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.checkpoint import VERSION, SavedState, load_state, save_state
from training.config import TrialConfig
from training.paths import TrialPaths, write_directory, write_json
from training.stage import FACTS, Stage, list_stages, prefix_hash, read_stage

_STATE = "state"


def stage_name(config: TrialConfig, step: int, content: str) -> str:
    """Name of the stage's directory.

    Args:
        config: of any trial that has the stage.
        step: steps in it.
        content: of base model and data, `training.prepared.Prepared.content`.
    """
    text = f"{VERSION} {step} {prefix_hash(config, step)} {content}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_stage(
    state: SavedState, config: TrialConfig, content: str, paths: TrialPaths, stages: Path
) -> Path:
    """Stores what the trial in `paths` has computed so far, unless it is stored already.

    Args:
        state: of the trial, whose record says what was measured.
        config: the trial's settings.
        content: of base model and data.
        paths: the trial's files.
        stages: the directory of all stages.
    """
    directory = stages / stage_name(config, state.step, content)
    if read_stage(directory) is not None:
        return directory
    stage = Stage(
        step=state.step,
        prefix=prefix_hash(config, state.step),
        trial=paths.root.name,
        settings=config.to_dict(),
    )

    def write(draft: Path) -> None:
        copied = TrialPaths(draft)
        _copy_measured(paths, copied, state.step)
        save_state(state, copied.state)
        write_json(draft / FACTS, asdict(stage))

    write_directory(directory, write)
    return directory


def fork_trial(
    config: TrialConfig, content: str, paths: TrialPaths, stages: Path
) -> SavedState | None:
    """Begins the trial in `paths` with the longest stage that it shares; None if there is none.

    A stage that is torn, or of another version, is left out with a warning.
    """
    stored = {path.name: stage for path, stage in list_stages(stages)}
    steps = {stage.step for stage in stored.values() if stage.step <= config.max_steps}
    for step in sorted(steps, reverse=True):
        name = stage_name(config, step, content)
        if name not in stored:
            continue
        state = load_state(stages / name / _STATE)
        if state is None or not _takes_over(TrialPaths(stages / name), paths, step):
            shutil.rmtree(stages / name)  # or nobody would store a whole one in its place
            continue
        origin = {"stage": name, "step": step, "trial": stored[name].trial}
        record = {**state.record, "forked_from": origin, "steps_saved": step}
        return SavedState(step, config.to_dict(), state.layout, state.tensors, record)
    return None


def _takes_over(source: TrialPaths, target: TrialPaths, step: int) -> bool:
    """Copies what was measured; False, with a warning, if it is damaged."""
    try:
        _copy_measured(source, target, step)
    except (FileNotFoundError, ValueError, KeyError) as error:
        warnings.warn(f"{source.root}: is not used: {error}", RuntimeWarning, stacklevel=3)
        for path in (target.evaluations, target.adapter):
            shutil.rmtree(path, ignore_errors=True)
        target.metrics.unlink(missing_ok=True)
        return False
    return True


def _copy_measured(source: TrialPaths, target: TrialPaths, step: int) -> None:
    """Metrics up to `step`, per-example losses, and the best adapter so far."""
    target.root.mkdir(parents=True, exist_ok=True)
    lines = source.metrics.read_text("utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    target.metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    for path in source.evaluations.glob("[0-9]*.parquet"):
        if int(path.stem) <= step:
            target.evaluations.mkdir(exist_ok=True)
            _link(path, target.evaluations / path.name)
    if source.adapter.is_dir():
        shutil.copytree(source.adapter, target.adapter, copy_function=_link, dirs_exist_ok=True)


def _link(source: Any, target: Any) -> None:
    """Both names of one file, which nobody changes in place; a copy where the disk has no links."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
