"""What a sweep ran on: versions, device and the state of the code, for `environment.json`.

Written once, when the sweep starts, so that a result can be traced to the code that made it. The
diff of uncommitted changes is kept, too: a dirty tree is otherwise lost.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "optuna",
    "wandb",
    "numpy",
)
_MAX_DIFF_CHARACTERS = 200_000


def describe_environment() -> dict[str, Any]:
    """Versions, device, git commit, and whether (and how) the code differs from that commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "device": _device(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "argv": [_without_password(argument) for argument in sys.argv],
        "git": _git_state(Path(__file__).resolve().parents[1]),
    }


def _without_password(argument: str) -> str:
    """A database's URL is recorded without what opens it."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", argument)


def _device() -> str:
    import torch  # seconds to load, which `--help` and a wrong definition need not wait for

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"cpu ({platform.processor() or platform.machine()})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(root: Path) -> dict[str, Any] | None:
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None  # no git, or an unpacked archive
    status = _git(root, "status", "--porcelain") or ""
    diff = _git(root, "diff", "HEAD") or ""
    return {
        "commit": commit.strip(),
        "dirty": bool(status.strip()),
        "diff": diff[:_MAX_DIFF_CHARACTERS],
    }


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args],
            cwd=root,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
