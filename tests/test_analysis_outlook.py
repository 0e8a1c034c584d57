"""What the report says of what was not tried, and the next sweep that it writes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_analysis_report import add_trial

from analysis.figures import make_figures
from analysis.findings import find
from analysis.load import load_source
from analysis.next_sweep import around, next_sweep
from analysis.outlook import loss_table, may_be_best, trained
from sweeps.spec import read_definition
from training.paths import SweepPaths, read_json, write_json, write_text

STEPS = (10, 20, 40, 80)


@pytest.fixture
def swept(tmp_path: Path) -> SweepPaths:
    """Four lengths at two rates: the loss falls as a power law, the rate does next to nothing."""
    paths = SweepPaths(tmp_path / "runs" / "lengths")
    definition = {
        "method": "grid",
        "command": ["${env}", "python", "-m", "training.run", "${args}"],
        "parameters": {
            "max_steps": {"values": list(STEPS)},
            "learning_rate": {"values": [1e-3, 2e-3]},
            "lora_r": {"value": 8},
        },
    }
    write_text(paths.definition, yaml.safe_dump(definition))
    for number, steps in enumerate(STEPS):
        for rate in (1e-3, 2e-3):
            loss = 1.2 + 2.0 * steps**-0.5 + (0.0005 if rate == 2e-3 else 0.0)
            where = number + (4 if rate == 2e-3 else 0)
            name = f"max_steps={steps} learning_rate={rate}"
            result = {"train_time_s": 6.0 * steps}
            add_trial(paths, where, name, loss, max_steps=steps, learning_rate=rate, result=result)
    return paths


def test_what_twice_the_steps_would_buy_is_told_with_its_interval(swept: SweepPaths) -> None:
    findings = find(load_source(swept.root))
    [line] = [line for line in findings.summary if line.startswith("More steps: ")]
    assert line.startswith("More steps: 160 would take another 0.0")
    assert "extrapolation" in line
    trend = findings.outlook.trend
    assert trend is not None
    gain = 2.0 * (80**-0.5 - 160**-0.5)
    assert trend.gain == pytest.approx(gain, rel=0.1)
    assert trend.gain_low < gain < trend.gain_high


def test_trials_that_may_be_the_best_are_named_and_others_are_not(swept: SweepPaths) -> None:
    results = load_source(swept.root)
    candidates = may_be_best(results, loss_table(trained(results)))
    assert candidates is not None
    assert {trial.params["max_steps"] for trial in candidates} == {80}
    assert len(candidates) == 2
    [line] = [line for line in find(results).summary if line.startswith("Not to be told from")]
    assert "max_steps=80 learning_rate=0.002" in line


def test_importance_and_what_is_worth_its_time_are_told(swept: SweepPaths) -> None:
    findings = find(load_source(swept.root))
    text = "\n".join(findings.summary)
    assert "Importance by fANOVA over 8 trials: max_steps 9" in text
    [front] = [line for line in findings.summary if line.startswith("Worth their time")]
    assert front.count(" min") == 4
    assert "learning_rate=0.002" not in front


def test_the_figures_of_the_outlook_show_its_numbers(swept: SweepPaths) -> None:
    results = load_source(swept.root)
    findings = find(results)
    figures: dict[str, Any] = {**make_figures(results, findings)}
    assert {"importance", "steps", "loss_against_time", "parallel_coordinates"} <= figures.keys()
    trend = findings.outlook.trend
    assert trend is not None
    law, trials, doubled = figures["steps"].data
    assert list(trials.x) == list(STEPS)
    assert list(doubled.x) == [160]
    assert doubled.y[0] == pytest.approx(trend.predict(160))
    assert law.y[-1] == pytest.approx(trend.predict(160))
    line, points = figures["loss_against_time"].data
    assert list(line.x) == [1.0, 2.0, 4.0, 8.0]
    assert list(line.y) == sorted(line.y, reverse=True)
    assert len(points.x) == 8
    bars = figures["importance"].data[0]
    assert bars.y[0] == "max_steps"
    assert bars.x[0] > 0.9
    parallel = figures["parallel_coordinates"].data[0]
    assert [axis.label for axis in parallel.dimensions] == [
        "max_steps",
        "learning_rate",
        "eval/loss",
    ]


def test_the_next_sweep_goes_past_the_edge_and_leaves_out_what_does_nothing(
    swept: SweepPaths, tmp_path: Path
) -> None:
    results = load_source(swept.root)
    findings = find(results)
    assert findings.undetected == {"learning_rate"}
    text = next_sweep(results, findings.undetected)
    assert text is not None
    (tmp_path / "next.yaml").write_text(text)
    definition = read_definition(tmp_path / "next.yaml")  # what sweeps.run and W&B take
    assert definition.name == "lengths-next"
    assert definition.varied == {"max_steps": {"values": [80, 113, 160]}}
    assert definition.constants["learning_rate"] == 0.001
    assert definition.constants["lora_r"] == 8


def test_a_csv_has_no_next_sweep() -> None:
    results = load_source(Path(__file__).parent / "data" / "nine_runs.csv")
    assert next_sweep(results, set()) is None
    findings = find(results)
    assert findings.outlook.trend is None  # no held-out losses, no interval, no promise


@pytest.mark.parametrize(
    ("best", "tried", "expected"),
    [
        (16, [8, 16, 32], [11, 16, 23]),
        (32, [8, 16, 32], [32, 45, 64]),
        (8, [8, 16, 32], [4, 6, 8]),
        (1, [1, 2], [1]),
        (60, [60], [30, 60, 120]),
        (1e-3, [1e-4, 1e-3], [1e-3, 0.00316, 1e-2]),
        (0.0, [0.0, 0.1], [0.0]),
        (0.1, [0.0, 0.1], [0.1, 0.141, 0.2]),
    ],
)
def test_values_around_the_best(best: Any, tried: list[Any], expected: list[Any]) -> None:
    assert around(best, tried) == expected


def test_seeds_are_summed_up_and_more_are_counted(tmp_path: Path) -> None:
    paths = SweepPaths(tmp_path / "runs" / "seeds")
    write_text(paths.definition, "method: grid\nparameters: {lora_r: {values: [8, 16]}}\n")
    losses = {0: 1.50, 1: 1.52, 2: 1.51, 3: 1.53, 4: 1.50, 5: 1.52}
    for number, loss in losses.items():
        rank, first = (8, 0) if number in (0, 2, 4) else (16, 1)
        add_trial(paths, number, f"lora_r={rank}", loss, max_steps=4, lora_r=rank, seed=number)
        if number > 1:
            config = read_json(paths.trial(number).config)
            write_json(paths.trial(number).config, {**config, "seed_of": first})
    text = "\n".join(find(load_source(paths.root)).summary)
    assert "lora_r=8 over 3 seeds: 1.5033 [1.4890, 1.5177], standard deviation 0.0058." in text
    assert "To tell lora_r=8 from lora_r=16 at this spread, 3 seeds of each would do" in text
