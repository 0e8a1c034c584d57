"""What a push publishes of a promoted version, file by file, without asking the hub anything.

`read_version` checks every file against the manifest; `published_files` and `space_files` are the two repos.
Three texts differ from those on disk: the card gets metadata that it lacks, paths of this machine are cut to
their last part, and the manifest lists what is published.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, SpaceCard
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from deploy.manifest import file_sha256, find_changes
from training.exceptions import ModelError
from training.paths import PromotionPaths, read_json

MANIFEST_DIGEST = "manifest_sha256"
"""Key by which a repo says which version's push made it: the SHA-256 of the manifest on disk."""
CARD, MANIFEST, MERGED = "README.md", "manifest.json", "merged/"
TEXT_SUFFIXES = (".md", ".json")
"""Files in which paths of this machine may stand; a tokenizer's hold none and are large."""
SPACE_SOURCE = Path(__file__).parent / "space"
SPACE_TEXTS = ("app.py", "requirements.txt")
MERGED_USE = "`merged/` loads with Transformers' `AutoModelForCausalLM`, `adapter/` with PEFT."
ADAPTER_USE = "`adapter/` loads with PEFT."
"""What the card on disk says of the directories, and what it says where merged/ is not published."""
MERGED_ROW = re.compile(r"\| merged/ ")
"""Of the card's table of files; what a repo does not hold its card does not promise."""


@dataclass(frozen=True)
class Version:
    """A promoted version whose files are as its manifest says."""

    paths: PromotionPaths
    manifest: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class PublishedFile:
    """One file of a repo: a path on this machine, or its bytes."""

    path: str
    content: Path | bytes
    sha256: str
    note: str = ""

    @property
    def size_bytes(self) -> int:
        content = self.content
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def is_in(self, present: dict[str, str]) -> bool:
        """Whether a repo holds it: git's hash for small files, SHA-256 for large ones."""
        known = present.get(self.path)
        if known is None or known == self.sha256:
            return known is not None
        if len(known) == len(self.sha256):
            return False
        content = self.content
        return known == git_hash(content if isinstance(content, bytes) else content.read_bytes())


def read_version(paths: PromotionPaths) -> Version:
    """The version, each of its files compared with the manifest.

    Raises:
        ModelError: there is no manifest, or a file is missing or was changed.
    """
    changes = find_changes(paths)
    if changes:
        raise ModelError(f"{paths.root}: {changes[0]}, but must be as promoted: promote again")
    return Version(paths, read_json(paths.manifest), file_sha256(paths.manifest))


def published_files(version: Version, merged: bool, licence: str) -> list[PublishedFile]:
    """The model repo's files, the manifest first; without `merged/` unless asked.

    Raises:
        ModelError: the card's metadata cannot be read.
    """
    names = [name for name in version.manifest["files"] if merged or not name.startswith(MERGED)]
    replaced = _machine_paths(version)
    files = []
    for name in names:
        path = version.paths.root / name
        text = _published_text(version, name, replaced, merged, licence)
        if text is None:
            files.append(PublishedFile(name, path, version.manifest["files"][name]["sha256"]))
        else:
            note = "(metadata added)" if name == CARD else "(paths cut)"
            files.append(_from_bytes(name, text.encode("utf-8"), note))
    return [_manifest(version, files, replaced), *files]


def space_files(version: Version, repo_id: str, licence: str) -> list[PublishedFile]:
    """The Space's files: the app, what it needs, its card, and which model it shows."""
    card = SpaceCard((SPACE_SOURCE / CARD).read_text("utf-8"))
    card.data["title"] = version.manifest["name"]
    card.data["models"] = [repo_id]
    if licence:
        card.data["license"] = licence
    config = {
        **chat_files(version.manifest),
        "title": version.manifest["name"],
        "model_repo": repo_id,
        MANIFEST_DIGEST: version.digest,
    }
    texts = {name: (SPACE_SOURCE / name).read_text("utf-8") for name in SPACE_TEXTS}
    texts |= {CARD: str(card), "space.json": json.dumps(config, indent=2) + "\n"}
    return [_from_bytes(name, text.encode("utf-8")) for name, text in texts.items()]


