"""The repository itself: pins, layout, links, and the names that must not be used."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGES = ("training", "sweeps", "analysis", "deploy")
TOP_LEVEL = ("environment.yml", "pyproject.toml", "Makefile", ".ci/run", "LICENSE", "bootstrap.py")
FORBIDDEN_NAMES = {"utils", "common", "helpers", "core", "misc", "gguf"}
LONGEST_FILE = 600
DOCUMENTS = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/LOG.md")])


def _modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _pins(project: dict[str, Any]) -> list[str]:
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return sorted(pin for group in groups for pin in group)


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_conda_installs_the_pins_of_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    [from_pip] = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]

    assert sorted(from_pip) == _pins(_project())


def test_every_requirement_is_pinned_exactly() -> None:
    assert [pin for pin in _pins(_project()) if not re.fullmatch(r"[\w-]+==[\w.]+", pin)] == []


def test_the_files_that_a_newcomer_looks_for_are_there() -> None:
    assert [name for name in (*TOP_LEVEL, *PACKAGES) if not (ROOT / name).exists()] == []


def test_no_file_is_named_after_nothing_or_shadows_a_library() -> None:
    names = [ROOT / "bootstrap.py", *_modules(), *(ROOT / "tests").rglob("*.py")]

    assert [str(path) for path in names if path.stem in FORBIDDEN_NAMES] == []
    assert [path for name in FORBIDDEN_NAMES for path in ROOT.glob(f"*/{name}/")] == []


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_for_and_stays_short(path: Path) -> None:
    text = path.read_text("utf-8")

    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_of_a_document_resolves(path: Path) -> None:
    prose = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose)
    targets = [first or second for first, second in links]
    relative = [link.split("#")[0] for link in targets if not re.match(r"[a-z]+:|#", link)]

    assert [link for link in relative if not (path.parent / link).exists()] == []


def test_nothing_imports_the_package_sweeps_of_wandb() -> None:
    """W&B's own sweep engine is a package `sweeps`: what imports it would find our folder."""
    pattern = re.compile(
        r"wandb[.]controller|wandb_controller|--controller\b|engine:\s*[\"']?wandb\b"
        r"|sweeps[.]scheduler[.]wandb\b|pip install .*wandb\[sweeps\]"
    )
    files = [*_modules(), *(ROOT / "sweeps").rglob("*.yaml"), ROOT / "Makefile", *DOCUMENTS]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        for line in path.read_text("utf-8").splitlines()
        if pattern.search(line)
    ]

    assert found == []


def test_every_package_imports_only_what_it_may() -> None:
    done = subprocess.run(
        [ROOT / ".venv" / "bin" / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout
