"""llama.cpp's own converter, from the source distribution that llama-cpp-python is built from.

Converter and runtime thus always match. `make setup` runs `python -m deploy.llama_cpp_source`, which
downloads the source distribution with pip where it is not cached and keeps the converter in the cache:
`<cache>/llama.cpp-<version>/`. Standard library only, since set-up runs it before anything is installed.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path, PurePosixPath

from training.exceptions import LoraloomError, ModelError
from training.paths import cache_dir, write_directory

PACKAGE = "llama-cpp-python"
CONVERT_MODEL = "convert_hf_to_gguf.py"
CONVERT_ADAPTER = "convert_lora_to_gguf.py"
KEPT = (CONVERT_MODEL, CONVERT_ADAPTER, "conversion", "gguf-py", "LICENSE")
"""What is kept of the source distribution's `vendor/llama.cpp/`."""


def converter_dir(version: str | None = None) -> Path:
    """Directory of the converter that matches llama-cpp-python `version` (default: the installed one).

    Raises:
        ModelError: it is not in the cache.
    """
    version = version or runtime_version()
    directory = _directory(version)
    if not (directory / CONVERT_MODEL).is_file():
        raise ModelError(
            f"{directory}: llama.cpp's converter {version} is not there; `make setup` puts it there"
        )
    return directory


def ensure_converter(version: str | None = None, sdist: Path | None = None) -> Path:
    """The converter's directory; unpacked from `sdist`, which pip downloads if it is not given."""
    version = version or runtime_version()
    try:
        return converter_dir(version)
    except ModelError:
        pass
    directory = unpack_converter(sdist or download_sdist(version))
    if directory != _directory(version):
        raise ModelError(f"{sdist} holds {directory.name}, but must hold llama.cpp-{version}")
    return directory


def unpack_converter(sdist: Path) -> Path:
    """Puts the converter of a llama-cpp-python source distribution into the cache.

    Raises:
        ModelError: the file is no such source distribution, or is damaged.
    """
    try:
        with tarfile.open(sdist) as archive:
            members = _converter_members(archive)
            missing = set(KEPT) - {path.parts[0] for path in members.values()}
            if missing:
                raise ModelError(f"{sdist} has no vendor/llama.cpp/{min(missing)}")
            target = _directory(_version_of(next(iter(members)), sdist))
            write_directory(target, lambda directory: _extract(archive, members, directory))
    except (tarfile.TarError, EOFError, FileNotFoundError) as error:
        raise ModelError(
            f"{sdist} is not a readable source distribution of {PACKAGE}: {error}"
        ) from error
    return target


def download_sdist(version: str) -> Path:
    """The source distribution of `version`, in the cache; pip gets it where it is not there yet."""
    target = cache_dir() / f"llama_cpp_python-{version}.tar.gz"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
        command += ["--disable-pip-version-check", "--dest", folder, f"{PACKAGE}=={version}"]
        print(f"downloading the source distribution of {PACKAGE} {version} (77 MB) ...", flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not files:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            raise ModelError(f"pip could not download {PACKAGE}=={version}: {lines[-1]}")
        files[0].replace(target)
    return target


def runtime_version() -> str:
    """Version of llama-cpp-python: the installed one, else the one that pyproject.toml pins."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return pinned_version()


def pinned_version(pyproject: Path | None = None) -> str:
    """Version that pyproject.toml pins llama-cpp-python to."""
    pyproject = pyproject or Path(__file__).resolve().parent.parent / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text("utf-8")).get("project", {})
    groups = [project.get("dependencies", []), *project.get("optional-dependencies", {}).values()]
    for requirement in (item for group in groups for item in group):
        match = re.match(rf"{PACKAGE}\s*==\s*([\w.]+)", requirement)
        if match:
            return match[1]
    raise ModelError(f"{pyproject}: dependencies has no {PACKAGE}==VERSION")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.llama_cpp_source",
        description="Keep llama.cpp's converter, matched to llama-cpp-python, in the cache.",
    )
    parser.add_argument("--version", help=f"of {PACKAGE}; default: the installed or pinned one")
    parser.add_argument("--sdist", type=Path, help="source distribution to take it from")
    options = parser.parse_args()
    try:
        print(ensure_converter(options.version, options.sdist))
    except LoraloomError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _directory(version: str) -> Path:
    return cache_dir() / f"llama.cpp-{version}"


def _converter_members(archive: tarfile.TarFile) -> dict[tarfile.TarInfo, PurePosixPath]:
    """Regular files to keep, with their path below vendor/llama.cpp; links and ".." are left out."""
    members = {}
    for member in archive:
        path = PurePosixPath(member.name)
        if path.parts[1:3] != ("vendor", "llama.cpp") or len(path.parts) < 4 or not member.isfile():
            continue
        inner = PurePosixPath(*path.parts[3:])
        if inner.parts[0] in KEPT and ".." not in inner.parts and inner.parts[1:2] != ("tests",):
            members[member] = inner
    return members


def _version_of(member: tarfile.TarInfo, sdist: Path) -> str:
    match = re.fullmatch(r"llama_cpp_python-([\w.]+)", PurePosixPath(member.name).parts[0])
    if not match:
        raise ModelError(f"{sdist} is not a source distribution of {PACKAGE}")
    return match[1]


def _extract(
    archive: tarfile.TarFile, members: dict[tarfile.TarInfo, PurePosixPath], directory: Path
) -> None:
    for member, inner in members.items():
        content = archive.extractfile(member)
        assert content is not None, "regular files have content"
        path = directory / inner
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.read())


if __name__ == "__main__":
    main()
