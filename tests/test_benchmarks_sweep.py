"""The benchmark of whole sweeps measures what is missing, compares like with like, and says so in a table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from benchmarks import sweep, sweep_table
from sweeps.spec import read_definition

SCALE = {"max_steps": [4, 8], "learning_rate": [1e-3, 5e-3, 1e-2], "lora_r": [4], "eval_steps": 2}
KEYS = [sweep_table.point_key(point) for point in sweep_table.points(SCALE)]


def result_of(way: str, losses: list[float], wall_clock_s: float) -> sweep_table.Result:
    longest = KEYS[3:]
    result: dict[str, Any] = {
        "wall_clock_s": wall_clock_s,
        "split_s": dict.fromkeys(sweep_table.SPLIT, wall_clock_s / 6),
        "trial_steps": 36,
        "tokens": 3600,
        "num_pruned": 0,
        "winner": KEYS[int(np.argmin(losses))],
        "winner_loss": min(losses),
        "losses": dict(zip(KEYS, losses, strict=True)),
    }
    if way == "a":
        return {**result, "one_process_s": wall_clock_s / 2}
    rungs = {"2": [3.0, 2.0, 1.0], "4": [1.0, 2.0, 3.0]}
    ordered = {step: dict(zip(longest, values, strict=True)) for step, values in rungs.items()}
    return {**result, "rungs": ordered, "device": "cpu", "winner_best_step": 8}


def write_winner(directory: Path, way: str, shift: float) -> None:
    num_tokens = np.full(12, 5)
    losses = (np.linspace(2, 3, 12) + shift * np.linspace(0.5, 1.5, 12)) * num_tokens
    ids = [f"e{number}" for number in range(12)]
    table = pd.DataFrame({"example_id": ids, "loss_sum": losses, "num_tokens": num_tokens})
    (directory / way).mkdir(parents=True, exist_ok=True)
    table.to_parquet(directory / way / "winner.parquet")


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, sweep_table.Result]:
    """(a), and (c) that took a quarter of its time and chose the second best."""
    write_winner(tmp_path, "a", 0.0)
    write_winner(tmp_path, "c", 0.25)
    both = {
        "a": result_of("a", [3.0, 2.9, 2.8, 2.1, 2.2, 2.3], 400),
        "c": result_of("c", [3.0, 2.9, 2.8, 2.25, 2.2, 2.3], 100),
    }
    sweep_table.compare(both, tmp_path)
    return both


@pytest.mark.parametrize("way", ["b", "c", "d", "d_strict"])
def test_every_way_is_a_sweep_of_36_trials_that_can_be_run(tmp_path: Path, way: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep.sweep_definition(way, sweep.SCALES["cpu"], 1)))

    definition = read_definition(path)

    assert len(sweep_table.points(sweep.SCALES["cpu"])) == 36
    assert set(definition.varied) == set(sweep_table.VARIED)
    assert definition.config.get("early_terminate", {}).get("strict", False) == (way == "d_strict")


def test_regret_is_taken_from_the_table_of_the_exhaustive_way(
    measured: dict[str, sweep_table.Result],
) -> None:
    assert measured["a"]["regret"] == 0
    assert measured["c"]["regret"] == pytest.approx(0.1)


def test_winners_are_compared_example_by_example(measured: dict[str, sweep_table.Result]) -> None:
    estimate, low, high = measured["c"]["difference"]

    assert estimate == pytest.approx(0.25) and 0 < low < 0.25 < high


def test_rungs_are_ranked_against_the_end_of_the_longest_trials(
    measured: dict[str, sweep_table.Result],
) -> None:
    assert sweep_table.rank_correlations(measured) == pytest.approx({2: -0.5, 4: 0.5})


def test_the_table_has_ratios_to_the_exhaustive_way(
    measured: dict[str, sweep_table.Result],
) -> None:
    text = sweep_table.table({"settings": SCALE, "seeds": {"1": measured}})

    assert "| (c) and stage tree | 100 | 4.00× | 2.00× | 36 | 3,600 | 0.0 | 0.1000 |" in text
    assert "+0.2500 (" in text and "| 4 | 0.50 | 0.50 |" in text


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, asked = tmp_path / "results" / "sweep.json", []

    def measure(way: str, scale: dict[str, Any], seed: int, *_: Any) -> sweep_table.Result:
        asked.append((seed, way))
        return result_of(way, [3.0, 2.9, 2.8, 2.1, 2.2, 2.3], 100)

    for name, value in (("measure_scripts", measure), ("measure_sweep", measure)):
        monkeypatch.setattr(sweep, name, value)
    monkeypatch.setattr(sweep, "prepare_examples", lambda *arguments: None)
    sweep.run(SCALE, [1], ["a"], file, tmp_path)
    sweep.run(SCALE, [1, 2], ["a", "b"], file, tmp_path)
    sweep.run(SCALE, [2], ["b"], file, tmp_path, fresh=True)

    assert asked == [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (2, "b")]
    assert json.loads(file.read_text())["seeds"].keys() == {"1", "2"}
    with pytest.raises(SystemExit, match="other settings"):
        sweep.run({**SCALE, "lora_r": [8]}, [1], ["a"], file, tmp_path)


def test_one_trial_of_each_length_is_timed_alone_and_counts_for_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []

    def train(trial: Path, settings: dict[str, Any]) -> sweep_table.Result:
        begun.append(settings)
        trial.mkdir(parents=True)
        (trial / "losses.parquet").write_bytes(b"")
        seconds = {"wall_clock_s": 10.0 * len(begun), "end_s": 1.0, "start_s": 2.0, "load_s": 1.0}
        steps = {"steps": settings["max_steps"], "tokens": 7, "steps_s": 3.0, "evaluations_s": 1.0}
        return {"loss": 3 - settings["max_steps"] / 100, **seconds, **steps}

    monkeypatch.setattr(sweep, "train_trial", train)
    scale = {**SCALE, "max_steps": [4, 8], "learning_rate": [1e-4, 2e-4], "lora_r": [8, 16]}
    result = sweep.measure_scripts("a", scale, 1, tmp_path, side_by_side=3)
    assert [settings["max_steps"] for settings in begun[:2]] == [4, 8]
    assert len(begun) == 8 and result["num_timed"] == 2
    assert result["wall_clock_s"] == 4 * 10 + 4 * 20
    assert result["winner"].startswith("8 steps")
    measured = {"a": result, "d": {**result, "wall_clock_s": 12.0}}
    sweep_table.compare(measured, tmp_path / "no files")
    text = sweep_table.table({"settings": scale, "seeds": {"1": measured}})
    assert "2 trials were timed, one of each length" in text and "10.00×" in text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_ways_train_the_same_trials(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    scale = {
        **tiny_settings,
        "max_steps": [4, 8],
        "learning_rate": [1e-3, 5e-3, 1e-2],
        "lora_r": [4],
        "lr_scheduler_type": "warmup_stable_decay",
        "eval_steps": 2,
    }
    file = tmp_path / "sweep.json"

    text = sweep.run(scale, [1], list(sweep_table.WAYS), file, tmp_path / "work")

    measured = json.loads(file.read_text())["seeds"]["1"]
    assert all(f"| {title} |" in text for title in sweep_table.WAYS.values())
    assert sweep_table.largest_difference(measured["b"], measured["a"]) < 1e-3
    assert sweep_table.largest_difference(measured["c"], measured["b"]) < 1e-4
    assert measured["a"]["tokens"] == measured["b"]["tokens"] > measured["c"]["tokens"]
    assert measured["a"]["trial_steps"] == measured["b"]["trial_steps"] == 36
    # All of the short trial's steps are its trunk's: its one step of cooldown has the full rate.
    assert measured["c"]["trial_steps"] == 24
    assert measured["d_strict"]["num_pruned"] >= measured["d"]["num_pruned"]
    for result in measured.values():
        assert sum(result["split_s"].values()) == pytest.approx(result["wall_clock_s"], abs=0.5)
        assert min(result["split_s"].values()) >= 0
