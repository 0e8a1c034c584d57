"""Figures show the numbers they are given: data first, drawing second, PNGs where there is a Chrome."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.figures import make_figures, write_images
from analysis.findings import find
from analysis.load import load_source
from training.config import TrialConfig
from training.paths import SweepPaths, write_atomic, write_json, write_text

NINE_RUNS = Path(__file__).parent / "data" / "nine_runs.csv"
HEADER = "name,steps,lr,rank,loss,minutes\n"
CHROMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
needs_chrome = pytest.mark.skipif(
    not os.environ.get("BROWSER_PATH") and not any(shutil.which(name) for name in CHROMES),
    reason="no Chrome on this machine",
)


def figures_of(path) -> dict[str, Any]:
    results = load_source(path)
    return make_figures(results, find(results))


@pytest.fixture
def sweep(tmp_path):
    """A baseline and a better trial, scored on the same 30 examples."""
    paths = SweepPaths(tmp_path / "ranks")
    write_text(paths.definition, "method: grid\nparameters: {lora_r: {values: [8, 16]}}\n")
    for number, (name, rank, gain) in enumerate([("baseline", 8, 0.5), ("r16", 16, 0.8)]):
        trial = paths.trial(number)
        settings = TrialConfig(lora_r=rank, max_steps=4).to_dict()
        record = {"settings": settings, "number": number, "name": name, "params": {"lora_r": rank}}
        write_json(trial.config, record)
        lines = ['{"step": 0, "eval/loss": 2.0}', '{"step": 1, "train/loss": 1.9}']
        write_text(
            trial.metrics, "\n".join([*lines, f'{{"step": 4, "eval/loss": {2 - gain}}}\n{{'])
        )
        for step, loss in ((0, 2.0), (4, 2 - gain)):
            sums = 10 * (loss + np.random.default_rng(number).normal(0, 0.05, 30))
            ids = [f"e{n}" for n in range(30)]
            frame = pd.DataFrame({"example_id": ids, "loss_sum": sums, "num_tokens": 10})
            write_atomic(trial.eval_losses(step), frame.to_parquet)
        result = {"state": "complete", "eval/loss": 2 - gain, "best_step": 4, "num_steps": 4}
        write_json(trial.result, {**result, "base_eval/loss": 2.0, "train_time_s": 60})
    return paths


def test_bars_go_from_the_lowest_loss_up_with_their_improvement():
    [bars] = figures_of(NINE_RUNS)["experiment_comparison"].data
    assert bars.x[0] == 0.8916
    assert list(bars.x) == sorted(bars.x)
    assert bars.text[0] == "0.8916  −24.3 %"
    assert bars.text[-1] == "1.1774  baseline"
    assert "exp9_optimal_combination" in bars.y[0]
    assert "1,000 · 5e-4 · 32" in bars.y[0]
    assert len({bars.marker.color[0], bars.marker.color[4], bars.marker.color[-1]}) == 3


def test_train_losses_of_a_csv_get_no_error_bars_and_no_curves():
    figures = figures_of(NINE_RUNS)
    assert figures["experiment_comparison"].data[0].error_x.array is None
    assert "loss_curves" not in figures


def test_whiskers_are_the_paired_interval_of_the_difference_to_the_baseline(sweep):
    [bars] = figures_of(sweep.root)["experiment_comparison"].data
    best, baseline = bars.error_x.array
    assert 0.01 < best < 0.05
    assert baseline == 0


def test_trials_of_the_same_name_and_settings_keep_their_own_bars(tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text(HEADER + "a,60,2e-4,16,1.2,1\na,60,2e-4,16,1.1,1\n")
    [bars] = figures_of(path)["experiment_comparison"].data
    assert len(set(bars.y)) == 2


def test_each_setting_has_a_line_through_the_trials_that_differ_in_it_alone():
    figure = figures_of(NINE_RUNS)["settings"]
    assert [title.text for title in figure.layout.annotations] == (
        ["max_steps", "learning_rate", "lora_r"]
    )
    steps, rates, ranks = figure.data
    assert (list(steps.x), list(steps.y)) == (
        ["60", "300", "500", "1,000"],
        [1.1774, 0.9736, 0.9414, 0.9068],
    )
    assert (list(rates.x), list(rates.y)) == (["1e-4", "2e-4", "5e-4"], [0.9684, 0.9414, 0.9216])
    assert list(ranks.y) == [0.9561, 0.9414, 0.9286]


def test_curves_start_at_the_base_model_and_skip_a_torn_line(sweep):
    curves = [line for line in figures_of(sweep.root)["loss_curves"].data if "markers" in line.mode]
    assert [(list(line.x), list(line.y)) for line in curves] == [
        ([0, 4], [2.0, 1.5]),
        ([0, 4], [2.0, 1.2]),
    ]


@needs_chrome
def test_pngs_are_drawn_by_one_browser(sweep, tmp_path):
    figures = figures_of(sweep.root)
    assert write_images(figures, tmp_path / "drawn") is None
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        "experiment_comparison.png",
        "loss_curves.png",
        "settings.png",
        "slices.png",
    }
    for path in (tmp_path / "drawn").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_svgs_are_drawn_where_they_are_asked_for(sweep, tmp_path):
    figures = figures_of(sweep.root)
    one = {name: figures[name] for name in list(figures)[:1]}
    assert write_images(one, tmp_path / "drawn", "svg") is None
    (path,) = (tmp_path / "drawn").iterdir()
    assert path.suffix == ".svg" and path.read_text("utf-8").startswith("<svg")


def test_a_picture_that_kaleido_could_not_draw_is_one_line_and_no_png(sweep, tmp_path, monkeypatch):
    def write(drawings, **options):
        return (ValueError("the page has crashed\nstack"),)

    monkeypatch.setattr("kaleido.write_fig_from_object_sync", write)
    problem = write_images(figures_of(sweep.root), tmp_path / "drawn")
    assert problem == "no PNGs: the page has crashed; report.html has the same pictures"
    assert not (tmp_path / "drawn").exists()


def test_the_text_is_written_whatever_drawing_does(sweep, monkeypatch):
    from analysis.report import report

    def write(drawings, **options):
        raise RuntimeError("a fault of the picture library")

    monkeypatch.setattr("kaleido.write_fig_from_object_sync", write)
    with pytest.raises(RuntimeError):
        report(sweep.root)
    assert "![" not in (sweep.report / "EXPERIMENT_REPORT.md").read_text()
