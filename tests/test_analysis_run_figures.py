"""Shared steps are drawn and counted once: histories, loss curves, stage tree, time line, cost."""

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.cost import cost_rows, sweep_cost
from analysis.history import read_histories
from analysis.load import Results, load_source
from analysis.run_figures import (
    _get_curves_info,
    _get_timeline_info,
    _get_tree_info,
    _get_tree_plot,
    run_figures,
)
from training.config import TrialConfig
from training.paths import SweepPaths, TrialPaths, write_json, write_text

BEGIN = 1.8e9


def add(paths: SweepPaths, number: int, lines: list[dict[str, Any]], **result: Any) -> None:
    trial, steps = paths.trial(number), max(line["step"] for line in lines)
    settings = TrialConfig(max_steps=30 if number == 2 else steps).to_dict()
    params = {"max_steps": settings["max_steps"]}
    record = {"settings": settings, "number": number, "name": f"t{number}", "params": params}
    write_json(trial.config, record)
    write_text(trial.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    if result:
        known = {"num_steps": steps, "eval/loss": lines[-1].get("eval/loss"), "best_step": steps}
        write_json(trial.result, {**known, "base_eval/loss": 3.0, **result})


def lines_of(first: int, last: int, begin_s: float, loss: float) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        time_s = begin_s + 60 * (step - first + 1)
        lines.append({"step": step, "time": time_s, "train/loss": loss + 1 / step})
    lines.append({"step": last, "time": lines[-1]["time"], "eval/loss": loss})
    return lines


@pytest.fixture
def forked(tmp_path: Path) -> Results:
    """Trial 0 has 10 steps; 1 was forked from it at 8 and has 20; 2 is pruned at 4, with nothing shared."""
    paths = SweepPaths(tmp_path / "tree")
    write_text(paths.definition, "method: grid\n")
    base = {"step": 0, "time": BEGIN, "eval/loss": 3.0}
    trunk = lines_of(1, 10, BEGIN, 2.5)
    add(paths, 0, [base, *trunk], state="complete", train_time_s=100.0, tokens=1000, steps_saved=0)
    own = lines_of(9, 20, BEGIN + 600, 2.2)
    fork = {"stage": "abc", "step": 8, "trial": "0000"}
    result = {"train_time_s": 180.0, "tokens": 2000, "steps_saved": 8, "forked_from": fork}
    add(paths, 1, [base, *trunk[:8], *own], state="complete", **result)
    record = {"train_time_s": 70.0, "tokens": 790}
    write_json(TrialPaths(paths.stages / "abc").state / "state.json", {"record": record})
    pruned = lines_of(1, 4, BEGIN, 2.9)
    add(paths, 2, [base, *pruned], state="pruned", train_time_s=40.0, tokens=400, steps_saved=0)
    return load_source(paths.root)


def test_a_forks_curve_leaves_the_one_it_came_from_and_shared_steps_are_drawn_once(forked):
    curves = _get_curves_info(forked, read_histories(forked.sweep))
    assert [step for step, _ in curves[0].train] == list(range(1, 11))
    assert [step for step, _ in curves[1].train] == list(range(9, 21))
    assert curves[1].evaluated == [(0, 3.0), (20, 2.2)]
    assert [curve.is_leader for curve in curves] == [True, True, False]


def test_the_tree_has_a_row_for_each_trial_and_marks_what_was_trained_for_several(forked):
    branches = _get_tree_info(read_histories(forked.sweep))
    assert [(b.row, b.start, b.end, b.shared, b.parent_row) for b in branches] == [
        (0, 0, 10, 8, None),
        (1, 8, 20, 0, 0),
        (2, 0, 4, 0, None),
    ]
    figure: Any = _get_tree_plot(branches)
    drawn = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}
    assert drawn["trained once for several trials"] == ([0, 8, None], [0, 0, None])
    assert drawn["trained for one"] == (
        [8, 10, None, 8, 20, None, 0, 4, None],
        [0, 0, None, 1, 1, None, 2, 2, None],
    )
    assert drawn["fork"] == ([8, 8, None], [0, 1, None])
    assert drawn["pruned"] == ([4], [2])
    assert figure.layout.title.text == "Stage tree: 8 of 34 steps were taken from another trial"


def test_the_time_line_shows_a_fork_from_its_own_first_step_on(forked):
    stints = _get_timeline_info(read_histories(forked.sweep))
    assert {s.name: (s.row, s.start, s.end, s.state) for s in stints} == {
        "0 t0": (0, 0.0, 10.0, "complete"),
        "1 t1": (1, 10.0, 22.0, "complete"),
        "2 t2": (2, 0.0, 4.0, "pruned"),
    }
    assert [s.evaluations for s in stints if s.row == 1] == [[22.0]]
    figure: Any = run_figures(forked, read_histories(forked.sweep))["timeline"]
    [mark] = [trace for trace in figure.data if trace.name == "was pruned"]
    assert (list(mark.x), list(mark.y)) == ([4.0], [2])


def test_a_running_fork_takes_nothing_that_another_one_trained(forked):
    (forked.source / "trials" / "0001" / "result.json").unlink()
    history = read_histories(load_source(forked.source).sweep)[1]
    assert (history.saved, history.parent) == (8, 0)


def test_cost_counts_shared_time_tokens_and_steps_once(forked):
    cost = sweep_cost(forked, read_histories(forked.sweep))
    assert cost is not None
    assert (cost.train_s, cost.shared_s, cost.is_estimate) == (250.0, 70.0, False)
    assert cost.tokens == 1000 + 2000 - 790 + 400
    assert cost.busy_s == 22 * 60
    assert (cost.steps.trained, cost.steps.saved, cost.steps.pruned) == (26, 8, 26)
    rows = dict(cost_rows(forked, cost))
    assert rows["energy"] == "not measured"
    assert rows["wall time with a trial in training"] == "22.0 min"


def test_without_the_stages_record_its_time_is_said_to_be_an_estimate(forked):
    (forked.source / "stages" / "abc" / "state" / "state.json").write_text("{torn")
    cost = sweep_cost(forked, read_histories(forked.sweep))
    assert cost is not None and cost.is_estimate
    assert cost.train_s == pytest.approx(100 + 180 * 12 / 20 + 40)
    assert dict(cost_rows(forked, cost))["training, summed over trials"].startswith("about 248 s")
