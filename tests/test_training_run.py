import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModelForCausalLM

from training.config import TrialConfig
from training.exceptions import DataError
from training.paths import TrialPaths, read_json
from training.run import run_trial

ROOT = Path(__file__).resolve().parents[1]


def command(settings: dict[str, Any], output_dir: Path, *more: str) -> list[str]:
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [
        sys.executable, "-m", "training.run", *options,
        "--output_dir", str(output_dir), "--report_to", "none", *more,
    ]  # fmt: skip


def run(settings: dict[str, Any], output_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(settings, output_dir, *more), cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_command_trains_and_says_what_came_out(
    tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**tiny_settings, "max_steps": 3, "eval_steps": 2}
    done = run(settings, tmp_path / "trial")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = read_json(TrialPaths(tmp_path / "trial").result)
    assert f"eval/loss {result['eval/loss']:.4f} at step {result['best_step']}" in done.stdout
    assert "step 2/3" in done.stdout
    assert "train, " in done.stdout  # the counts of the split
    names = {path.name for path in (tmp_path / "trial").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "eval", "adapter", "result.json"}
    # It names its base, so that PEFT finds that by itself.
    adapted: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "trial" / "adapter")
    assert adapted.get_base_model().name_or_path == tiny_settings["model_name_or_path"]

    again = run(settings, tmp_path / "trial")
    assert again.returncode == 0
    assert "is trained already" in again.stdout

    other = run({**settings, "lora_r": 3}, tmp_path / "trial")
    assert other.returncode == 2
    assert "which holds a trial with lora_r 16, but this one has 3" in other.stderr


def test_ctrl_c_leaves_an_unfinished_trial_that_the_same_command_trains(
    tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**tiny_settings, "max_steps": 4000, "eval_steps": 5}
    paths = TrialPaths(tmp_path / "trial")
    process = subprocess.Popen(
        command(settings, paths.root), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (paths.adapter / "adapter_model.safetensors").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "interrupted; the same command continues"
    assert paths.config.is_file()
    assert not paths.result.exists()


def test_settings_are_written_before_anything_can_fail(
    tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    config = TrialConfig.from_dict({**tiny_settings, "dataset_name": str(empty)})
    paths = TrialPaths(tmp_path / "trial")
    with pytest.raises(DataError):
        run_trial(config, paths, info={"number": 3, "name": "x", "params": {}}, report_to="none")
    assert read_json(paths.config)["settings"] == config.to_dict()
    assert read_json(paths.config)["number"] == 3
    result = read_json(paths.result)
    assert result == {
        "state": "failed",
        "reason": f"dataset_name is {empty}, but it holds no records",
    }
    assert "Traceback" in paths.log.read_text()


def test_a_directory_that_is_not_a_trials_is_left_alone(
    tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = run(tiny_settings, tmp_path)
    assert done.returncode == 2
    assert "which has files, but is not a trial's" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_program_argument_list_of_wandb_is_understood(
    tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    """`wandb agent` replaces ${args} by --name=value; a quantised integer comes as 2.0."""
    args = [f"--{name}={value}" for name, value in tiny_settings.items()]
    args += [
        "--max_steps=2.0",
        "--load_in_4bit=False",
        "--lora_target_modules=['q_proj', 'v_proj']",
    ]
    environment = {**os.environ, "WANDB_RUN_ID": "abc123"}
    done = subprocess.run(
        [sys.executable, "-m", "training.run", *args, "--report_to=none"],
        cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    paths = TrialPaths(tmp_path / "runs" / "trials" / "abc123")
    adapter = json.loads((paths.adapter / "adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