def chat_files(manifest: dict[str, Any]) -> dict[str, str]:
    """The GGUF that a Space chats with, and the adapter by which it gets the base back, if any."""
    name = PromotionPaths(Path()).adapter_gguf.name
    adapter = name if name in manifest["files"] else ""
    return {"model_file": next(iter(manifest["ggufs"].values())), "adapter_file": adapter}


def complete_card(
    text: str, manifest: dict[str, Any], losses: dict[str, float], merged: bool, licence: str
) -> str:
    """The card with the metadata that the hub knows and the card lacks.

    Raises:
        ModelError: its front matter is no metadata of a model card.
    """
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ModelError(f"the card's metadata is wrong: {error}") from error
    data = card.data
    dataset = str(manifest["settings"]["dataset_name"])
    if licence and not data.get("license"):
        data["license"] = licence
    if is_hub_id(dataset) and not data.get("datasets"):
        data["datasets"] = [dataset]
    if not merged and data.get("library_name") == "transformers":
        data["library_name"] = "gguf"  # nothing in the repo loads with Transformers alone
    if not merged:
        card.text = "\n".join(line for line in card.text.split("\n") if not MERGED_ROW.match(line))
        card.text = card.text.replace(MERGED_USE, ADAPTER_USE)
    if not data.get("eval_results") and not data.get("model-index"):
        data["model_name"] = manifest["name"]
        data["eval_results"] = [
            EvalResult(
                task_type="text-generation",
                dataset_type=PurePath(dataset).name if not is_hub_id(dataset) else dataset,
                dataset_name=PurePath(dataset).name,
                dataset_split="test",
                metric_type="loss",
                metric_name=f"test loss of {form}, nats a token",
                metric_value=round(loss, 4),
            )
            for form, loss in losses.items()
        ]
    return str(card)


def is_hub_id(name: str) -> bool:
    """Whether a dataset's or a model's name can only be one on the hub."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return name.count("/") == 1 and not Path(name).exists() and not name.startswith(".")


def _published_text(
    version: Version, name: str, replaced: dict[str, str], merged: bool, licence: str
) -> str | None:
    """The file's text where it differs from the one on disk."""
    if not name.endswith(TEXT_SUFFIXES) or "tokenizer" in name:
        return None
    text = (version.paths.root / name).read_text("utf-8")
    published = _cut(text, replaced)
    if name == CARD:
        losses = read_json(version.paths.verification).get("losses", {}).get("loss", {})
        published = complete_card(published, version.manifest, losses, merged, licence)
    return published if published != text else None


def _machine_paths(version: Version) -> dict[str, str]:
    """What is published in place of each path of this machine that the settings name."""
    values = [value for value in version.manifest["settings"].values() if isinstance(value, str)]
    adapter = version.paths.adapter / "adapter_config.json"
    base = version.manifest.get("base_model") or ""
    replaced = {value: PurePath(value).name for value in values if PurePath(value).is_absolute()}
    if adapter.is_file():
        loaded_from = read_json(adapter).get("base_model_name_or_path") or ""
        if PurePath(loaded_from).is_absolute():
            replaced[loaded_from] = base
    return replaced


def _cut(text: str, replaced: dict[str, str]) -> str:
    """The text without these paths; JSON writes other letters than ASCII's as escapes."""
    for path in sorted(replaced, key=len, reverse=True):
        for written in dict.fromkeys((path, json.dumps(path)[1:-1])):
            whole = re.escape(written) + r"(?![\w/-])"
            text = re.sub(whole, lambda _, path=path: replaced[path], text)
    return text


def _manifest(
    version: Version, files: Sequence[PublishedFile], replaced: dict[str, str]
) -> PublishedFile:
    entries = {file.path: {"sha256": file.sha256, "size_bytes": file.size_bytes} for file in files}
    manifest = json.loads(_cut(version.paths.manifest.read_text("utf-8"), replaced))
    text = json.dumps({**manifest, "files": entries, MANIFEST_DIGEST: version.digest}, indent=2)
    return _from_bytes(MANIFEST, (text + "\n").encode("utf-8"), "(lists what is published)")


def _from_bytes(path: str, content: bytes, note: str = "") -> PublishedFile:
    return PublishedFile(path, content, hashlib.sha256(content).hexdigest(), note)
