"""manifest.json: what a promoted version is, where it came from, and the SHA-256 of every file.

`content_sha256` stands for the model alone: the same trial promoted twice has the same one. What tells of
*when* or *how fast* is left out of it: the card, verification.json and the picture, which show speeds.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from sweeps.ledger import SweepRecord, TrialRecord
from training.exceptions import ModelError
from training.paths import PromotionPaths, read_json, write_json

PACKAGES = ("torch", "transformers", "peft", "llama-cpp-python")


def write_manifest(paths: PromotionPaths, facts: dict[str, Any]) -> None:
    """Writes `facts`, the package versions and every other file's size and hash."""
    names = sorted(_file_names(paths) - {paths.manifest.name})
    files = {name: _describe(paths.root / name) for name in names}
    manifest = {
        **facts,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "content_sha256": _content_sha256(paths, files),
        "files": files,
    }
    write_json(paths.manifest, manifest)


def read_manifest(paths: PromotionPaths) -> dict[str, Any]:
    """Raises ModelError if it is missing or damaged."""
    try:
        manifest = read_json(paths.manifest)
    except FileNotFoundError:
        raise ModelError(
            f"{paths.root} has no {paths.manifest.name}, so it is no version"
        ) from None
    except (ValueError, NotADirectoryError) as error:
        raise ModelError(f"{paths.manifest}: is damaged, but must be whole JSON: {error}") from None
    if not isinstance(manifest, dict) or not _is_complete(manifest):
        raise ModelError(f"{paths.manifest}: names no files, but must be a version's manifest")
    return manifest


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Whether it says what chat, push and the registry read of it, and names files of its own only."""
    files, ggufs = manifest.get("files"), manifest.get("ggufs")
    if not (isinstance(files, dict) and isinstance(ggufs, dict) and ggufs):
        return False
    return (
        {"name", "trial", "step", "created"} <= manifest.keys()
        and all(
            isinstance(e, dict) and {"sha256", "size_bytes"} <= e.keys() for e in files.values()
        )
        and all(isinstance(name, str) and name in files for name in ggufs.values())
        and not any("/" in name or "\\" in name for name in ggufs.values())
    )


def find_changes(paths: PromotionPaths) -> list[str]:
    """What is not as the manifest says, one text a file; reads every byte.

    Raises:
        ModelError: the manifest is missing or damaged.
    """
    expected, found = read_manifest(paths)["files"], _file_names(paths)
    changes = []
    for name, entry in expected.items():
        path = paths.root / name
        if name not in found:
            changes.append(f"{name} is missing")
        elif path.stat().st_size != entry["size_bytes"]:
            size = path.stat().st_size
            changes.append(f"{name} is {size:,} bytes, but must be {entry['size_bytes']:,}")
        elif file_sha256(path) != entry["sha256"]:
            changes.append(f"{name} has another SHA-256")
    extra = sorted(found - expected.keys() - {paths.manifest.name})
    return changes + [f"{name} is not in the manifest" for name in extra]


def provenance(sweep: SweepRecord, trial: TrialRecord) -> dict[str, Any]:
    """What the model was made of: data, base, seeds, code and environment of its sweep."""
    settings, result = trial.settings, trial.result
    hashes = ("train_hash", "validation_hash", "test_hash")
    first = trial.number if trial.seed_of is None else trial.seed_of
    same = [other for other in sweep.trials if first in (other.number, other.seed_of)]
    try:
        environment = read_json(sweep.paths.environment)
    except FileNotFoundError:
        environment = {}
    git = environment.get("git") or {}
    diff = git.get("diff")
    return {
        "data": {
            "dataset_name": settings["dataset_name"],
            **{name: result.get(name) for name in hashes},
        },
        "base_revision": settings["model_revision"],
        "seed": settings["seed"],
        "seeds_of_these_settings": sorted({other.settings["seed"] for other in same}),
        "code": {
            "commit": git.get("commit"),
            "dirty": git.get("dirty"),
            "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        },
        "environment": {
            name: environment.get(name) for name in ("python", "platform", "device", "packages")
        },
    }


def _file_names(paths: PromotionPaths) -> set[str]:
    files = (path for path in paths.root.rglob("*") if not path.is_dir() or path.is_symlink())
    return {path.relative_to(paths.root).as_posix() for path in files}


def _content_sha256(paths: PromotionPaths, files: Mapping[str, Mapping[str, Any]]) -> str:
    timed = {paths.card.name, paths.verification.name, paths.quantization_picture.name}
    content = {name: entry["sha256"] for name, entry in files.items() if name not in timed}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
