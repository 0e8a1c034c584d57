"""The dashboard's buttons, samples and damaged files: who may change a sweep, and what a page says of it."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from test_analysis_dashboard import (
    HTML,
    TOKEN,
    Site,
    browser,
    curve,
    in_browser,
    make_sweep,
    make_trial,
    page,
    served,
)

from analysis.dashboard import DashboardOptions, make_app
from analysis.dashboard_promotion import Promotions
from analysis.dashboard_statistics import Statistics, compute
from analysis.live import SILENT_S, LiveSweep
from sweeps.requests import pending_requests
from training.exceptions import SweepError
from training.paths import SweepPaths

__all__ = ["browser", "page"]  # fixtures
DEFINITION = """\
name: made
method: random
parameters:
  lora_r: {values: [8, 16]}
  learning_rate: {min: 0.0001, max: 0.001, distribution: log_uniform_values}
  max_steps: {value: 40}
"""
OURS = {"Host": "127.0.0.1:8050", "Origin": "http://127.0.0.1:8050"}


@pytest.fixture
def paths(tmp_path: Path) -> SweepPaths:
    """Two finished trials, far apart, and one that trains."""
    paths = make_sweep(tmp_path / "runs" / "made")
    paths.definition.write_text(DEFINITION, encoding="utf-8")
    paths.study.touch()  # sweeps.run's
    for number in range(2):
        loss = 2.2 + number
        make_trial(paths, number, lines=curve(shift=number), loss=loss, state="complete")
    make_trial(paths, 2, lines=curve(20))
    return paths


@pytest.fixture
def site(paths: SweepPaths, tmp_path: Path) -> Iterator[Site]:
    with served(paths.root.parent, tmp_path / "output.txt") as site:
        yield site
        assert "Traceback" not in site.text()


def test_a_sweep_of_wandb_agents_takes_no_requests(paths: SweepPaths) -> None:
    paths.study.unlink()
    client, secret = make_client(paths.root.parent)
    answer = stop(client, secret, OURS)
    assert "nobody would take the request" in answer.text
    assert pending_requests(paths) == []


def stop(client: Any, secret: str, headers: dict[str, str]) -> Any:
    """The POST of a page in which "stop trial 2" was confirmed."""
    order = {"path": "/sweep/made/trial/2", "action": "stop", "numbers": [2], "values": {}}
    names = [("ask-error", "children"), ("outcome", "children"), ("done", "data")]
    key = next(name for name in client.application.callbacks if "outcome.children" in name)
    parts = key.strip(".").split("...")
    outputs = [
        {"id": part.rpartition(".")[0], "property": part.rpartition(".")[2]} for part in parts
    ]
    assert len(outputs) == len(names)
    body = {
        "output": key,
        "outputs": outputs,
        "inputs": [{"id": "order", "property": "data", "value": {**order, "secret": secret}}],
        "changedPropIds": ["order.data"],
    }
    return client.post("/_dash-update-component", json=body, headers=headers)


def make_client(root: Path, **options: Any) -> tuple[Any, str]:
    app = make_app(root, DashboardOptions(**options))
    client: Any = app.server.test_client()
    client.application.callbacks = list(app.callback_map) or [
        each["output"] for each in app._callback_list
    ]
    layout = json.loads(json.dumps(app.layout, default=lambda part: part.to_plotly_json()))
    [secret] = [
        part["props"]["data"]
        for part in layout["props"]["children"]
        if part["props"].get("id") == "secret"
    ]
    return client, secret


def test_another_site_s_page_cannot_stop_a_trial(paths: SweepPaths) -> None:
    client, secret = make_client(paths.root.parent)

    for origin in ("http://evil.example", "null"):
        assert stop(client, secret, {**OURS, "Origin": origin}).status_code == 403
    assert (
        "reload it" in stop(client, "guessed", OURS).text
    )  # a POST that says no Origin is no way in
    assert "reload it" in stop(client, "guessed", {"Host": "127.0.0.1:8050"}).text
    assert pending_requests(paths) == []

    assert "Asked trial 2 to stop" in stop(client, secret, OURS).text
    assert [request["action"] for request in pending_requests(paths)] == ["stop_trial"]


def test_from_afar_a_trial_is_stopped_with_the_token_only(paths: SweepPaths) -> None:
    client, secret = make_client(paths.root.parent, host="0.0.0.0", token=TOKEN)
    ours = {"Host": "192.0.2.7:8050", "Origin": "http://192.0.2.7:8050"}

    assert stop(client, secret, ours).status_code == 401
    assert pending_requests(paths) == []
    client.get("/", base_url="http://192.0.2.7:8050", query_string={"token": TOKEN})
    cookie = client.get_cookie("loraloom_8050", domain="192.0.2.7")
    headers = {**ours, "Cookie": f"loraloom_8050={cookie.value}"}
    assert "Asked trial 2 to stop" in stop(client, secret, headers).text


def test_a_read_only_dashboard_changes_nothing(paths: SweepPaths) -> None:
    client, secret = make_client(paths.root.parent, read_only=True)

    assert "nothing can be changed" in stop(client, secret, OURS).text
    assert pending_requests(paths) == []


@in_browser
def test_a_trial_is_stopped_after_a_question(site: Site, page: Any, paths: SweepPaths) -> None:
    page.goto(f"{site.address}/sweep/made/trial/2")
    page.get_by_role("button", name="Stop this trial").focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Stop this trial")
    dialog.get_by_text("Trial 2 ends at its next evaluation").wait_for()
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert pending_requests(paths) == []

    page.get_by_role("button", name="Stop this trial").click()
    dialog.get_by_role("button", name="Stop this trial").click()
    page.wait_for_selector("#outcome >> text=Asked trial 2 to stop")
    page.wait_for_selector("#trial-waiting >> text=the command that began it goes on")
    page.wait_for_selector("#trial-waiting >> text=stop trial 2")
    [request] = pending_requests(paths)
    assert (request["action"], request["number"]) == ("stop_trial", 2)


@in_browser
def test_a_setting_is_queued_or_refused_in_one_line(
    site: Site, page: Any, paths: SweepPaths
) -> None:
    page.goto(f"{site.address}/sweep/made")
    page.get_by_role("button", name="Queue a setting").click()
    dialog = page.get_by_role("dialog", name="Queue a setting")
    dialog.get_by_label("lora_r").select_option("16")
    dialog.get_by_label("learning_rate (0.0001 to 0.001)").fill("5")
    dialog.get_by_role("button", name="Queue a setting").click()
    page.wait_for_selector("#ask-error >> text=is 5.0, but must be from 0.0001 to 0.001")
    dialog.get_by_label("learning_rate (0.0001 to 0.001)").fill("5e-4")
    dialog.get_by_role("button", name="Queue a setting").click()
    page.wait_for_selector("#waiting >> text=train lora_r 16, learning_rate 0.0005")
    [request] = pending_requests(paths)
    assert request["params"] == {"lora_r": 16, "learning_rate": 5e-4}
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@in_browser
def test_the_leaders_get_seeds(site: Site, page: Any, paths: SweepPaths) -> None:
    page.goto(f"{site.address}/sweep/made")
    page.wait_for_selector("#findings li")
    dialog = page.get_by_role("dialog", name="Add seeds to the leaders")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # ties are the last that is computed
        page.get_by_role("button", name="Add seeds to the leaders").click()
        page.wait_for_selector("#ask-go:has-text('Add seeds')")
        page.wait_for_timeout(300)
        if dialog.get_by_label("num_seeds (1 to 100)").count():
            break
        dialog.get_by_role("button", name="Cancel").click()
    dialog.get_by_label("num_seeds (1 to 100)").fill("3")
    dialog.get_by_role("button", name="Add seeds").click()
    page.wait_for_selector("#waiting >> text=3 more seeds of trial 0")
    [request] = pending_requests(paths)
    assert (request["numbers"], request["num_seeds"]) == ([0], 3)


@in_browser
def test_a_promotion_shows_its_log_and_is_refused_twice(
    site: Site, page: Any, paths: SweepPaths
) -> None:
    paths.promoted.mkdir()
    page.goto(f"{site.address}/sweep/made/trial/1")
    button = page.get_by_role("button", name="Promote")
    dialog = page.get_by_role("dialog", name="Promote")
    with FileLock(paths.promotion_lock):
        button.click()
        dialog.get_by_text("Trial 1 is scored on the test split").wait_for()
        dialog.get_by_role("button", name="Promote").click()
        page.wait_for_selector("#ask-error >> text=another promotion is running")
    dialog.get_by_role("button", name="Promote").click()
    page.wait_for_selector("text=The promotion of trial 1 failed", timeout=60_000)
    assert "no adapter is there" in page.inner_text("#trial-waiting pre")


def test_a_running_promotion_is_named_and_no_other_begins(paths: SweepPaths) -> None:
    promotions = Promotions()
    promotions.start(paths, 1)
    state = promotions.state(paths)
    assert state is not None and state.is_running
    assert state.text == "Trial 1 is being promoted."
    with pytest.raises(SweepError, match="another promotion is running"):
        promotions.start(paths, 1)
    deadline = time.monotonic() + 60
    while state.is_running and time.monotonic() < deadline:
        time.sleep(0.1)
        state = promotions.state(paths)
        assert state is not None
    assert (state.text, state.is_running) == ("The promotion of trial 1 failed.", False)
    assert "no adapter is there" in state.log


def test_what_is_not_complete_is_not_promoted(paths: SweepPaths) -> None:
    with pytest.raises(SweepError, match="the trial is running, but must be complete"):
        Promotions().start(paths, 2)


@in_browser
def test_samples_stand_side_by_side_as_text(site: Site, page: Any, paths: SweepPaths) -> None:
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    trial = paths.trial(0)
    trial.samples.mkdir()
    for step, response in ((0, "no idea"), (40, f"<script>alert(1)</script>{HTML}")):
        answer = {"prompt": HTML, "response": response, "num_tokens": 7, "ended": step > 0}
        record = {"step": step, "max_new_tokens": 7, "samples": [answer]}
        trial.sample(step).write_text(json.dumps(record), encoding="utf-8")
    trial.sample(20).write_text("{torn", encoding="utf-8")
    page.goto(f"{site.address}/sweep/made/trial/0")
    page.wait_for_selector("#trial-samples .said")
    answers = page.locator("#trial-samples .answers > div")

    assert [text.split("\n")[0] for text in answers.all_inner_texts()] == [
        "base model (7 tokens, cut)",
        "step 40 (7 tokens)",
    ]
    assert "<script>alert(1)</script>" in answers.nth(1).inner_text()
    assert page.locator("#trial-samples img, #trial-samples script, #trial-samples b").count() == 0


def last(paths: SweepPaths) -> Statistics:
    return list(compute(paths.root))[-1]


@pytest.mark.parametrize("name", ["config.json", "result.json", "eval/40.parquet"])
def test_a_damaged_file_costs_its_trial_and_not_the_findings(paths: SweepPaths, name: str) -> None:
    damaged = paths.trial(1).root / name
    damaged.write_bytes(damaged.read_bytes()[:40])
    known = last(paths)

    assert known.findings and known.best == 0 and known.tied == (0,)
    [text] = known.left_out
    assert text.startswith(f"{damaged}: is damaged")


def test_a_trial_that_nobody_trains_any_more_is_stopped(paths: SweepPaths) -> None:
    sweep = LiveSweep(paths)
    sweep.refresh()
    assert sweep.trial(2).state == "running"  # type: ignore[union-attr]

    long_ago = time.time() - SILENT_S - 5
    for path in (paths.trial(2).config, paths.trial(2).metrics):
        os.utime(path, (long_ago, long_ago))
    with open(paths.lock, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep.refresh()
        assert sweep.trial(2).state == "running"  # type: ignore[union-attr]
    version = sweep.version
    sweep.refresh()
    sweep.refresh()
    assert sweep.trial(2).state == "stopped"  # type: ignore[union-attr]
    assert sweep.version > version
