"""The promoted versions of a sweep: `promoted/0001/`, `0002/`, …, and `current`, which names the one in use.

    python -m deploy.registry runs/NAME                  lists them
    python -m deploy.registry runs/NAME --verify [N]     hashes every file of all versions, or of one
    python -m deploy.registry runs/NAME --rollback [N]   makes an older one the current one again

A version is published whole, is read-only from then on, and its number is not given to another while
`current` or a later one tells of it. A rollback moves the pointer alone, and only to a version that is whole.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from deploy.manifest import find_changes, read_manifest
from training.cli import make_parser, parse, run_command
from training.exceptions import ConfigError, ModelError, SweepError
from training.paths import PromotionPaths, SweepPaths, sync_directory, write_text

UNASKED, DEFAULT = -1, 0


@dataclass
class RegistryOptions:
    """Options of `python -m deploy.registry`."""

    rollback: int = field(
        default=UNASKED,
        metadata={
            "nargs": "?",
            "const": DEFAULT,
            "help": "Makes version N the current one; without N the one before.",
        },
    )
    verify: int = field(
        default=UNASKED,
        metadata={
            "nargs": "?",
            "const": DEFAULT,
            "help": "Compares version N with its manifest; without N all of them.",
        },
    )


def main() -> None:
    parser = make_parser("deploy.registry", __doc__ or "", [RegistryOptions])
    parser.add_argument("sweep", help="the sweep's directory, runs/NAME")
    options, positional = parse(parser)
    paths = SweepPaths(Path(positional.sweep))
    if options.rollback != UNASKED and options.verify != UNASKED:
        raise ConfigError("--rollback and --verify are both given, but must be one")
    if not list_versions(paths):
        raise SweepError(
            f"{paths.root} holds nothing promoted; `python -m deploy.promote {paths.root}` promotes a trial"
        )
    if options.verify != UNASKED:
        verify(paths, options.verify)
    elif options.rollback != UNASKED:
        version = rollback(paths, options.rollback)
        print(f"{paths.current_promotion}: {version.root.name}")
    else:
        print(versions_table(paths).to_string(index=False))


def list_versions(paths: SweepPaths) -> list[int]:
    """Numbers of the versions that are there, ascending."""
    return sorted(int(path.name) for path in paths.promoted.glob("[0-9]*") if path.name.isdigit())


def current_version(paths: SweepPaths) -> PromotionPaths:
    """The version in use.

    Raises:
        ModelError: nothing was promoted, or the version was removed.
    """
    number = current_number(paths)
    if not number:
        raise ModelError(
            f"{paths.root} holds nothing promoted; `python -m deploy.promote {paths.root}` promotes a trial"
        )
    if number not in list_versions(paths):
        there = ", ".join(map(str, list_versions(paths))) or "none"
        raise ModelError(
            f"{paths.current_promotion}: names version {number}, which is not there (there: {there}); "
            f"`python -m deploy.registry {paths.root} --rollback` takes the one before"
        )
    return paths.promotion(number)


def versions_table(paths: SweepPaths) -> pd.DataFrame:
    """One row a version; one whose manifest cannot be read says so."""
    current = current_number(paths)
    rows = []
    for number in list_versions(paths):
        version = paths.promotion(number)
        mark = "*" if number == current else ""
        try:
            manifest = read_manifest(version)
        except ModelError:
            rows.append((mark, number, "", "", "", "damaged manifest", "", "", ""))
            continue
        loss = manifest.get("test_loss")
        rows.append(
            (
                mark,
                number,
                manifest["trial"],
                manifest["step"],
                "" if loss is None else f"{loss:.4f}",
                " ".join(manifest["ggufs"]) + (" (forced)" if manifest.get("forced") else ""),
                f"{sum(entry['size_bytes'] for entry in manifest['files'].values()) / 1e6:,.1f}",
                manifest["created"][:16].replace("T", " "),
                manifest.get("content_sha256", "")[:12],
            )
        )
    header = [
        "",
        "version",
        "trial",
        "step",
        "test loss",
        "types",
        "MB",
        "created (UTC)",
        "content",
    ]
    return pd.DataFrame(rows, columns=header)


def verify(paths: SweepPaths, number: int = DEFAULT) -> None:
    """Compares one version, or all, with the manifest, file by file.

    Raises:
        SweepError: a file was changed, is missing or is not in the manifest; they are printed first.
    """
    numbers = list_versions(paths) if number == DEFAULT else [_known(paths, number)]
    wrong = []
    for each in numbers:
        version = paths.promotion(each)
        try:
            changes = find_changes(version)
        except ModelError as error:
            changes = [str(error)]
        files = "as promoted" if not changes else f"{len(changes)} wrong"
        print(f"{version.root}: {files}")
        for change in changes:
            print(f"  {change}")
        wrong += [version.root.name] if changes else []
    if wrong:
        raise SweepError(
            f"{paths.promoted}: version {', '.join(wrong)} is not as it was promoted, but must be"
        )


def rollback(paths: SweepPaths, number: int = DEFAULT) -> PromotionPaths:
    """Makes an older version the current one, or the one of that number.

    Raises:
        SweepError: it is not there, is not as it was promoted, or a promotion is running.
    """
    with registry_lock(paths):
        if number == DEFAULT:
            current = current_number(paths)
            older = [each for each in list_versions(paths) if each < current]
            if not older:
                raise SweepError(
                    f"{paths.promoted}: no version is older than the current one, {current}"
                )
            number = older[-1]
        version = paths.promotion(_known(paths, number))
        try:
            changes = find_changes(version)
        except ModelError as error:
            changes = [str(error)]
        if changes:
            raise SweepError(f"{version.root}: not as it was promoted, but must be: {changes[0]}")
        write_text(paths.current_promotion, version.root.name + "\n")
    return version


@contextlib.contextmanager
def registry_lock(paths: SweepPaths) -> Iterator[None]:
    """Held by whoever changes the registry.

    Raises:
        SweepError: somebody else does.
    """
    paths.promoted.mkdir(parents=True, exist_ok=True)
    lock = FileLock(paths.promotion_lock, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SweepError(f"{paths.root}: another promotion is running") from None
    try:
        _finish_publication(paths)
        yield
    finally:
        lock.release()


def publish(paths: SweepPaths, draft: PromotionPaths) -> PromotionPaths:
    """Gives the draft the next number, read-only, and makes it the current version."""
    # A version that was removed by hand was somebody's: its number is not reused while `current` knows it.
    number = max([*list_versions(paths), current_number(paths)]) + 1
    version = paths.promotion(number)
    for path in draft.root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    sync_directory(draft.root)
    # Whoever holds the lock next finishes what a kill interrupts from here on.
    write_text(paths.publication, version.root.name + "\n")
    os.rename(draft.root, version.root)
    _finish_publication(paths)
    return version


def _finish_publication(paths: SweepPaths) -> None:
    """Makes the version that is being published the current one, if it is there."""
    number = _number_in(paths.publication)
    if number and paths.promotion(number).root.is_dir():
        write_text(paths.current_promotion, paths.promotion(number).root.name + "\n")
    paths.publication.unlink(missing_ok=True)


def find_gguf(path: Path) -> Path:
    """The GGUF to run: the file itself, or the first one of a promoted version's manifest.

    Raises:
        ModelError: nothing promoted is there, or the file is not whole.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise ModelError(f"{path} is not there, but must be a sweep, promoted/NUMBER, or a .gguf")
    version = PromotionPaths(path)
    if not version.manifest.is_file():
        sweep = SweepPaths(path.parent if path.name == SweepPaths(path).promoted.name else path)
        version = current_version(sweep)
    manifest = read_manifest(version)
    name = next(iter(manifest["ggufs"].values()))
    gguf = version.root / name
    expected = manifest["files"][name]["size_bytes"]
    size = gguf.stat().st_size if gguf.is_file() else 0
    if size != expected:
        raise ModelError(
            f"{gguf}: is {size:,} bytes, but must be {expected:,} ({version.manifest})"
        )
    return gguf


def _known(paths: SweepPaths, number: int) -> int:
    known = list_versions(paths)
    if number not in known:
        there = ", ".join(map(str, known)) or "none"
        raise SweepError(f"{paths.promoted}: version {number} is not there (there: {there})")
    return number


def current_number(paths: SweepPaths) -> int:
    """What `current` says, or a kill kept it from saying; 0 without a version.

    Raises:
        SweepError: it says something else than a number.
    """
    published = _number_in(paths.publication)
    if published and paths.promotion(published).root.is_dir():
        return published
    return _number_in(paths.current_promotion)


def _number_in(path: Path) -> int:
    try:
        text = path.read_text("utf-8").strip()
    except FileNotFoundError:
        return 0
    if not text.isdigit():
        raise SweepError(f"{path}: is {text[:20]!r}, but must be a version's number")
    return int(text)


if __name__ == "__main__":
    run_command(main)
