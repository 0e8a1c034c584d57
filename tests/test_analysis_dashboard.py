"""The dashboard over sweeps written by hand: what is read, who is answered, the page in a real browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.dashboard import DashboardOptions, make_app, serve
from analysis.dashboard_figures import Drawings
from analysis.dashboard_pages import Pages
from analysis.dashboard_shared import drawn_from
from analysis.drawing import NUM_POINTS, thinned
from analysis.lines import COLUMNS, EVAL, STEP, TRAIN, parse_metrics
from analysis.live import LiveSweep, Runs
from training.config import TrialConfig
from training.exceptions import ConfigError
from training.paths import SweepPaths

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
HTML = "<img src=x onerror=alert(1)><b>bold</b>"
TOKEN = "a token of ours"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no `chromium` on the PATH")


def line(step: int, train: float | None = None, evaluated: float | None = None) -> str:
    record: dict[str, Any] = {"step": step, "time": 1.79e9 + 2 * step}
    if train is not None:
        record |= {"train/loss": train, "learning_rate": 2e-4, "grad_norm": 1.0}
    return json.dumps(record | ({} if evaluated is None else {"eval/loss": evaluated})) + "\n"


def make_sweep(root: Path) -> SweepPaths:
    paths = SweepPaths(root)
    paths.trials.mkdir(parents=True)
    paths.definition.write_text("name: made\nmethod: grid\n", encoding="utf-8")
    return paths


def make_trial(
    paths: SweepPaths,
    number: int,
    *,
    lines: str = "",
    loss: float | None = None,
    state: str | None = None,
    name: str | None = None,
    **result: Any,
) -> None:
    """One trial directory; a `state` ends it."""
    trial = paths.trial(number)
    trial.root.mkdir()
    params = {"learning_rate": 1e-4 * (number + 1)}
    settings = TrialConfig(max_steps=40).to_dict() | params
    config = {"number": number, "name": name or f"trial {number}", "settings": settings}
    trial.config.write_text(json.dumps({**config, "params": params}), encoding="utf-8")
    trial.metrics.write_text(lines, encoding="utf-8")
    if state is None:
        return
    record = {"state": state, "eval/loss": loss, "best_step": 40, "num_steps": 40, **result}
    trial.result.write_text(json.dumps({"train_time_s": 90.0, **record}), encoding="utf-8")
    if loss is not None:
        trial.evaluations.mkdir()
        noise = np.random.default_rng(0).normal(0, 0.1, 30)
        frame = {"example_id": range(30), "loss_sum": 10 * (loss + noise), "num_tokens": [10] * 30}
        pd.DataFrame(frame).to_parquet(trial.eval_losses(40))


def curve(last: int = 40, shift: float = 0.0) -> str:
    lines = [line(0, evaluated=3.0)]
    for step in range(1, last + 1):
        lines.append(line(step, train=3 - step / 40 + shift))
        if step % 10 == 0:
            lines.append(line(step, evaluated=3 - step / 50 + shift))
    return "".join(lines)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished trials, a pruned, a failed and a running one; a broken sweep and one of HTML."""
    root = tmp_path_factory.mktemp("runs")
    paths = make_sweep(root / "made")
    for number in range(3):
        lines = curve(shift=0.1 * number)
        make_trial(paths, number, lines=lines, loss=2.2 + 0.1 * number, state="complete")
    make_trial(paths, 3, lines=curve(10, 0.5), loss=2.9, state="pruned", num_steps=10)
    make_trial(paths, 4, state="failed", reason=HTML, name=HTML)
    make_trial(paths, 5, lines=curve(20, 0.05))
    paths.trial(4).log.write_text(f"Traceback: {HTML}\n", encoding="utf-8")
    decision = {"trial": 3, "step": 10, "loss": 2.9, "pruned": True, "rule": HTML, "time": 1.79e9}
    paths.decisions.write_text(json.dumps(decision) + "\n{torn", encoding="utf-8")
    broken = make_sweep(root / "broken")
    make_trial(broken, 0, lines=line(1, train=3.0)[:-9])
    broken.trial(0).config.write_text('{"number": 6, "sett', encoding="utf-8")
    make_trial(broken, 1, loss=float("nan"), state="complete", best_step=None)
    make_trial(broken, 2, state="failed")
    broken.trial(2).result.write_text('{"state": 7}', encoding="utf-8")
    strange = make_sweep(root / (HTML.replace("/", "") + "x" * 200))
    make_trial(strange, 0, lines="\x00\n[1]\n{}\n" + line(1, train=float("nan")), name="../" * 90)
    return root


