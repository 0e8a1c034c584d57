"""The Space's app on a promoted version, in a real browser."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deploy_sweep import promoted, tiny_base

from deploy.export_gguf import export_gguf
from training.paths import PromotionPaths

ROOT = Path(__file__).parent.parent
APP = ROOT / "deploy" / "space" / "app.py"
CHROMIUM = shutil.which("chromium")

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no `chromium` on the PATH")


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> PromotionPaths:
    return promoted(tmp_path_factory.getbasetemp())


def run_app(directory: Path, output: Path) -> Iterator[str]:
    command = [sys.executable, str(APP), str(directory)]
    with (
        open(output, "w", encoding="utf-8") as file,
        subprocess.Popen(command, cwd=output.parent, stdout=file, stderr=file) as process,
    ):
        try:
            deadline = time.monotonic() + 90
            while "http://" not in output.read_text("utf-8") and time.monotonic() < deadline:
                assert process.poll() is None, output.read_text("utf-8")
                time.sleep(0.1)
            yield output.read_text("utf-8").split("URL:")[1].split()[0]
        finally:
            process.terminate()
    assert "Traceback" not in output.read_text("utf-8")


@pytest.fixture(scope="module")
def address(version: PromotionPaths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from run_app(version.root, tmp_path_factory.mktemp("log") / "output.txt")


@in_browser
def test_a_prompt_is_answered_while_one_watches_and_a_second_turn_too(address: str) -> None:
    from playwright.sync_api import sync_playwright

    problems: list[str] = []
    assert address.startswith("http://127.0.0.1:")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        # The tiny model knows first turns only: of the second one all that counts is that it comes.
        for number, parity, end in ((1, "12", "^(Yes, it is|No, it is odd)"), (2, "7", "it is.*")):
            page.get_by_label("Prompt").fill(f"Is {parity} even?")
            page.keyboard.press("Enter")
            answer = page.locator("#tuned .message.bot").nth(number - 1)
            answer.get_by_text(re.compile(rf"{end}\.$")).wait_for()
        browser.close()
    assert problems == []


def test_base_and_tuned_grow_in_turn(
    version: PromotionPaths, tmp_path_factory: pytest.TempPathFactory, app: Any
) -> None:
    base = tmp_path_factory.mktemp("base") / "base.gguf"
    export_gguf(tiny_base(tmp_path_factory.getbasetemp()), base, "base")
    files = app.Files("tiny", next(iter(version.root.glob("*Q4_K_M.gguf"))), base=base)
    models = app.load(files)
    question = {"role": "user", "content": "Is 12 even?"}

    seen = [
        tuple(len(chat[-1]["content"]) for chat in chats)
        for chats in app.answers(models, [[question], [question]], "", 12, 0.0)
    ]

    assert list(models) == ["Base", "Tuned"]
    both = [index for index, lengths in enumerate(seen) if all(lengths)]
    assert both[0] < 4  # neither waits for the other's end
    assert len(both) > 3


def test_the_page_needs_a_promoted_version(tmp_path: Path) -> None:
    command = [sys.executable, str(APP), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert "holds no manifest.json" in line


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as a Space runs it: not as a part of `deploy`."""
    import importlib

    monkeypatch.syspath_prepend(str(APP.parent))
    return importlib.import_module("app")
