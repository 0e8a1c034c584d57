"""manifest.json: what a promoted version is, where it came from, and the SHA-256 of every file."""

import hashlib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from training.paths import PromotionPaths, write_json

PACKAGES = ("torch", "transformers", "peft", "llama-cpp-python")


def write_manifest(paths: PromotionPaths, facts: dict[str, Any]) -> None:
    """Writes `facts`, the package versions and every other file's size and hash."""
    files = sorted(path for path in paths.root.rglob("*") if path.is_file())
    manifest = {
        **facts,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "files": {path.relative_to(paths.root).as_posix(): _describe(path) for path in files},
    }
    write_json(paths.manifest, manifest)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "size_bytes": path.stat().st_size}
