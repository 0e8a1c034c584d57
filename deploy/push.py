"""Publishes a promoted version on the Hugging Face hub: GGUF files, adapter, card, and a Space to try it.

    python -m deploy.push runs/NAME USER/REPO --dry_run    # lists what would be sent; needs no network
    python -m deploy.push runs/NAME USER/REPO --space

Every file is checked against the manifest first. The large ones are uploaded one by one, and then a single
commit shows all: a repo holds the version before or this one, never some of both. A push that failed half-way
goes on with the same command: what the hub already has, by its hash, is not sent again. Repos are private
unless `--public`.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    logging,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from deploy.chat import find_gguf
from deploy.publication import (
    MANIFEST_DIGEST,
    PublishedFile,
    published_files,
    read_version,
    space_files,
)
from training.cli import make_parser, parse, run_command
from training.exceptions import ConfigError, ModelError
from training.paths import PromotionPaths, read_json

MODEL, SPACE = "model", "space"
LARGE_FILE_BYTES = 5_000_000
"""Files above it are uploaded one by one, and named."""
COMMIT_MESSAGE = "A version promoted by Loraloom"
UNTOUCHED = {".gitattributes"}
"""What a repo holds that was created and not written to."""


@dataclass
class PushOptions:
    """Options of `python -m deploy.push`."""

    space: bool = field(
        default=False,
        metadata={"help": "Also make a Gradio Space of the same name, where people can try it."},
    )
    public: bool = field(
        default=False, metadata={"help": "Make new repos public; otherwise they are private."}
    )
    merged: bool = field(
        default=False, metadata={"help": "Send the merged model for Transformers too."}
    )
    update: bool = field(
        default=False,
        metadata={"help": "Replace what is in the repo, although another push made it."},
    )
    license: str = field(
        default="", metadata={"help": "Licence in the card; empty is the base model's on the hub."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check and list the files, and send nothing."}
    )


@dataclass
class Target:
    """A repo on the hub and what it already holds."""

    api: HfApi
    repo_id: str
    repo_type: str
    head: str | None
    """The commit that a push builds upon."""
    present: dict[str, str]
    """Git or, for large files, SHA-256 hash by path."""
    is_ours: bool
    """Made by a push of this same version, or untouched."""
    old_files: set[str]
    """What an earlier push sent here."""


def main() -> None:
    parser = make_parser("deploy.push", __doc__ or "", [PushOptions])
    parser.add_argument("promoted", help="a sweep's directory, or promoted/NUMBER")
    parser.add_argument("repo_id", help="the repo's name on the hub, USER/NAME or NAME")
    options, positional = parse(parser)
    disable_progress_bars()
    logging.set_verbosity_error()  # "No files have been modified" is no news here
    push(Path(positional.promoted), positional.repo_id, options)


def push(promoted: Path, repo_id: str, options: PushOptions) -> None:
    """Sends the version, or what the repo lacks of it.

    Raises:
        ConfigError: the name is wrong or taken, or there is no token.
        ModelError: nothing promoted is there, a file was tampered with, or the hub failed.
    """
    _check_name(repo_id)
    if promoted.is_file():
        raise ModelError(f"{promoted} is a file, but must be a sweep or promoted/NUMBER")
    paths = PromotionPaths(find_gguf(promoted).parent)
    version = read_version(paths)
    if options.dry_run:
        _show(repo_id, MODEL, published_files(version, options.merged, options.license))
        if options.space:
            _show(repo_id, SPACE, space_files(version, repo_id, options.license))
        print("a dry run: nothing was sent")
        return
    api = HfApi(token=_token())
    with _hub_failures(repo_id):
        user = api.whoami()["name"]
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    licence = options.license or _licence_of_base(api, version.manifest)
    model = _prepare(api, repo_id, MODEL, version.digest, options)
    space = _prepare(api, repo_id, SPACE, version.digest, options) if options.space else None
    _send(model, published_files(version, options.merged, licence))
    if space is not None:
        _send(space, space_files(version, repo_id, licence))
        if not options.public:
            print(
                "a Space reads a private model only with a token: add one that may read it as the "
                "secret HF_TOKEN in the Space's settings"
            )


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(
            f"repo_id is {repo_id!r}, but must be USER/NAME or NAME of letters, digits, '-', '_', "
            "'.', 96 characters at most"
        ) from error


def _token() -> str:
    token = get_token()
    if token is None:
        raise ConfigError(
            "there is no Hugging Face token: set HF_TOKEN to one that may write, or run `hf auth login`"
        )
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, but a push needs the hub")
    return token


def _licence_of_base(api: HfApi, manifest: dict[str, Any]) -> str:
    """What the base model's card names; empty where the hub does not say."""
    base = manifest.get("base_model") or ""
    if not manifest.get("base_is_hub_id"):
        return ""
    try:
        validate_repo_id(base)
        card = api.model_info(base).card_data
    except (OSError, ValueError, httpx2.HTTPError):
        return ""
    name = card.get("license") if card is not None else None
    return name if isinstance(name, str) else ""


