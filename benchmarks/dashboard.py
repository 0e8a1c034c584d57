"""How fast the dashboard is over 200 trials of 10,000 steps, every metrics.jsonl as training writes it.

    python -m benchmarks.dashboard      about two minutes

The sweep is made up, in a temporary directory. The page is opened while nothing has been read yet (in a
headless Chromium, where there is one), then eight trials gain steps between updates, as in a running pack.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from dash.exceptions import PreventUpdate
from werkzeug.serving import make_server

from analysis.dashboard import DashboardOptions, make_app
from training.config import TrialConfig
from training.paths import SweepPaths, TrialPaths

RESULTS = Path(__file__).with_name("results")
NUM_RUNNING = 8
EVAL_STEPS = 100
NUM_UPDATES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_trials", type=int, default=200)
    parser.add_argument("--num_steps", type=int, default=10_000)
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_sweep(SweepPaths(root / "large"), options.num_trials, options.num_steps)
        results = measure(root, options.num_steps)
    results = {
        "num_trials": options.num_trials,
        "num_steps": options.num_steps,
        "load_average": os.getloadavg()[0],
        **results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dashboard.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


def make_sweep(paths: SweepPaths, num_trials: int, num_steps: int) -> None:
    """A sweep whose last eight trials are still running; every tenth one was pruned."""
    paths.trials.mkdir(parents=True)
    paths.definition.write_text("name: large\nmethod: random\n", encoding="utf-8")
    for number in range(num_trials):
        is_running = number >= num_trials - NUM_RUNNING
        trial = paths.trial(number)
        trial.root.mkdir()
        settings = TrialConfig(max_steps=num_steps, lora_r=8 + number % 4).to_dict()
        params = {"learning_rate": 1e-4 * (1 + number % 7), "lora_r": settings["lora_r"]}
        config = {"number": number, "name": f"trial {number}", "settings": settings | params}
        trial.config.write_text(json.dumps({**config, "params": params}), encoding="utf-8")
        steps = num_steps // 2 if is_running else num_steps
        text = metrics_lines(number, 1, steps)
        trial.metrics.write_text(text, encoding="utf-8")
        if not is_running:
            state = "pruned" if number % 10 == 3 else "complete"
            result = {"state": state, "eval/loss": 1.5 + 0.01 * (number % 37), "best_step": steps}
            result |= {"num_steps": steps, "train_time_s": 1800.0, "steps_saved": 0}
            trial.result.write_text(json.dumps(result), encoding="utf-8")


def metrics_lines(number: int, first: int, last: int) -> str:
    random = np.random.default_rng([number, first])
    lines = []
    for step in range(first, last + 1):
        loss = 1.5 + 2 / (1 + step / 300) + 0.1 * random.standard_normal()
        line = {"step": step, "time": 1.79e9 + 60 * number + 0.2 * step, "train/loss": loss}
        line |= {"learning_rate": 2e-4, "grad_norm": 0.9, "tokens_per_second": 5000.123}
        lines.append(json.dumps(line))
        if step % EVAL_STEPS == 0:
            lines.append(json.dumps({"step": step, "time": line["time"], "eval/loss": loss}))
    return "\n".join(lines) + "\n"


def measure(root: Path, num_steps: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    paths = SweepPaths(root / "large")
    results["browser_ms"] = paint_times(root)
    app = make_app(root, DashboardOptions(port=0))
    client = Server(app.server.test_client())
    results["cold_page_ms"], _ = timed(lambda: client.page("/sweep/large"))
    begin = time.perf_counter()
    while "reading" in json.dumps(client.update()):
        time.sleep(0.5)
    results["everything_read_s"] = round(time.perf_counter() - begin, 2)
    for name, everyone in (("leaders", []), ("all", ["all"])):
        client.choose(everyone)
        client.update()
        times, sizes, busy = [], [], []
        for turn in range(NUM_UPDATES):
            grow(paths, num_steps, turn + (NUM_UPDATES if everyone else 0))
            before = time.thread_time()
            spent, answer = timed(client.update)
            busy.append(round(1000 * (time.thread_time() - before), 1))
            times.append(spent)
            sizes.append(len(json.dumps(answer)) / 1e6)
        results[f"update_{name}_ms"] = {
            "median": statistics.median(times),
            "max": max(times),
            "processor": statistics.median(busy),
        }
        results[f"update_{name}_mb"] = round(statistics.median(sizes), 2)
    results["unchanged_ms"] = statistics.median(timed(client.update)[0] for _ in range(NUM_UPDATES))
    return results


class Server:
    """The sweep page as a browser keeps it: what it has seen goes back with every update."""

    def __init__(self, client: Any):
        self.client = client
        self.seen: Any = None
        self.everyone: list[str] = []

    def choose(self, everyone: list[str]) -> None:
        self.everyone = everyone

    def page(self, path: str) -> Any:
        answer = self._post("page.children", {"id": "page", "property": "children"}, [path], [""])
        self.seen = _find_store(answer["response"]["page"]["children"], "sweep-seen")
        return answer

    def update(self) -> Any:
        parts = [
            "counts.children", "board.children", "curves-box.children", "chosen-table.children",
            "findings.children", "timeline-box.children", "decisions.children", "chosen.options",
            "buttons.children", "waiting.children", "sweep-seen.data",
        ]  # fmt: skip
        outputs = [dict(zip(("id", "property"), part.split("."), strict=True)) for part in parts]
        answer = self._post(
            f"..{'...'.join(parts)}..", outputs, [1, [], self.everyone], [self.seen]
        )
        if answer:
            self.seen = answer["response"]["sweep-seen"]["data"]
        return answer

    def _post(self, output: str, outputs: Any, inputs: list[Any], state: list[Any]) -> Any:
        names = {
            1: ["address.pathname"],
            3: ["sweep-tick.n_intervals", "chosen.value", "everyone.value"],
        }[len(inputs)]
        states = ["address.search"] if len(inputs) == 1 else ["sweep-seen.data"]
        body = {
            "output": output,
            "outputs": outputs,
            "inputs": [_value(name, value) for name, value in zip(names, inputs, strict=True)],
            "state": [_value(name, value) for name, value in zip(states, state, strict=True)],
            "changedPropIds": [names[0]],
        }
        response = self.client.post(
            "/_dash-update-component", json=body, headers={"Host": "127.0.0.1"}
        )
        if response.status_code == 204:
            return None
        assert response.status_code == 200, response.status_code
        return json.loads(response.data)


def _value(name: str, value: Any) -> dict[str, Any]:
    identity, _, prop = name.partition(".")
    return {"id": identity, "property": prop, "value": value}


def _find_store(part: Any, identity: str) -> Any:
    if isinstance(part, dict):
        if part.get("props", {}).get("id") == identity:
            return part["props"]["data"]
        part = part.get("props", {}).get("children")
    found = [_find_store(child, identity) for child in part] if isinstance(part, list) else []
    return next((data for data in found if data is not None), None)


def grow(paths: SweepPaths, num_steps: int, turn: int) -> None:
    """Ten more steps for each running trial, as of two seconds in a pack."""
    count = len(list(paths.trials.iterdir()))
    for number in range(count - NUM_RUNNING, count):
        first = num_steps // 2 + 10 * turn + 1
        with open(TrialPaths(paths.trial(number).root).metrics, "a", encoding="utf-8") as file:
            file.write(metrics_lines(number, first, first + 9))


def paint_times(root: Path) -> dict[str, Any] | None:
    """First contentful paint, and when leaderboard and curves stand there; None without a Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    from playwright.sync_api import sync_playwright

    with served(root) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        found = {}
        for name in ("cold", "warm"):
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            begin = time.perf_counter()
            page.goto(f"{address}/sweep/large")
            page.wait_for_selector("#board tbody tr")
            board_s = time.perf_counter() - begin
            page.wait_for_selector("#curves .scatterlayer .trace")
            curves_s = time.perf_counter() - begin
            paint = page.evaluate(
                "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            )
            found[name] = {
                "first_contentful_paint": round(paint or 0),
                "leaderboard": round(1000 * board_s),
                "curves": round(1000 * curves_s),
            }
        browser.close()
    return found


@contextmanager
def served(root: Path) -> Iterator[str]:
    app = make_app(root, DashboardOptions(port=0))
    server = make_server("127.0.0.1", 0, app.server, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what the call gave."""
    begin = time.perf_counter()
    try:
        answer = call()
    except PreventUpdate:
        answer = None
    return round(1000 * (time.perf_counter() - begin), 1), answer


def table(results: dict[str, Any]) -> str:
    """Markdown, a row a number."""
    rows = [
        ("page from the server, nothing read yet", f"{results['cold_page_ms']:,.0f} ms"),
        ("until everything is read", f"{results['everything_read_s']:.1f} s"),
    ]
    for name in ("leaders", "all"):
        spent, size = results[f"update_{name}_ms"], results[f"update_{name}_mb"]
        rows.append(
            (
                f"update, 8 trials with new steps, curves of {name}",
                f"{spent['median']:,.0f} ms (slowest {spent['max']:,.0f}; of the processor "
                f"{spent['processor']:,.0f}), {size} MB",
            )
        )
    rows.append(("update, nothing new", f"{results['unchanged_ms']:,.1f} ms"))
    for name, times in (results["browser_ms"] or {}).items():
        rows.append(
            (
                f"browser, {name}: first paint, leaderboard, curves",
                ", ".join(f"{value:,} ms" for value in times.values()),
            )
        )
    rows.append(("load average of the machine meanwhile", f"{results['load_average']:.1f}"))
    lines = ["| what | time |", "| --- | ---: |", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
