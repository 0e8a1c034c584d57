"""Worker processes: started, watched, replaced when they die; nothing is lost whoever is killed.

The tiny model is really trained, in real processes that are really killed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from sqlalchemy import URL

from sweeps.ledger import SweepRecord, read_sweep
from sweeps.pool import find_gpus, worker_environment
from sweeps.run import RunOptions, run_sweep
from sweeps.spec import read_definition
from training.paths import SweepPaths, read_json

FACTORIAL = {"max_steps": [4, 10, 16], "learning_rate": [0.003, 0.01], "lora_r": [2, 4]}


def definition(tiny_settings: dict[str, Any], varied: dict[str, list[Any]]) -> str:
    constants = {**tiny_settings, "lr_scheduler_type": "warmup_stable_decay", "eval_steps": 4}
    parameters: dict[str, Any] = {name: {"values": values} for name, values in varied.items()}
    parameters |= {name: {"value": v} for name, v in constants.items() if name not in varied}
    metric = {"name": "eval/loss", "goal": "minimize"}
    return yaml.safe_dump({"method": "grid", "metric": metric, "parameters": parameters})


def start(root: Path, text: str, *options: str) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    (root / "x.yaml").write_text(text)
    output = ["--output_dir", str(root / "runs"), "--report_to", "none"]
    return subprocess.Popen(
        [sys.executable, "-m", "sweeps.run", str(root / "x.yaml"), *output, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Several processes of several threads each would wait for one another on few cores.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == 0, stderr
    return stdout


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []


def wait_until(condition: Any, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def states(paths: SweepPaths) -> list[optuna.trial.FrozenTrial]:
    url = URL.create("sqlite", database=str(paths.study)).render_as_string()
    (name,) = optuna.get_all_study_names(url)
    return optuna.load_study(study_name=name, storage=url).get_trials()


def curve(record: SweepRecord, number: int) -> list[tuple[int, str, float]]:
    names = ("train/loss", "eval/loss")
    return [
        (line["step"], name, line[name])
        for line in record.trial(number).metrics()
        for name in names
        if name in line
    ]


def assert_same_results(record: SweepRecord, expected: SweepRecord) -> None:
    """The same trials, each with the same history and result; numbers may be in another order."""
    by_params = {json.dumps(trial.params): trial for trial in expected.all_trials}
    assert len(record.all_trials) == len(expected.all_trials) == len(by_params)
    for trial in record.all_trials:
        other = by_params[json.dumps(trial.params)]
        assert trial.state == other.state == "complete"
        ours, theirs = curve(record, trial.number), curve(expected, other.number)
        assert [point[:2] for point in ours] == [point[:2] for point in theirs]
        assert [point[2] for point in ours] == pytest.approx([p[2] for p in theirs], rel=1e-5)
        assert trial.loss == pytest.approx(other.loss, rel=1e-5)
        assert trial.result["best_step"] == other.result["best_step"]
        assert trial.result["tokens"] == other.result["tokens"]


def test_a_killed_worker_is_replaced_and_its_trials_go_on(
    tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    text = definition(tiny_settings, {"max_steps": [40], "lora_r": [2, 4]})
    paths = SweepPaths(tmp_path / "runs" / "x")
    process = start(tmp_path, text, "--slots", "2")
    wait_until(lambda: paths.trial(1).state.is_dir())  # it has something to lose
    (worker,) = workers_of(process)
    worker.kill()
    stdout = finish(process)
    assert "worker 0 died by signal SIGKILL: its 2 trials go on" in stdout
    record = read_sweep(paths.root)
    for number in (0, 1):
        steps = [step for step, name, _ in curve(record, number) if name == "train/loss"]
        assert steps == list(range(1, 41))
    assert [trial.state.name for trial in states(paths)] == ["COMPLETE"] * 2
    assert "steps: 80 trained, 0 saved by stages" in stdout


@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_workers_save_their_trials_when_their_runner_ends(
    tmp_path: Path, tiny_settings: dict[str, Any], sent: signal.Signals
) -> None:
    text = definition({**tiny_settings, "eval_steps": 200}, {"max_steps": [100000], "lora_r": [2]})
    text = text.replace(
        "value: 4\n", "value: 100000\n"
    )  # no evaluation, so no state saved by itself
    paths = SweepPaths(tmp_path / "runs" / "x")
    process = start(tmp_path, text)
    wait_until(lambda: paths.trial(0).metrics.is_file() and len(_lines(paths)) > 3)
    (worker,) = workers_of(process)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal's Ctrl-C: to the workers, too
    else:
        process.send_signal(sent)
    process.communicate(timeout=60)
    if sent != signal.SIGKILL:
        assert process.returncode == 128 + sent
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    saved = read_json(paths.trial(0).state / "state.json")["step"]
    assert saved > 0
    assert _lines(paths)[-1]["step"] == saved


def test_the_time_limit_ends_a_sweep_with_its_trials_saved(
    tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    text = definition(tiny_settings, {"max_steps": [4000], "lora_r": [2]})
    paths = SweepPaths(tmp_path / "runs" / "x")
    stdout = finish(start(tmp_path, text, "--timeout", "15"))
    assert "--timeout 15 s is over; the same command goes on" in stdout
    assert read_json(paths.trial(0).state / "state.json")["step"] > 0
    assert not paths.trial(0).result.exists()


def _lines(paths: SweepPaths) -> list[dict[str, Any]]:
    return read_sweep(paths.root).trial(0).metrics()


def test_each_worker_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert find_gpus() == ["2", "GPU-abc"]
    assert worker_environment(1, 2) == {"CUDA_VISIBLE_DEVICES": "GPU-abc"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus() == []
    assert worker_environment(0, 1) == {}
    threads = int(worker_environment(0, 2)["OMP_NUM_THREADS"])
    assert 1 <= threads <= max(1, (os.cpu_count() or 1) // 2)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_survives_twenty_kills(tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    """Chaos: two workers, the runner or one of them killed at random moments, until the sweep is done."""
    chance = random.Random(7)
    text = definition(tiny_settings, {**FACTORIAL, "max_steps": [24, 60, 96]})
    finish(start(tmp_path / "calm", text, "--workers", "2", "--slots", "2"))
    expected = read_sweep(tmp_path / "calm" / "runs" / "x")
    assert len(expected.all_trials) == 12

    paths = SweepPaths(tmp_path / "chaos" / "runs" / "x")
    kills = {"runner": 0, "worker": 0}
    process = start(tmp_path / "chaos", text, "--workers", "2", "--slots", "2")
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline:
        time.sleep(chance.uniform(0.5, 9))
        if process.poll() is not None:
            break
        if sum(kills.values()) >= 30:
            continue
        workers = workers_of(process)
        if workers and chance.random() < 0.6:
            chance.choice(workers).kill()
            kills["worker"] += 1
        else:
            process.kill()
            kills["runner"] += 1
            process.communicate(timeout=60)
            process = start(tmp_path / "chaos", text, "--workers", "2", "--slots", "2")
    finish(process)
    assert sum(kills.values()) >= 20 and min(kills.values()) >= 3, kills
    record = read_sweep(paths.root)
    assert_same_results(record, expected)
    told = states(paths)
    assert len(told) == 12 and {trial.state.name for trial in told} == {"COMPLETE"}
    assert sum(trial.result["steps_saved"] for trial in record.all_trials) > 0
    for trial in told:
        assert trial.value == pytest.approx(record.trial(trial.number).loss)


def test_a_worker_that_hangs_is_replaced(
    tmp_path: Path, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.pool.HANGS_S", 2.0)
    path = tmp_path / "x.yaml"
    path.write_text(definition(tiny_settings, {"max_steps": [60], "lora_r": [2]}))
    paths = SweepPaths(tmp_path / "runs" / "x")
    stopped: list[int] = []

    def stop_it() -> None:
        wait_until(lambda: paths.trial(0).state.is_dir())
        (worker,) = (c for c in psutil.Process().children() if "sweeps.worker" in c.cmdline())
        worker.send_signal(signal.SIGSTOP)
        stopped.append(worker.pid)

    thread = threading.Thread(target=stop_it)
    thread.start()
    options = RunOptions(output_dir=str(tmp_path / "runs"), report_to="none")
    record = run_sweep(read_definition(path), options)
    thread.join()
    assert stopped and not psutil.pid_exists(stopped[0])
    assert [trial.state for trial in record.trials] == ["complete"]
    steps = [line["step"] for line in record.trial(0).metrics() if "train/loss" in line]
    assert steps == list(range(1, 61))