# What is read


def follow(paths: SweepPaths) -> LiveSweep:
    sweep = LiveSweep(paths)
    sweep.refresh()
    return sweep


def test_only_whole_new_lines_are_read(tmp_path: Path) -> None:
    paths = make_sweep(tmp_path / "s")
    make_trial(paths, 0, lines=line(1, train=3.0) + line(2, train=2.5)[:-5])
    sweep = follow(paths)
    [trial] = sweep.trials.values()
    assert trial.metrics.table[:, STEP].tolist() == [1]
    version, offset = sweep.version, trial.metrics.file.offset

    sweep.refresh()
    assert (sweep.version, trial.metrics.file.offset) == (version, offset)

    with open(paths.trial(0).metrics, "a", encoding="utf-8") as file:
        file.write(line(2, train=2.5)[-5:] + line(3, evaluated=2.25))
    sweep.refresh()
    assert trial.metrics.table[:, STEP].tolist() == [1, 2, 3]
    assert trial.metrics.series(TRAIN)[:, TRAIN].tolist() == [3.0, 2.5]
    assert trial.metrics.series(EVAL)[:, EVAL].tolist() == [2.25]
    assert sweep.version > version


@pytest.mark.parametrize("is_in_place", [True, False])
def test_a_file_that_became_shorter_is_read_anew(tmp_path: Path, is_in_place: bool) -> None:
    paths = make_sweep(tmp_path / "s")
    make_trial(paths, 0, lines=curve(20))
    sweep = follow(paths)
    [trial] = sweep.trials.values()

    metrics = paths.trial(0).metrics
    target = metrics if is_in_place else metrics.with_name("draft")
    # Longer again than it was, by the time that it is looked at.
    target.write_text(curve(5) + "".join(line(s, train=1.0) for s in range(6, 60)), "utf-8")
    os.replace(target, metrics)
    sweep.refresh()

    assert trial.metrics.series(TRAIN)[:, STEP].tolist() == list(range(1, 60))
    metrics.write_text("", encoding="utf-8")
    sweep.refresh()
    assert len(trial.metrics.table) == 0


def test_both_parsers_give_the_same_numbers() -> None:
    text = "".join(line(step, train=1 / step) for step in range(1, 2000)).encode()
    fast = parse_metrics(text)
    slow = parse_metrics(text + b'{"step": "x"}\nnonsense\n')

    assert fast.shape == (1999, len(COLUMNS))
    np.testing.assert_array_equal(fast, slow)


def test_a_result_and_a_new_trial_are_seen(tmp_path: Path) -> None:
    paths = make_sweep(tmp_path / "s")
    make_trial(paths, 0, lines=curve(10))
    sweep = follow(paths)
    assert [(t.state, t.loss) for t in sweep.counted] == [("running", pytest.approx(2.8))]

    result = {"state": "complete", "eval/loss": 2.5, "num_steps": 40}
    paths.trial(0).result.write_text(json.dumps(result), encoding="utf-8")
    make_trial(paths, 1)
    sweep.refresh()

    assert [(t.number, t.state, t.loss) for t in sweep.counted] == [
        (0, "complete", 2.5),
        (1, "running", None),
    ]


