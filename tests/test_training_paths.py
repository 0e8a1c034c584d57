"""What is written appears whole or not at all, and a full disk is told as such."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from training.paths import recover_directory, write_atomic, write_directory, write_text

WRITERS = [write_atomic, write_directory]


def test_a_directory_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int | str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        done.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        done.append(target.name)
        replace(source, target)

    def write(directory: Path) -> None:
        (directory / "inner").mkdir()
        (directory / "inner" / "b").touch()
        (directory / "a").touch()

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    path = tmp_path / "adapter"
    write_directory(path, write)
    whole = {entry.stat().st_ino for entry in (path, *path.rglob("*"))}
    assert len(whole) == 4
    assert whole == set(done[: done.index("adapter")])
    assert done[-1] == tmp_path.stat().st_ino


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_safetensors_words_for_a_full_disk_become_the_error_that_everyone_handles(
    tmp_path: Path, write: Callable[[Path, Callable[[Path], None]], None], code: int
) -> None:
    def fill_disk(temporary: Path) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: full (os error {code})")

    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "x", fill_disk)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", WRITERS)
def test_any_other_error_of_safetensors_stays_what_it_is(
    tmp_path: Path, write: Callable[[Path, Callable[[Path], None]], None]
) -> None:
    def refuse(temporary: Path) -> None:
        raise SafetensorError("Error while serializing: invalid tensor (os error 5)")

    with pytest.raises(SafetensorError):
        write(tmp_path / "x", refuse)


def test_a_directory_whose_replacement_was_killed_is_the_old_one_again(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_text(
        tmp_path / ".state.old" / "file", "old"
    )  # moved away, the new one not yet in its place
    write_text(tmp_path / ".state.0123abcd" / "file", "draft")
    recover_directory(path)
    assert (path / "file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
