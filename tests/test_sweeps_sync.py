"""`sweeps.sync`: an offline sweep becomes an online one, once, however often it is sent."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_sweeps_agent import command, definition, finish, is_whole, module
from wandb_server import WandbServer

from sweeps.ledger import SweepRecord, read_sweep
from sweeps.run import RunOptions, run_sweep
from sweeps.spec import read_definition
from training.paths import read_json, write_text


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


@pytest.fixture(scope="module")
def trained(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    """A sweep that nobody has told W&B of, with a report."""
    root = tmp_path_factory.mktemp("sync")
    config = definition(tiny_settings, max_steps=[4, 8], lora_r=[2, 4])
    (root / "tiny.yaml").write_text(yaml.safe_dump({**config, "project": "pets"}))
    options = RunOptions(output_dir=str(root / "runs"), report_to="none", workers=0)
    record = run_sweep(read_definition(root / "tiny.yaml"), options)
    write_text(record.paths.report / "report.html", "<p>which one</p>")
    return record


@pytest.fixture
def swept(trained: SweepRecord, tmp_path: Path) -> SweepRecord:
    """A copy of it."""
    shutil.copytree(trained.paths.root, tmp_path / "runs" / "tiny")
    return read_sweep(tmp_path / "runs" / "tiny")


def test_a_sweep_sent_twice_is_there_once(
    server: WandbServer, swept: SweepRecord, tmp_path: Path
) -> None:
    sync = ("sweeps.sync", str(swept.paths.root), "--log_model", "all")
    first = finish(module(server, tmp_path, *sync))
    assert "0 runs are there, 4 to send" in first
    for trial in swept.trials:
        run = server.runs[trial.wandb_id or ""]
        assert is_whole(run, trial)
        assert (run.project, run.group, run.state) == ("pets", "tiny", "finished")
        assert {name: run.config[name] for name in trial.settings} == trial.settings
        assert run.display_name == trial.name
        assert run.summary["best_step"] == trial.result["best_step"]
    (report,) = [run for run in server.runs.values() if run.job_type == "report"]
    assert any(name.startswith("media/html/") for name in report.files)
    assert {a.name for a in server.artifacts.values()} == {"tiny-adapter", "tiny-report"}
    histories = {run.id: run.history for run in server.runs.values()}
    num_artifacts = len(server.artifacts)
    second = finish(module(server, tmp_path, *sync))
    assert "4 runs are there, 0 to send" in second
    assert {run.id: run.history for run in server.runs.values()} == histories
    assert len(server.artifacts) == num_artifacts


def test_what_was_sent_in_part_is_sent_to_its_end(
    server: WandbServer, swept: SweepRecord, tmp_path: Path
) -> None:
    trial = swept.trials[-1]
    part = f"""
import wandb
with wandb.init(project="pets", id={trial.wandb_id!r}) as run:
    for row, line in enumerate({trial.metrics()[:5]!r}):
        run.log({{**line, "_timestamp": line.pop("time")}}, step=row, commit=True)
"""
    finish(command(server, tmp_path, part))
    assert len(server.runs[trial.wandb_id or ""].history) == 5
    finish(module(server, tmp_path, "sweeps.sync", str(swept.paths.root)))
    assert is_whole(server.runs[trial.wandb_id or ""], trial)
    assert read_json(trial.paths.wandb_receipt)["run"] == f"tester/pets/{trial.wandb_id}"


def test_a_server_that_refuses_is_one_line(
    server: WandbServer, swept: SweepRecord, tmp_path: Path
) -> None:
    server.forbidden_projects.add("pets")
    output = finish(module(server, tmp_path, "sweeps.sync", str(swept.paths.root)), status=2)
    assert "not sent: " in output.strip().splitlines()[-1]
    assert "Traceback" not in output
    assert not any(trial.paths.wandb_receipt.exists() for trial in swept.trials)


def test_a_promoted_version_is_linked_to_the_registry(
    server: WandbServer, swept: SweepRecord, tmp_path: Path
) -> None:
    sync = ("sweeps.sync", str(swept.paths.root), "--link_promoted", "wandb-registry-model/tiny")
    output = finish(module(server, tmp_path, *sync), status=2)
    assert "nothing is promoted" in output.strip().splitlines()[-1]
    write_text(swept.paths.promotion(1).card, "# tiny\n")
    write_text(swept.paths.current_promotion, "0001")
    finish(module(server, tmp_path, *sync))
    [artifact] = [a for a in server.artifacts.values() if a.name == "tiny-promoted"]
    assert artifact.links == {"wandb-registry-model/tiny"}
    assert "0001" in artifact.aliases