def test_shared_steps_are_drawn_by_one_trial(tmp_path: Path) -> None:
    """1 and 2 forked from 0, and 2 is still running: it does not say so itself."""
    paths = make_sweep(tmp_path / "s")
    trunk = "".join(line(step, train=3.0 + step) for step in range(1, 21))
    own = "".join(line(step, train=9.0) for step in range(21, 41))
    make_trial(paths, 0, lines=trunk, loss=2.0, state="complete", steps_saved=0, num_steps=20)
    make_trial(paths, 1, lines=trunk + own, loss=2.1, state="complete", steps_saved=20)
    make_trial(paths, 2, lines=trunk + line(21, train=8.0))
    zero, one, two = follow(paths).counted

    assert drawn_from([zero, one, two]) == [0, 20, 20]
    assert drawn_from([one]) == [0]
    assert sorted(drawn_from([one, two])) == [0, 20]
    names = [trace["name"] for trace in Drawings().curves([zero, one, two])["data"]]
    assert names == [f"{n} trial {n} train/loss" for n in range(3)]


def test_a_long_curve_is_thinned_and_keeps_its_peak() -> None:
    steps, values = np.arange(10_000.0), np.zeros(10_000)
    values[4321] = 5.0
    kept_steps, kept = thinned(steps, values)

    assert len(kept) == NUM_POINTS and kept.max() == 5.0
    assert kept_steps[0] == 0 and kept_steps[-1] == 9999


def test_names_from_outside_never_become_a_path(runs: Path) -> None:
    found = Runs(runs)

    assert found.sweep("made") is not None
    for name in ("..", ".", "../runs", str(runs / "made"), "", "made/", "made\x00"):
        assert found.sweep(name) is None


# Who is answered


@pytest.fixture(scope="module")
def client(runs: Path) -> Any:
    return make_app(runs, DashboardOptions()).server.test_client()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "[::1]:8050"])
