"""The stand-in of W&B's server, asked by the real client, agents and scheduler."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import wandb
import yaml
from wandb.apis.public.sweeps import _agent_heartbeat, _register_agent, _upsert_sweep
from wandb.sdk.lib import wbauth
from wandb.sdk.lib.run_stopping import RunStopChecker
from wandb.sdk.sweeps import SweepNotFoundError
from wandb_server import WandbServer

TRAIN = """
import wandb

with wandb.init() as run:
    for step in range(3):
        run.log({"loss": run.config["rate"] * run.config["rank"] + step})
"""
STUDY = """
import optuna

def make_study(sweep):
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

def make_terminated_study(sweep):
    return make_study(sweep), lambda study: len(study.get_trials(states=[DONE])) >= 2

DONE = optuna.trial.TrialState.COMPLETE
"""
# The command line as it is, but for an agent's five seconds between heartbeats.
WANDB = "from wandb import wandb_agent as a; a.Agent.POLL_INTERVAL = 1; from wandb.cli.cli import cli; cli()"


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        while _STARTED:
            _STARTED.pop().kill()


@pytest.fixture
def client(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WandbServer]:
    """The server, with this process as its client."""
    for name, value in server.env(tmp_path / "client").items():
        monkeypatch.setenv(name, value)
    _forget()
    yield server
    while _OPEN:  # of a test that failed: W&B's threads would trip over what follows
        _OPEN.pop().finish()
    _forget()


_OPEN: list[Any] = []
_STARTED: list[subprocess.Popen[str]] = []


def _forget() -> None:
    """W&B keeps its settings, its key and its own process for as long as Python runs."""
    wandb.teardown()
    wbauth.unauthenticate_session(update_settings=False)


def _open(settings: Mapping[str, Any] = MappingProxyType({}), **arguments: Any) -> Any:
    quiet = wandb.Settings(console="off", x_disable_stats=True, **settings)
    run = wandb.init(project="pets", reinit="create_new", settings=quiet, **arguments)
    _OPEN.append(run)
    return run


def _losses(server: WandbServer, run_id: str) -> list[float]:
    return [row["loss"] for row in server.runs[run_id].history]


def _command(server: WandbServer, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    # Without W&B's own process of another test, which has that one's settings.
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    process = subprocess.Popen(
        [sys.executable, "-c", WANDB, *arguments],
        cwd=folder,
        env={**inherited, **server.env(folder / "client"), "WANDB_SILENT": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _STARTED.append(process)
    return process


def _finish(process: subprocess.Popen[str], timeout_s: float = 60) -> str:
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output
    return output


def _create_sweep(server: WandbServer, folder: Path, **config: Any) -> str:
    (folder / "train.py").write_text(TRAIN)
    config = {"program": "train.py", "metric": {"name": "loss", "goal": "minimize"}, **config}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
    _finish(_command(server, folder, "sweep", "--project", "pets", "sweep.yaml"))
    [sweep_id] = server.sweeps
    return sweep_id


def test_a_run_arrives_with_its_config_history_summary_file_and_end(
    client: WandbServer, tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("hello")
    run = _open(id="first", name="cat", group="animals", tags=["small"], config={"rate": 0.1})
    for step in range(4):
        run.log({"loss": 4.0 - step})
    run.save(tmp_path / "note.txt", base_path=tmp_path)
    run.finish()

    arrived = client.runs["first"]
    assert (arrived.display_name, arrived.group, arrived.tags) == ("cat", "animals", ["small"])
    assert arrived.config == {"rate": 0.1}
    assert _losses(client, "first") == [4.0, 3.0, 2.0, 1.0]
    assert arrived.summary["loss"] == 1.0
    assert arrived.files["note.txt"] == b"hello"
    assert (arrived.state, arrived.exit_code) == ("finished", 0)
    assert client.errors == []


def test_a_run_that_ends_with_an_error_has_failed(client: WandbServer) -> None:
    _open(id="bad").finish(exit_code=3)

    assert (client.runs["bad"].state, client.runs["bad"].exit_code) == ("failed", 3)


def test_a_resumed_run_goes_on_behind_its_last_row(client: WandbServer) -> None:
    run = _open(id="again", config={"rate": 0.1})
    for step in range(3):
        run.log({"loss": float(step), "kept": 1})
    run.finish()
    run = _open(id="again", resume="must", config={"rank": 8})
    step_at_start = run.starting_step
    for step in range(3, 5):
        run.log({"loss": float(step)})
    run.finish()

    assert step_at_start == 3
    assert _losses(client, "again") == [0, 1, 2, 3, 4]
    assert [row["_step"] for row in client.runs["again"].history] == [0, 1, 2, 3, 4]
    assert client.runs["again"].config == {"rate": 0.1, "rank": 8}
    assert client.runs["again"].summary["kept"] == 1
    assert client.errors == []


def test_a_run_that_must_resume_and_is_not_there_does_not_start(client: WandbServer) -> None:
    with pytest.raises(wandb.Error, match="resume"):
        _open(id="nobody", resume="must")


def test_three_runs_of_one_process_stay_apart(client: WandbServer) -> None:
    runs = [_open(id=f"run{k}", config={"rank": k}) for k in range(3)]
    for step in range(3):
        for k, run in enumerate(runs):
            run.log({"loss": 10.0 * k + step})
    for run in runs:
        run.finish()

    assert [_losses(client, f"run{k}") for k in range(3)] == [
        [0, 1, 2],
        [10, 11, 12],
        [20, 21, 22],
    ]
    assert [client.runs[f"run{k}"].config for k in range(3)] == [{"rank": k} for k in range(3)]
    assert client.errors == []


def test_two_agents_run_every_point_of_a_grid_once_and_end(
    server: WandbServer, tmp_path: Path
) -> None:
    sweep_id = _create_sweep(
        server,
        tmp_path,
        method="grid",
        parameters={"rank": {"values": [4, 8, 16]}, "rate": {"values": [1, 2]}},
    )
    path = f"{server.entity}/pets/{sweep_id}"
    for process in [_command(server, tmp_path, "agent", path) for _ in range(2)]:
        _finish(process)

    points = [(run.config["rank"], run.config["rate"]) for run in server.runs.values()]
    assert points == [(4, 1), (4, 2), (8, 1), (8, 2), (16, 1), (16, 2)]
    assert {run.state for run in server.runs.values()} == {"finished"}
    assert {run.sweep_id for run in server.runs.values()} == {sweep_id}
    assert [_losses(server, run.id)[-1] for run in server.runs.values()] == [6, 10, 10, 18, 18, 34]
    assert all(agent.run_ids for agent in server.agents.values())
    assert server.sweeps[sweep_id].state == "FINISHED"
    assert server.errors == []


def test_a_scheduler_s_study_gives_an_agent_its_runs(server: WandbServer, tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text(STUDY)
    scheduler = {"engine": "optuna", "source": "study.py", "optimizer": "make_terminated_study"}
    sweep_id = _create_sweep(
        server,
        tmp_path,
        method="custom",
        scheduler=scheduler,
        parameters={"rank": {"values": [4, 8]}, "rate": {"min": 1.0, "max": 2.0}},
    )
    path = f"{server.entity}/pets/{sweep_id}"
    scheduler = _command(
        server, tmp_path, "sweep-scheduler", "--batch-size=2", "--poll-interval=1", path
    )
    agent = _command(server, tmp_path, "agent", path)
    _finish(scheduler)
    _finish(agent)

    done = [run for run in server.runs.values() if run.sweep_id and run.state == "finished"]
    assert len(done) >= 2
    assert all(1 <= run.config["rate"] <= 2 and run.config["rank"] in (4, 8) for run in done)
    assert server.sweeps[sweep_id].state == "FINISHED"
    assert server.errors == []


def test_nothing_is_missing_after_the_server_was_away(client: WandbServer) -> None:
    run = _open(id="patient")
    for step in range(30):
        if step == 5:
            client.pause()
        if step == 25:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", int(client.url.rpartition(":")[2])))
            assert len(client.runs["patient"].history) <= 6
            client.resume()
        run.log({"loss": float(step)})
        time.sleep(0.4)
    run.finish()

    assert _losses(client, "patient") == [float(step) for step in range(30)]
    assert client.errors == []


def test_a_stop_reaches_the_run_that_is_meant(
    client: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults: Any = RunStopChecker.__init__.__kwdefaults__  # 15 s between two looks
    monkeypatch.setitem(defaults, "poll_interval", 0.5)
    stopped: dict[str, threading.Event] = {name: threading.Event() for name in ("a", "b")}
    runs = [_open({"stop_fn": event.set}, id=name) for name, event in stopped.items()]
    client.stop_run("a")
    for run in runs:
        run.log({"loss": 1.0})

    assert stopped["a"].wait(timeout=40)
    time.sleep(1.5)
    assert not stopped["b"].is_set()
    runs[0].finish(exit_code=1)
    runs[1].finish()
    assert [client.runs[name].state for name in stopped] == ["killed", "finished"]


def test_an_agent_is_told_to_stop_its_run_and_to_exit(client: WandbServer) -> None:
    config = {"method": "random", "run_cap": 2, "parameters": {"rate": {"min": 0.0, "max": 1.0}}}
    sweep_id = _upsert_sweep(wandb.Api(), config, project="pets")[0]["name"]
    beat = _make_agent(sweep_id)
    [first] = beat()
    run_id = first["run_id"]

    assert 0 <= first["args"]["rate"]["value"] <= 1
    assert beat(run_id) == []
    client.stop_run(run_id)
    assert beat(run_id) == [{"type": "stop", "run_id": run_id}]
    client.set_sweep_state(sweep_id, "PAUSED")
    assert beat() == []
    client.set_sweep_state(sweep_id, "RUNNING")
    [second] = beat()
    assert second["args"] != first["args"]
    assert beat() == [{"type": "exit"}]
    assert client.errors == []


def test_an_agent_of_a_deleted_sweep_is_told_so(client: WandbServer) -> None:
    config = {"method": "random", "parameters": {"rate": {"min": 0.0, "max": 1.0}}}
    sweep_id = _upsert_sweep(wandb.Api(), config, project="pets")[0]["name"]
    beat = _make_agent(sweep_id)
    client.delete_sweep(sweep_id)

    with pytest.raises(SweepNotFoundError):
        beat()


def _make_agent(sweep_id: str) -> Callable[..., list[dict[str, Any]]]:
    api = wandb.Api()
    agent_id = _register_agent(api, "host", sweep_id=sweep_id, project="pets")["id"]
    return lambda *run_ids: _agent_heartbeat(api, agent_id, {}, dict.fromkeys(run_ids, True))


def test_the_public_api_reads_a_sweep_and_every_row_of_a_history(client: WandbServer) -> None:
    config = {"method": "grid", "parameters": {"rate": {"values": [1, 2]}}}
    sweep_id = _upsert_sweep(wandb.Api(), config, project="pets")[0]["name"]
    beat = _make_agent(sweep_id)
    run_ids = [beat()[0]["run_id"] for _ in range(2)]
    for k, run_id in enumerate(run_ids):
        run = _open({"sweep_id": sweep_id}, id=run_id, group=f"g{k}")
        for step in range(600):
            run.log({"loss": float(step), **({"odd": step} if step % 2 else {})})
        run.finish()
    api = wandb.Api()
    sweep = api.sweep(f"{client.entity}/pets/{sweep_id}")
    read = api.run(f"{client.entity}/pets/{run_ids[0]}")

    assert [run.id for run in sweep.runs] == run_ids
    assert sweep.config["method"] == "grid"
    assert [row["loss"] for row in read.scan_history()] == [float(step) for step in range(600)]
    assert [row["odd"] for row in read.scan_history(keys=["odd"])] == list(range(1, 600, 2))
    assert len(read.history(samples=100, pandas=False)) == 100
    assert (read.state, read.summary["loss"], read.summary["_step"]) == ("finished", 599, 599)
    assert [run.id for run in api.runs(f"{client.entity}/pets", {"group": "g1"})] == run_ids[1:]
    both = {"$and": [{"sweep": sweep_id}, {"state": "finished"}]}
    assert len(api.runs(f"{client.entity}/pets", both)) == 2
    assert client.errors == []


def test_an_artifact_logged_twice_is_one_version(client: WandbServer, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\x01\x02")
    run = _open(id="maker")
    for alias in ("best", "shipped"):
        artifact = wandb.Artifact("adapter", type="model", metadata={"rank": 8})
        artifact.add_file(str(tmp_path / "weights.bin"))
        run.log_artifact(artifact, aliases=[alias]).wait()
    run.use_artifact("adapter:best")
    run.finish()
    [kept] = client.artifacts.values()
    read = wandb.Api().artifact(f"{client.entity}/pets/adapter:shipped")
    read.link("pets/shown")
    folder = Path(read.download(root=str(tmp_path / "download")))

    assert kept.aliases == {"best", "shipped", "latest"}
    assert kept.used_by == {"maker"}
    assert kept.links == {"pets/shown"}
    assert (read.version, read.metadata) == ("v0", {"rank": 8})
    assert (folder / "weights.bin").read_bytes() == b"\x01\x02"
    assert client.errors == []


def test_an_operation_that_is_not_known_is_an_error_that_shows(client: WandbServer) -> None:
    with pytest.raises(Exception, match="unknown operation Nonsense"):
        wandb.Api()._service_api.execute_graphql("query Nonsense { viewer { id } }")

    assert "unknown operation Nonsense" in client.errors[0]


def test_a_variable_that_is_missing_is_an_error_that_shows(client: WandbServer) -> None:
    query = "query GetSweep($name: String!) { project { id } }"
    with pytest.raises(Exception, match="GetSweep lacks its variable name"):
        wandb.Api()._service_api.execute_graphql(query)

    assert "GetSweep lacks its variable name" in client.errors[0]


def test_a_key_of_another_server_is_refused(
    client: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    _forget()

    with pytest.raises(wandb.Error):
        _open(id="stranger")
    assert client.runs == {}


def test_a_project_that_is_forbidden_is_refused(client: WandbServer) -> None:
    client.forbidden_projects.add("pets")

    with pytest.raises(wandb.Error, match="permission denied"):
        _open(id="guest")
    assert client.runs == {}


def test_a_failing_request_is_sent_again(client: WandbServer) -> None:
    client.fail("UpsertBucket", 500)
    client.fail("file_stream", 429, times=2)
    run = _open(id="tough")
    run.log({"loss": 1.0})
    run.finish()

    assert _losses(client, "tough") == [1.0]
    assert client.num_requests["file_stream"] > client.runs["tough"].num_file_streams