def _prepare(api: HfApi, repo_id: str, repo_type: str, digest: str, options: PushOptions) -> Target:
    """The repo, created if it is not there.

    Raises:
        ConfigError: it is there and is another's.
    """
    is_new = False
    with _hub_failures(repo_id):
        try:
            info = api.repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            sdk = "gradio" if repo_type == SPACE else None
            api.create_repo(repo_id, repo_type=repo_type, private=not options.public, space_sdk=sdk)
            info = api.repo_info(repo_id, repo_type=repo_type)
            is_new = True
        present = _present(api, repo_id, repo_type)
        marker = _marker(api, repo_id, repo_type) if _marker_name(repo_type) in present else {}
    if bool(info.private) == options.public:
        print(
            f"{_url(api, repo_id, repo_type)} stays {'private' if info.private else 'public'}: its "
            "settings on the hub change that"
        )
    # The hub gives a Space a card of its own, which tells it by what it runs.
    untouched = UNTOUCHED | ({"README.md"} if repo_type == SPACE else set())
    old_files = marker.get("files")
    target = Target(
        api,
        repo_id,
        repo_type,
        head=info.sha,
        present=present,
        is_ours=is_new or not set(present) - untouched or marker.get(MANIFEST_DIGEST) == digest,
        old_files=set(old_files) if isinstance(old_files, dict) else set(),
    )
    if repo_type == SPACE and marker.get("model_repo") == repo_id:
        target.is_ours = True  # our Space, of an earlier version of this model
    if not target.is_ours and not options.update:
        raise ConfigError(
            f"{_url(api, repo_id, repo_type)} exists and holds something else; --update replaces "
            "it, another name leaves it"
        )
    return target


def _present(api: HfApi, repo_id: str, repo_type: str) -> dict[str, str]:
    tree = api.list_repo_tree(repo_id, recursive=True, repo_type=repo_type)
    hashes = {}
    for entry in tree:
        lfs = getattr(entry, "lfs", None)
        if hasattr(entry, "blob_id"):
            hashes[entry.path] = lfs.sha256 if lfs is not None else entry.blob_id  # pyright: ignore[reportAttributeAccessIssue]
    return hashes


def _marker_name(repo_type: str) -> str:
    """The file that tells which version a repo was made of."""
    return "space.json" if repo_type == SPACE else "manifest.json"


def _marker(api: HfApi, repo_id: str, repo_type: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        name = _marker_name(repo_type)
        path = api.hf_hub_download(repo_id, name, repo_type=repo_type, local_dir=scratch)
        try:
            found = read_json(Path(path))
        except ValueError:
            return {}
    return found if isinstance(found, dict) else {}


def _send(target: Target, files: Sequence[PublishedFile]) -> None:
    """Uploads what the hub lacks, and commits it all at once."""
    url = _url(target.api, target.repo_id, target.repo_type)
    missing = [file for file in files if not file.is_in(target.present)]
    if not missing:
        print(f"{url} holds all {len(files)} files already")
        return
    total = _megabytes(sum(file.size_bytes for file in missing))
    print(f"{url}: {len(missing)} of {len(files)} files to send, {total}", flush=True)
    stale = sorted((target.old_files & set(target.present)) - {file.path for file in files})
    operations: list[Any] = [CommitOperationDelete(path) for path in stale]
    for file in missing:
        addition = CommitOperationAdd(file.path, file.content)
        if file.size_bytes > LARGE_FILE_BYTES:
            print(f"  {file.path}, {_megabytes(file.size_bytes)}", flush=True)
            with _hub_failures(f"{target.repo_id}: {file.path}"):
                target.api.preupload_lfs_files(
                    target.repo_id, [addition], repo_type=target.repo_type
                )
        operations.append(addition)
    with _hub_failures(target.repo_id):
        target.api.create_commit(
            target.repo_id,
            operations,
            commit_message=COMMIT_MESSAGE,
            repo_type=target.repo_type,
            parent_commit=target.head,
        )
    print(f"  sent: {url}")


@contextmanager
def _hub_failures(what: str) -> Iterator[None]:
    """What the hub or the network refuses is one line, and no loss: see the module."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, httpx2.HTTPError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ModelError(f"{what}: {reason}; the same command goes on from here") from error


def _show(repo_id: str, repo_type: str, files: Sequence[PublishedFile]) -> None:
    print(f"{repo_id} ({repo_type}):")
    for file in files:
        note = f"  {file.note}" if file.note else ""
        print(f"  {_megabytes(file.size_bytes):>12}  {file.path}{note}")
    total = _megabytes(sum(file.size_bytes for file in files))
    print(f"  {total:>12}  in all, {len(files)} files")


def _url(api: HfApi, repo_id: str, repo_type: str) -> str:
    return f"{api.endpoint}/{'spaces/' if repo_type == SPACE else ''}{repo_id}"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.3f} MB" if size_bytes < 1e6 else f"{size_bytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_command(main)