def test_this_machine_s_names_are_answered(client: Any, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8050", "127.0.0.1.evil.example"])
def test_another_host_name_is_refused(client: Any, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 403


def test_another_origin_is_refused(client: Any) -> None:
    def post(origin: str) -> int:
        headers = {"Host": "127.0.0.1:8050", "Origin": origin}
        return client.post("/_dash-update-component", json={}, headers=headers).status_code

    assert post("http://evil.example") == post("null") == post("http://127.0.0.1:9") == 403
    assert post("http://127.0.0.1:8050") != 403
    assert client.delete("/").status_code == 405


def test_a_token_lets_in_and_becomes_a_cookie(runs: Path) -> None:
    options = DashboardOptions(host="0.0.0.0", token=TOKEN)
    client = make_app(runs, options).server.test_client()
    ours, path = {"Host": "192.0.2.7:8050"}, "/sweep/made/trials.csv"

    assert client.get(path, headers=ours).status_code == 401
    assert client.get(path, headers=ours, query_string={"token": "wrong"}).status_code == 401
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert client.post("/_dash-update-component", headers=ours, json={}).status_code == 401
    with_token = client.get("/", base_url="http://192.0.2.7:8050", query_string={"token": TOKEN})
    cookie = with_token.headers["Set-Cookie"]
    assert with_token.status_code == 200
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
    assert client.get("/_dash-layout", base_url="http://192.0.2.7:8050").status_code == 200


def test_an_open_address_needs_a_token(runs: Path) -> None:
    for token in ("", "short"):
        with pytest.raises(ConfigError, match="--token"):
            make_app(runs, DashboardOptions(host="0.0.0.0", token=token))


def test_no_file_is_served_and_nothing_comes_from_elsewhere(client: Any) -> None:
    for path in ("/assets/pyproject.toml", "/assets/made/sweep.yaml", "/sweep/../trials.csv"):
        assert client.get(path, headers={"Host": "127.0.0.1"}).status_code == 404
    page = client.get("/", headers={"Host": "127.0.0.1"})
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "https://" not in page.text.split("<footer>")[0]
    assert 'src="http' not in page.text


def test_the_table_can_be_had_as_csv(client: Any) -> None:
    answer = client.get("/sweep/made/trials.csv", headers={"Host": "127.0.0.1"})
    header, first, second, *_ = answer.text.splitlines()

    assert header == (
        "trial,name,learning_rate,state,num_steps,eval/loss,difference,low_95,high_95,minutes"
    )
    assert first == "0,trial 0,0.0001,complete,40,2.2,,,,1.5"
    assert second.startswith("1,trial 1,0.0002,complete,40,2.3") and ",,," not in second


# The command


def test_bad_input_is_refused_in_one_line(tmp_path: Path, runs: Path) -> None:
    command = [sys.executable, "-m", "analysis.dashboard", str(tmp_path / "missing")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "is not a directory that can be read" in done.stderr

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port is {port}, which another program has"):
            serve(runs, DashboardOptions(port=port))
    with pytest.raises(ConfigError, match="must be from 0 to 65535"):
        serve(runs, DashboardOptions(port=70_000))
    with pytest.raises(ConfigError, match="cannot be listened at"):
        serve(runs, DashboardOptions(host="192.0.2.7", token=TOKEN))


# The page in a browser


@dataclass
class Site:
    address: str
    output: Path

    def text(self) -> str:
        return self.output.read_text("utf-8")


@contextmanager
def served(root: Path, output: Path) -> Iterator[Site]:
    command = [sys.executable, "-m", "analysis.dashboard", str(root), "--port", "0"]
    with (
        open(output, "w", encoding="utf-8") as file,
        subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file) as process,
    ):
        try:
            deadline = time.monotonic() + 60
            while "http://" not in output.read_text("utf-8") and time.monotonic() < deadline:
                time.sleep(0.1)
            address = "http://" + output.read_text("utf-8").split("http://")[1].split("/")[0]
            yield Site(address, output)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def site(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with served(runs, tmp_path_factory.mktemp("log") / "output.txt") as site:
        yield site
        assert "Traceback" not in site.text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which nothing may go wrong, and that asks no other machine."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    context.set_default_timeout(15_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else 0)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda r: (
            None
            if r.url.startswith(("http://127.0.0.1:", "data:", "blob:"))
            else problems.append(r.url)
        ),
    )
    yield page
    context.close()
    assert problems == []


def traces(page: Any, identity: str = "curves") -> list[str]:
    page.wait_for_selector(f"#{identity} .scatterlayer .trace")
    return page.evaluate(
        f"document.querySelector('#{identity} .js-plotly-plot').data.map(trace => trace.name)"
    )


@in_browser
def test_a_sweep_shows_its_leaderboard_and_curves(site: Site, page: Any) -> None:
    page.goto(f"{site.address}/")
    page.click("text=made")
    page.wait_for_selector("#board tbody tr")
    rows = [row.inner_text().split("\t") for row in page.query_selector_all("#board tbody tr")]

    assert [row[0] for row in rows][:3] == ["0 trial 0", "1 trial 1", "2 trial 2"]
    assert rows[0][1] == "2.2000" and rows[3][:2] == ["5 trial 5", "2.6500 so far"]
    assert {"0 trial 0", "3 trial 3", "5 trial 5"} <= set(traces(page))
    page.wait_for_selector("#findings li")  # computed beside the page
    page.wait_for_selector("#figure-slices .js-plotly-plot")
    page.wait_for_selector("text=/\\+0.1000 \\[\\+0.\\d+, \\+0.\\d+\\]/")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@in_browser
def test_a_new_point_appears_within_three_seconds(site: Site, page: Any, runs: Path) -> None:
    page.goto(f"{site.address}/sweep/made?trials=5")
    assert "5 trial 5" in traces(page)
    page.wait_for_timeout(500)

    with open(SweepPaths(runs / "made").trial(5).metrics, "a", encoding="utf-8") as file:
        file.write(line(30, train=2.0, evaluated=1.2345))
    page.wait_for_selector("text=1.2345 so far", timeout=3000)
    drawn = "document.querySelector('#curves .js-plotly-plot')._fullData.at(-1).y.at(-1)"
    deadline = time.monotonic() + 1
    while page.evaluate(drawn) > 1.24 and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert page.evaluate(drawn) == pytest.approx(1.2345)


@in_browser
def test_the_choice_of_trials_is_in_the_address(site: Site, page: Any) -> None:
    page.goto(f"{site.address}/sweep/made?trials=1,3")
    assert set(traces(page)) == {
        "1 trial 1", "1 trial 1 train/loss", "3 trial 3", "3 trial 3 train/loss",
    }  # fmt: skip
    assert page.locator("#chosen input:checked").count() == 2
    assert page.locator("#chosen-table tbody tr").count() > 3

    page.get_by_label("0 trial 0", exact=True).check()
    page.wait_for_url("**/sweep/made?trials=1,3,0")
    page.reload()
    page.wait_for_selector("#chosen input:checked")
    assert page.locator("#chosen input:checked").count() == 3


@in_browser
def test_names_with_html_are_text(site: Site, page: Any) -> None:
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.goto(f"{site.address}/")
    page.click("text=<img src=x")
    page.wait_for_selector("#board tbody tr")
    page.goto(f"{site.address}/sweep/made?trials=4")
    page.wait_for_selector("#board tbody tr")
    assert page.locator(f"#board a:has-text('{HTML}')").count() == 1
    page.goto(f"{site.address}/sweep/made/trial/4")
    page.wait_for_selector("pre")
    assert HTML in page.inner_text("pre") and HTML in page.inner_text("h1")
    assert page.locator("main img").count() == 0 and page.locator("main b").count() == 0


@in_browser
@pytest.mark.parametrize(("scheme", "rules"), [("light", None), ("dark", ["color-contrast"])])
def test_every_view_is_accessible(site: Site, browser: Any, scheme: Any, rules: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    # The page's own policy would not let axe in.
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    options = {"resultTypes": ["violations"]} | ({"runOnly": rules} if rules else {})
    for path in ("/", "/sweep/made?trials=0,1", "/sweep/made/trial/5", "/sweep/none"):
        page.goto(site.address + path)
        page.wait_for_selector("main h1")
        if "made" in path:
            page.wait_for_selector(".scatterlayer .trace")
        found = Axe().run(page, options=options).response["violations"]
        assert [(path, each["id"], each["nodes"][0]["html"]) for each in found] == []
    context.close()


@in_browser
def test_a_broken_sweep_is_shown_as_far_as_it_can_be_read(site: Site, page: Any) -> None:
    page.goto(f"{site.address}/sweep/broken")
    page.wait_for_selector("#board tbody tr")
    assert page.locator("#board .damaged").count() == 2
    page.wait_for_selector("#findings >> text=is damaged")
    page.goto(f"{site.address}/sweep/broken/trial/0")
    page.wait_for_selector("text=is damaged, but must be whole JSON")


@in_browser
def test_the_page_can_be_used_with_the_keyboard(site: Site, page: Any) -> None:
    page.goto(f"{site.address}/sweep/made")
    traces(page)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(e => e.getAttribute('aria-label') || e.textContent || e.id)(document.activeElement)"
            )
        )
    assert {"Leaderboard", "0 trial 0", "Trials to compare", "trials.csv"} <= reached
    assert {"Download plot as a PNG", "Prunings"} <= reached


@in_browser
def test_a_sweep_that_begins_while_the_page_is_open_appears(
    site: Site, page: Any, runs: Path
) -> None:
    page.goto(site.address)
    page.wait_for_selector("text=made")
    make_trial(make_sweep(runs / "begun"), 0, state="failed", reason="no memory")
    page.wait_for_selector("text=begun", timeout=4000)
    page.click("text=begun")
    page.wait_for_selector("text=no trial has finished")
    shutil.rmtree(runs / "begun")
    page.goto(f"{site.address}/sweep/begun")
    page.wait_for_selector("text=There is no such sweep")


def test_a_directory_without_sweeps_says_how_one_begins(tmp_path: Path) -> None:
    pages = Pages(Runs(tmp_path), tmp_path)

    assert "holds no sweep yet" in json.dumps(pages.page("/", "").to_plotly_json(), default=repr)
