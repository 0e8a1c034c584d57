"""`sweeps.agent` against the stand-in of W&B's server: real client, real training of the tiny model."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb_server import Run, WandbServer

from sweeps.ledger import SweepRecord, TrialRecord, read_sweep

# As the command line, but for the five seconds between heartbeats.
AGENT = (
    "import runpy, sys; from sweeps import wandb_agents; wandb_agents.POLL_S = 0.5; "
    "runpy.run_module('sweeps.agent', run_name='__main__', alter_sys=True)"
)
PLAIN_AGENT = (
    "from wandb import wandb_agent as a; a.Agent.POLL_INTERVAL = 1; "
    "from wandb.cli.cli import cli; cli()"
)


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def definition(tiny_settings: dict[str, Any], **varied: list[Any]) -> dict[str, Any]:
    constants = {**tiny_settings, "lr_scheduler_type": "warmup_stable_decay", "max_steps": 8}
    parameters: dict[str, Any] = {name: {"values": values} for name, values in varied.items()}
    parameters |= {name: {"value": v} for name, v in constants.items() if name not in varied}
    return {
        "name": "tiny",
        "method": "grid",
        "metric": {"name": "eval/loss", "goal": "minimize"},
        "command": ["${env}", sys.executable, "-m", "training.run", "${args}"],
        "program": "training/run.py",
        "parameters": parameters,
    }


def command(
    server: WandbServer,
    home: Path,
    code: str,
    *arguments: str,
    key: str | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    home.mkdir(exist_ok=True)
    environment = {**os.environ, **server.env(home / "client"), "OMP_NUM_THREADS": "1"}
    environment |= {"WANDB_MODE": "online", "PYTHONPATH": str(ROOT)}
    environment.pop("WANDB_SERVICE", None)  # of this process, if a test here has used W&B
    if key is not None:
        environment["WANDB_API_KEY"] = key
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=cwd or home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def module(server: WandbServer, home: Path, name: str, *arguments: str) -> Any:
    code = f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    return command(server, home, code, *arguments)


def agent(server: WandbServer, home: Path, path: str, *options: str, **more: Any) -> Any:
    output = ["--output_dir", str(home / "runs"), "--slots", "4"]
    return command(server, home, AGENT, path, *output, *options, **more)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def create_sweep(server: WandbServer, home: Path, config: dict[str, Any]) -> str:
    """`wandb sweep`; returns ENTITY/PROJECT/ID."""
    (home / "x.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    finish(command(server, home, PLAIN_AGENT, "sweep", "--project", "pets", str(home / "x.yaml")))
    (sweep_id,) = server.sweeps.keys() - getattr(server, "known", set())
    return f"{server.sweeps[sweep_id].entity}/pets/{sweep_id}"


def record_of(server: WandbServer, home: Path) -> SweepRecord:
    (root,) = (home / "runs").glob("tiny-*")
    return read_sweep(root)


def is_whole(run: Run, trial: TrialRecord) -> bool:
    """Whether W&B has each row of metrics.jsonl once, in order, and the result."""
    names = ("step", "train/loss", "eval/loss", "learning_rate")
    rows = [{name: row.get(name) for name in names} for row in run.history]
    lines = [{name: line.get(name) for name in names} for line in trial.metrics()]
    return rows == lines and run.summary.get("eval/loss") == trial.loss


def test_a_packed_agent_trains_a_whole_sweep_as_wandb_runs(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    config = definition(tiny_settings, max_steps=[4, 8], learning_rate=[1e-2, 3e-3], lora_r=[2, 4])
    path = create_sweep(server, home, config)
    output = finish(agent(server, home, path, "--log_model", "best"))
    record = record_of(server, home)
    assert [trial.state for trial in record.trials] == ["complete"] * 8, output
    assert len({json.dumps(trial.params, sort_keys=True) for trial in record.trials}) == 8
    assert {trial.wandb_id for trial in record.trials} == set(server.runs)
    for trial in record.trials:
        run = server.runs[trial.wandb_id or ""]
        assert is_whole(run, trial)
        assert run.state == "finished"
        assert run.exit_code == 0
        assert run.sweep_id == path.split("/")[-1]
        assert {name: run.config[name] for name in trial.settings} == trial.settings
        assert any("eval/loss" in line for line in run.log)
    # Half of the trials need only their last steps: as the local runner does it.
    assert sum(bool(trial.result["forked_from"]) for trial in record.trials) >= 4
    # One for each run in flight: in a slot, or waiting for the stage of another one.
    assert 2 <= len(server.agents) <= 8
    best = record.best()
    (artifact,) = {a.name for a in server.artifacts.values()}
    assert artifact == "tiny-adapter"
    newest = [a for a in server.artifacts.values() if "best" in a.aliases]
    assert [best.wandb_id in a.aliases for a in newest] == [True]
    check_pull(server, home, path, record)


def check_pull(server: WandbServer, home: Path, path: str, record: SweepRecord) -> None:
    """The sweep read from W&B is the sweep on disk; read again, nothing is there twice."""
    for _ in range(2):
        finish(module(server, home, "sweeps.pull", path, "--output_dir", str(home / "pulled")))
    pulled = read_sweep(home / "pulled" / record.name)
    assert len(pulled.trials) == len(record.trials)
    theirs = {trial.wandb_id: trial for trial in record.trials}
    for trial in pulled.trials:
        original = theirs[trial.wandb_id]
        assert trial.settings == original.settings
        assert trial.params == original.params
        assert [{**line, "time": 0} for line in trial.metrics()] == [
            {**line, "time": 0} for line in original.metrics()
        ]
        assert trial.result == {name: original.result[name] for name in trial.result}
        assert trial.loss == original.loss
    best = pulled.best()
    assert best.wandb_id == record.best().wandb_id
    assert (best.paths.adapter / "adapter_model.safetensors").is_file()
    losses = best.eval_losses(best.result["best_step"])
    assert losses.equals(record.best().eval_losses(best.result["best_step"]))


@pytest.mark.slow
def test_wandbs_scheduler_drives_the_nine_runs_with_our_sampler(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    varied = {"max_steps": [2, 4, 6, 8], "learning_rate": [1e-3, 3e-3, 1e-2], "lora_r": [2, 4, 8]}
    config = definition(tiny_settings, **varied)
    scheduler = {"engine": "optuna", "source": "sweeps/study.py", "optimizer": "one_factor"}
    path = create_sweep(server, home, {**config, "method": "custom", "scheduler": scheduler})
    entity, project, sweep_id = path.split("/")
    arguments = ["--entity", entity, "--project", project, "--batch-size", "1", sweep_id]
    driver = command(server, home, PLAIN_AGENT, "sweep-scheduler", *arguments, cwd=ROOT)
    trainer = agent(server, home, path)
    said = finish(driver)
    finish(trainer)
    trials = record_of(server, home).trials
    assert [trial.state for trial in trials] == ["complete"] * 9, said
    runs = [server.runs[trial.wandb_id or ""] for trial in trials]
    assert all(run.state == "finished" for run in runs)
    best = {}
    for name, values in varied.items():
        centre = {other: listed[len(listed) // 2] for other, listed in varied.items()}
        losses = {
            value: trial.loss or 0.0
            for value in values
            for trial in trials[:8]
            if trial.params == {**centre, name: value}
        }
        assert len(losses) >= 3
        best[name] = min(losses, key=losses.__getitem__)
    assert trials[8].params == best


@pytest.mark.slow
def test_plain_agents_and_a_packed_one_finish_one_sweep(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    config = definition(tiny_settings, learning_rate=[1e-2, 3e-3, 1e-3], lora_r=[2, 4, 8, 16])
    path = create_sweep(server, home, config)
    plain = [
        command(server, home / f"plain{number}", PLAIN_AGENT, "agent", path) for number in range(2)
    ]
    server.wait_for(lambda: len(server.runs) >= 2, 120)
    packed = agent(server, home, path)
    for process in [*plain, packed]:
        finish(process)
    assert len(server.runs) == 12
    points = {(run.config["learning_rate"], run.config["lora_r"]) for run in server.runs.values()}
    assert len(points) == 12
    for run in server.runs.values():
        assert run.state == "finished"
        steps = [row["step"] for row in run.history if "train/loss" in row]
        assert steps == list(range(1, 9))
        assert [row["step"] for row in run.history if "eval/loss" in row] == [0, 4, 8]
    assert 1 <= len(record_of(server, home).trials) <= 11


@pytest.mark.slow
def test_an_agent_that_was_killed_goes_on_with_its_runs(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    config = definition(tiny_settings, max_steps=[40], learning_rate=[1e-2, 3e-3], lora_r=[2, 4])
    path = create_sweep(server, home, config)
    first = agent(server, home, path)
    server.wait_for(
        lambda: len(server.runs) == 4 and all(len(r.history) > 12 for r in server.runs.values()),
        120,
    )
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    unfinished = [trial.number for trial in record_of(server, home).trials if not trial.result]
    assert unfinished
    output = finish(agent(server, home, path))
    assert "goes on" in output
    record = record_of(server, home)
    assert len(server.runs) == len(record.trials) == 4
    for trial in record.trials:
        run = server.runs[trial.wandb_id or ""]
        assert run.state == "finished"
        assert is_whole(run, trial)


def test_a_stop_reaches_one_run_of_the_pack_and_only_that_one(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    config = definition(tiny_settings, max_steps=[60], learning_rate=[1e-2, 3e-3], lora_r=[2, 4])
    path = create_sweep(server, home, config)
    process = agent(server, home, path)
    server.wait_for(
        lambda: len(server.runs) == 4 and all(len(r.history) > 4 for r in server.runs.values()), 120
    )
    victim = sorted(server.runs)[1]
    server.stop_run(victim)
    finish(process)
    for trial in record_of(server, home).trials:
        assert is_whole(server.runs[trial.wandb_id or ""], trial)
        if trial.wandb_id == victim:
            assert trial.state == "pruned"
            assert trial.result["reason"] == "stopped in W&B"
            assert trial.result["num_steps"] < 60
        else:
            assert (trial.state, trial.result["num_steps"]) == ("complete", 60)


@pytest.mark.slow
def test_a_server_that_is_away_holds_up_nothing_and_misses_nothing(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    config = definition(tiny_settings, max_steps=[60], learning_rate=[1e-2, 3e-3], lora_r=[2, 4])
    path = create_sweep(server, home, config)
    process = agent(server, home, path)
    server.wait_for(
        lambda: len(server.runs) == 4 and all(len(r.history) > 4 for r in server.runs.values()), 120
    )
    server.pause()
    lines = [len(trial.metrics()) for trial in record_of(server, home).trials]
    # Training ends while nobody listens.
    server.wait_for(lambda: all(trial.result for trial in record_of(server, home).trials), 120)
    assert max(lines) < 60
    server.resume()
    finish(process)
    for trial in record_of(server, home).trials:
        run = server.runs[trial.wandb_id or ""]
        assert run.state == "finished"
        assert is_whole(run, trial)


@pytest.mark.slow
def test_count_is_the_number_of_runs_taken(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    path = create_sweep(server, home, definition(tiny_settings, lora_r=[2, 4, 8, 16]))
    finish(agent(server, home, path, "--count", "2"))
    assert len(server.runs) == len(record_of(server, home).trials) == 2


@pytest.mark.slow
def test_an_agent_waits_out_a_pause_and_leaves_when_its_key_is_refused(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    path = create_sweep(server, home, definition(tiny_settings, lora_r=[2, 4]))
    sweep_id = path.split("/")[-1]
    server.set_sweep_state(sweep_id, "PAUSED")
    process = agent(server, home, path)
    server.wait_for(lambda: server.num_requests["GetSweepState"] >= 1, 60)
    assert not server.runs
    server.set_sweep_state(sweep_id, "RUNNING")
    assert "the sweep is paused: waiting" in finish(process)
    assert [run.state for run in server.runs.values()] == ["finished"] * 2

    server.set_sweep_state(sweep_id, "PAUSED")
    process = agent(server, home, path)
    server.wait_for(lambda: server.num_requests["GetSweepState"] >= 2, 60)
    server.fail("GetSweepState", 403, times=None)
    last = finish(process, status=2).strip().splitlines()[-1]
    assert last.startswith(f"error: {path}: W&B refuses us: ")


@pytest.mark.slow
def test_a_rate_limit_is_waited_out_and_a_forbidden_project_is_one_line(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    path = create_sweep(server, home, definition(tiny_settings, lora_r=[2, 4]))
    server.fail("Heartbeat", 429, times=3)
    server.fail("file_stream", 429, times=3)
    finish(agent(server, home, path))
    for trial in record_of(server, home).trials:
        assert is_whole(server.runs[trial.wandb_id or ""], trial)
        assert server.runs[trial.wandb_id or ""].state == "finished"
    server.forbidden_projects.add("pets")
    output = finish(agent(server, home, path), status=2)
    assert output.strip().splitlines()[-1].startswith(f"error: {path}: W&B cannot give the sweep: ")
    assert "Traceback" not in output


@pytest.mark.slow
def test_an_agent_of_a_deleted_sweep_ends_its_runs_and_leaves(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    path = create_sweep(server, home, definition(tiny_settings, max_steps=[60], lora_r=[2, 4]))
    process = agent(server, home, path)
    server.wait_for(
        lambda: len(server.runs) == 2 and all(len(r.history) > 4 for r in server.runs.values()), 120
    )
    server.delete_sweep(path.split("/")[-1])
    assert "is deleted" in finish(process)
    assert [trial.state for trial in record_of(server, home).trials] == ["complete"] * 2
    assert {run.state for run in server.runs.values()} == {"finished"}


def test_what_is_wrong_is_one_line(
    server: WandbServer, home: Path, tiny_settings: dict[str, Any]
) -> None:
    config = definition(tiny_settings, lora_r=[2, 4])
    path = create_sweep(server, home, config)
    entity, project, _ = path.split("/")
    server.known = set(server.sweeps)  # pyright: ignore[reportAttributeAccessIssue]
    foreign = {**config, "parameters": {"temperature": {"values": [1, 2]}}}
    other = create_sweep(server, home, foreign)
    cases = [
        ([f"{entity}/{project}/nosuch"], {}, "nosuch: W&B cannot give the sweep: "),
        ([other], {}, "temperature is not a setting"),
        ([path, "--count", "0"], {}, "--count is 0, but must be >= 1"),
        (["a/b/c/d"], {}, "must be ENTITY/PROJECT/SWEEP_ID"),
        ([path], {"key": "x" * 40}, "W&B"),
    ]
    processes = [agent(server, home, *arguments, **more) for arguments, more, _ in cases]
    for process, (_, _, message) in zip(processes, cases, strict=True):
        output = finish(process, status=2)
        last = output.strip().splitlines()[-1]
        assert last.startswith("error: "), output
        assert message in last
        assert "x" * 40 not in output
        assert "Traceback" not in output
