"""llama-cpp-python's wheel, compiled once per machine and kept in the cache.

`make setup` runs `python -m deploy.llama_cpp_wheel` in the background and installs what
`find_wheel` then finds. llama.cpp is compiled for the very CPU that builds it, so CPU and CMake
arguments are part of the wheel's key. Standard library only, since set-up runs it first.
"""

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from deploy.llama_cpp_source import PACKAGE, download_sdist, pinned_version
from training.exceptions import LoraloomError
from training.paths import cache_dir

COMPILERS = {"CC": ("cc", "gcc", "clang"), "CXX": ("c++", "g++", "clang++")}
"""Variable -> what CMake looks for where it is not set."""


def find_wheel(version: str) -> Path | None:
    """The wheel of `version` built for this machine, if it is in the cache."""
    return next(wheel_dir(version).glob("*.whl"), None)


def wheel_dir(version: str) -> Path:
    """Where this machine's wheel of `version` is kept."""
    built_for = hashlib.sha256(f"{_cpu_flags()} {cmake_arguments()}".encode()).hexdigest()[:12]
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    name = f"{PACKAGE}-{version}-{python}-{platform.machine()}-{built_for}"
    return cache_dir() / "wheels" / name


def build_log(version: str) -> Path:
    """Where set-up keeps what the build prints."""
    directory = wheel_dir(version)
    return directory.with_name(f"{directory.name}.log")


def build_wheel(version: str) -> int:
    """Compiles the wheel into the cache, on all cores; pip's exit status.

    One build at a time, also across clones: who waited finds the wheel there.
    """
    target = wheel_dir(version)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if find_wheel(version):
            return 0
        sdist = download_sdist(version)
        # Compiled inside the draft (TMPDIR), so that what a killed build left is cleared here.
        draft = target.parent / ".building"
        shutil.rmtree(draft, ignore_errors=True)
        (draft / "tmp").mkdir(parents=True)
        environment = {
            **os.environ,
            "TMPDIR": str(draft / "tmp"),
            "CMAKE_ARGS": cmake_arguments(),
            "CMAKE_BUILD_PARALLEL_LEVEL": str(num_cores()),
        }
        # Without pip's own cache of built wheels: it knows neither the CPU nor the CMake arguments.
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir"]
        command += ["--wheel-dir", str(draft / "out"), str(sdist)]
        status = subprocess.run(command, env=environment, check=False).returncode
        if status == 0:
            os.replace(draft / "out", target)
        shutil.rmtree(draft, ignore_errors=True)
        return status


def cmake_arguments() -> str:
    """llama.cpp without its image and TLS parts; with CUDA where a GPU and nvcc are there.

    And without AMX: GCC 12's `_tile_loadconfig` tells the compiler of the first 8 bytes of 64 that it reads,
    and where the others' stores are dropped the first batch of a quantised model ends in a segmentation
    fault (github.com/ggml-org/llama.cpp/issues/20824, found here at `ldtilecfg`).
    """
    arguments = ["-DLLAVA_BUILD=OFF", "-DLLAMA_OPENSSL=OFF"]
    if "amx_int8" in _cpu_flags().split():
        arguments.append("-DCMAKE_CXX_FLAGS=-mno-amx-int8")
    if has_gpu() and shutil.which("nvcc"):
        arguments.append("-DGGML_CUDA=on")
    return " ".join([*arguments, *os.environ.get("CMAKE_ARGS", "").split()])


def has_gpu() -> bool:
    """Whether an NVIDIA GPU and its driver are there."""
    if shutil.which("nvidia-smi") is None:
        return False
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU" in done.stdout


def num_cores() -> int:
    """Cores this process may use: of a shared machine often fewer than it has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def missing_compiler() -> str | None:
    """What to tell a user whose machine cannot compile C or C++; None where it can.

    CMake and Ninja are no matter: pip gets them from the package index where they are missing.
    """
    for variable, names in COMPILERS.items():
        wanted = shlex.split(os.environ.get(variable, ""))[:1] or names
        if not any(shutil.which(name) for name in wanted):
            on_mac = sys.platform == "darwin"
            command = "xcode-select --install" if on_mac else "sudo apt-get install build-essential"
            return f"building {PACKAGE} needs {' or '.join(wanted)}, but none is there: {command}"
    return None


def main() -> None:
    try:
        sys.exit(build_wheel(pinned_version()))
    except LoraloomError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _cpu_flags() -> str:
    """The CPU's instruction sets, which `-march=native` compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    flags = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return " ".join(sorted(flags[0].split())) if flags else platform.processor()


if __name__ == "__main__":
    main()
