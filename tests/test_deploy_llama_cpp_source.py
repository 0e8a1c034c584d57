"""llama.cpp's converter in the cache."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from deploy.llama_cpp_source import (
    KEPT,
    converter_dir,
    ensure_converter,
    pinned_version,
    unpack_converter,
)
from training.exceptions import ModelError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _sdist(path: Path, names: list[str], version: str = "9.9.9") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(f"llama_cpp_python-{version}/vendor/llama.cpp/{name}")
            member.size = len(b"text")
            archive.addfile(member, io.BytesIO(b"text"))
        link = tarfile.TarInfo(f"llama_cpp_python-{version}/vendor/llama.cpp/conversion/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def _complete() -> list[str]:
    return [
        *(name if "." in name or name == "LICENSE" else f"{name}/a/module.py" for name in KEPT),
        "conversion/../../../../escaped.py",
        "src/llama.cpp",
    ]


def test_the_converter_of_a_source_distribution_is_kept_under_its_version(
    tmp_path: Path, cache: Path
) -> None:
    directory = unpack_converter(_sdist(tmp_path / "x.tar.gz", _complete()))

    assert directory == cache / "llama.cpp-9.9.9" == converter_dir("9.9.9")
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert files == {
        "convert_hf_to_gguf.py",
        "convert_lora_to_gguf.py",
        "conversion/a/module.py",
        "gguf-py/a/module.py",
        "LICENSE",
    }
    assert not list(tmp_path.rglob("escaped.py"))


def test_a_second_call_needs_no_source_distribution(tmp_path: Path) -> None:
    first = ensure_converter("9.9.9", _sdist(tmp_path / "x.tar.gz", _complete()))

    assert ensure_converter("9.9.9") == first


def test_a_source_distribution_without_the_converter_leaves_nothing(
    tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(ModelError, match=r"x\.tar\.gz has no vendor/llama\.cpp/LICENSE"):
        unpack_converter(_sdist(tmp_path / "x.tar.gz", _complete()[:4]))

    assert not list(cache.glob("*"))


def test_a_damaged_source_distribution_is_named(tmp_path: Path) -> None:
    sdist = _sdist(tmp_path / "x.tar.gz", _complete())
    sdist.write_bytes(sdist.read_bytes()[:150])

    with pytest.raises(ModelError, match=r"x\.tar\.gz is not a readable source distribution"):
        unpack_converter(sdist)


def test_a_source_distribution_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"holds llama\.cpp-1\.0, but must hold llama\.cpp-9\.9\.9"
    ):
        ensure_converter("9.9.9", _sdist(tmp_path / "x.tar.gz", _complete(), "1.0"))


def test_a_missing_converter_says_what_puts_it_there() -> None:
    with pytest.raises(ModelError, match=r"9.9.9 is not there; `make setup` puts it there"):
        converter_dir("9.9.9")


def test_the_pinned_version_is_read_from_pyproject(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\ndependencies = ["torch==2", "llama-cpp-python==1.2.3"]\n')

    assert pinned_version(pyproject) == "1.2.3"


def test_the_command_runs_on_the_standard_library_alone(tmp_path: Path) -> None:
    sdist = _sdist(tmp_path / "x.tar.gz", _complete())
    command = [sys.executable, "-S", "-m", "deploy.llama_cpp_source"]
    command += ["--version", "9.9.9", "--sdist", str(sdist)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("llama.cpp-9.9.9")


def test_the_command_ends_with_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.llama_cpp_source", "--version", "9.9.9"]

    done = subprocess.run(
        [*command, "--sdist", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
