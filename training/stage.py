"""A stage: the first steps that several trials have in common, trained once and forked (`training.fork`).

Its directory is named by its content: all settings that enter these steps, every learning rate, the base
model's files, the examples after splitting, and the version of the saved state. A trial that would compute
the same finds it under the same name; whatever differs makes another name, so a stage is never wrong, only
missing. Light to import, so that a command that decides what to train need not load what trains it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import TrialConfig
from training.paths import read_json
from training.schedules import learning_rate, other_settings

FACTS = "stage.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What `stage.json` says."""

    step: int
    """Steps that it holds."""
    prefix: str
    """`prefix_hash` of the settings; the name has the base model and the data in it besides."""
    trial: str
    """Directory name of the trial that trained it."""
    settings: dict[str, Any]


def prefix_hash(config: TrialConfig, step: int) -> str:
    """Equal for settings that have their first `step` steps, and evaluations, in common."""
    digest = hashlib.sha256(json.dumps(other_settings(config), sort_keys=True).encode())
    for number in range(step):
        digest.update(learning_rate(config, number).hex().encode() + b" ")
    return digest.hexdigest()


def list_stages(stages: Path) -> list[tuple[Path, Stage]]:
    """Every whole stage with its directory; damaged ones are left out."""
    found = []
    for path in sorted(stages.iterdir()) if stages.is_dir() else []:
        stage = (
            None if path.name.startswith(".") else read_stage(path)
        )  # a draft of a killed process
        if stage is not None:
            found.append((path, stage))
    return found


def read_stage(directory: Path) -> Stage | None:
    """The stage in `directory`; None if there is none, or it is damaged."""
    try:
        return Stage(**read_json(directory / FACTS))
    except (OSError, ValueError, TypeError):
        return None
