"""Further seeds, answers and cost in the report, and the report as a notebook shows it."""

import html
from typing import Any

import pandas as pd
import pytest
from test_analysis_report import add_trial

from analysis.load import load_source
from analysis.page import to_html, to_markdown
from analysis.report import Report, report
from analysis.tables import answers, seed_runs_table, seeds_table
from training.paths import SweepPaths, read_json, write_json, write_text

HTML = "<img src=x onerror=alert(1)>"


@pytest.fixture
def paths(tmp_path: Any) -> SweepPaths:
    """Two settings; the second, better in one seed, has two further seeds and one that failed."""
    sweep = SweepPaths(tmp_path / "runs" / "seeds")
    write_text(sweep.definition, "method: grid\nparameters: {max_steps: {values: [4, 8]}}\n")
    add_trial(sweep, 0, "baseline", 1.8, max_steps=4)
    add_trial(sweep, 1, "more", 1.5, max_steps=8)
    for number, loss, state in ((2, 1.6, "complete"), (3, 1.7, "complete"), (4, 1.0, "failed")):
        add_trial(sweep, number, f"more seed={number}", loss, state=state, max_steps=8)
        config = read_json(sweep.trial(number).config)
        config["settings"]["seed"] = 40 + number
        write_json(sweep.trial(number).config, config | {"seed_of": 1})
    return sweep


def add_samples(
    paths: SweepPaths, number: int, step: int, response: str, ended: bool = True
) -> None:
    sample = {"prompt": f"Say {HTML}", "response": response, "num_tokens": 3, "ended": ended}
    record = {"step": step, "max_new_tokens": 8, "samples": [sample]}
    write_json(paths.trial(number).sample(step), record)


def test_a_setting_with_seeds_has_a_row_with_mean_interval_and_spread(paths):
    table = seeds_table(load_source(paths.root))
    assert table is not None
    [row] = table.rows
    # Student's t with 2 degrees of freedom: 4.3027 * 0.1 / 3**0.5.
    assert row == [
        "1", "more", "8", "3", "1.6000", "[1.3516, 1.8484]", "0.1000", "1.5000 to 1.7000",
    ]  # fmt: skip


def test_each_seed_has_its_own_row_and_a_failed_one_says_so(paths):
    table = seed_runs_table(load_source(paths.root))
    assert table is not None
    assert [(row[0], row[2], row[3]) for row in table.rows] == [
        ("1", "42", "1.5000"),
        ("2", "42", "1.6000"),
        ("3", "43", "1.7000"),
        ("4", "44", "failed"),
    ]


def test_the_report_shows_seeds_cost_and_answers_and_runs_nothing(paths, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/bin/false")
    add_samples(paths, 1, 0, "base\nmodel")
    add_samples(paths, 1, 8, HTML, ended=False)
    made = report(paths.root)
    table = pd.read_csv(made.directory / "trials.csv")
    assert table["number"].tolist() == [0, 1, 2, 3, 4]
    assert table["seed_of"].dropna().tolist() == [1, 1, 1]
    text = (made.directory / "EXPERIMENT_REPORT.md").read_text()
    assert "## Over seeds" in text and "## Each seed" in text
    assert "- energy: not measured" in text
    assert "- training, summed over trials: 300 s" in text
    assert f"    {HTML} […]" in text
    page = (made.directory / "report.html").read_text()
    assert "Answers before and after" in page
    assert HTML not in page.split("</script>", 1)[1]
    assert html.escape(HTML) in page
    shown = made._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html')
    assert isinstance(made, Report)


def test_answers_are_those_of_the_best_step_or_the_last_before_it(paths):
    results = load_source(paths.root)
    add_samples(paths, 1, 0, "base")
    assert answers(results) == []
    add_samples(paths, 1, 4, "early")
    assert [(a.before, a.after) for a in answers(results)] == [("base", "early")]
    add_samples(paths, 1, 16, "after the best step")
    assert answers(results)[0].after == "early"


def test_a_sweep_without_seeds_and_samples_has_no_such_sections(tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/bin/false")
    sweep = SweepPaths(tmp_path / "one")
    write_text(sweep.definition, "method: grid\n")
    add_trial(sweep, 0, "baseline", 1.8, max_steps=4)
    add_trial(sweep, 1, "more", 1.5, max_steps=8)
    page = report(sweep.root).page
    for text in (to_markdown(page, []), to_html(page, {})):
        assert "Over seeds" not in text and "Answers before" not in text
