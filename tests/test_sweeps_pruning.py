"""A trial ends at a rung only if it is worse beyond noise than the best there, and the log says why."""

import json
import re
import warnings

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import SuccessiveHalvingPruner, WilcoxonPruner
from optuna.trial import TrialState, create_trial

from sweeps.pruning import (
    ConfirmedPruner,
    Decision,
    Pruning,
    WilcoxonRungPruner,
    build_pruner,
    stored_losses,
)
from sweeps.spec import read_definition
from sweeps.study import search_space
from training.config import TrialConfig
from training.paths import SweepPaths

CONFIG = TrialConfig(max_steps=60, eval_steps=6)
COOLING = TrialConfig(max_steps=60, eval_steps=6, lr_scheduler_type="warmup_stable_decay")
HYPERBAND = "{type: hyperband, min_iter: 2, eta: 3}"
STRICT = "{type: hyperband, min_iter: 2, eta: 3, strict: true}"
EXAMPLES = np.random.default_rng(0).normal(3, 1, 24)
"""Losses of the validation examples, which differ more than trials do."""


def define(tmp_path, block, parameters="{lora_r: {values: [8, 16]}}"):
    path = tmp_path / "x.yaml"
    path.write_text(
        f"method: random\nrun_cap: 9\nmetric: {{name: eval/loss}}\nparameters: {parameters}\n"
        + (f"early_terminate: {block}\n" if block else "")
    )
    return read_definition(path)


def table(losses):
    num_tokens = np.full(len(losses), 4)
    ids = [f"e{number}" for number in range(len(losses))]
    return pd.DataFrame(
        {"example_id": ids, "loss_sum": losses * num_tokens, "num_tokens": num_tokens}
    )


class Sweep:
    """A study with its pruner, and the files that its trials write."""

    def __init__(self, tmp_path, block, parameters="{lora_r: {values: [8, 16]}}", eval_steps=6):
        values = parameters if "eval_steps" in parameters else None
        parameters = values or parameters[:-1] + f", eval_steps: {{value: {eval_steps}}}}}"
        definition = define(tmp_path, block, parameters)
        self.space = search_space(definition)
        self.paths = SweepPaths(tmp_path / "runs")
        self.paths.root.mkdir()
        pruner = build_pruner(definition, stored_losses(self.paths))
        self.study = optuna.create_study(study_name="x", pruner=pruner)
        self.pruning = Pruning(self.study, self.paths)

    def start(self, **params):
        self.study.enqueue_trial(params)
        return self.study.ask(self.space)

    def measure(self, trial, step, worse=0.0, noise=0.0):
        """Writes an evaluation and returns its loss: `worse` by that much, give or take `noise`."""
        spread = np.random.default_rng(trial.number).normal(0, 1, len(EXAMPLES)) * noise
        losses = EXAMPLES + worse + spread - spread.mean()
        path = self.paths.trial(trial.number).eval_losses(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        table(losses).to_parquet(path)
        return float(losses.mean())

    def evaluate(self, trial, step, worse=0.0, noise=0.0, config=CONFIG):
        return self.pruning.decide(trial, config, step, self.measure(trial, step, worse, noise))

    def values(self, trial):
        return self.study.trials[trial.number].intermediate_values

    def lines(self):
        if not self.paths.decisions.is_file():
            return []
        return [json.loads(line) for line in self.paths.decisions.read_text().splitlines()]


# What counts as a value


def test_values_are_counted_as_wandb_does_with_the_base_models_as_the_first(tmp_path):
    sweep = Sweep(tmp_path, HYPERBAND)
    trial = sweep.start()
    sweep.evaluate(trial, 6, 0.5)
    sweep.evaluate(trial, 30, 0.25)
    assert sweep.values(trial) == pytest.approx(
        {2: EXAMPLES.mean() + 0.5, 6: EXAMPLES.mean() + 0.25}
    )


def test_an_evaluation_between_two_is_no_value(tmp_path):
    sweep = Sweep(tmp_path, HYPERBAND)
    sweep.evaluate(sweep.start(), 6)
    trial = sweep.start()
    assert sweep.evaluate(trial, 7, worse=9) is None
    assert sweep.values(trial) == {}


def test_a_value_measured_in_a_cooldown_does_not_count(tmp_path):
    sweep = Sweep(tmp_path, "{type: wilcoxon}")
    short, long = sweep.start(), sweep.start()
    for step in (48, 54):  # the cooldown is the last 12 of 60 steps
        sweep.evaluate(short, step, worse=-step / 100, config=COOLING)
    assert list(sweep.values(short)) == [9]
    assert sweep.evaluate(long, 54, config=TrialConfig(max_steps=600, eval_steps=6)) is None


def test_without_early_terminate_nothing_is_reported_or_written(tmp_path):
    sweep = Sweep(tmp_path, None)
    trial = sweep.start()
    assert sweep.evaluate(trial, 6, worse=9) is None
    assert sweep.pruning.forked(trial, CONFIG, [{"step": 6, "eval/loss": 9.0}]) is None
    assert sweep.values(trial) == {} and not sweep.paths.decisions.exists()


# Confirmation


def test_a_clearly_worse_trial_ends_and_the_reason_says_why(tmp_path):
    sweep = Sweep(tmp_path, HYPERBAND)
    sweep.evaluate(sweep.start(), 6)
    reason = sweep.evaluate(sweep.start(), 6, worse=0.5, noise=0.1)
    mean = EXAMPLES.mean()
    assert reason is not None and re.fullmatch(
        rf"eval/loss {mean + 0.5:.4f} at step 6 \(value 2\): hyperband keeps the best third of 2; "
        rf"best is trial 0 with {mean:.4f}; Wilcoxon p \d\.?\d*e-\d+",
        reason,
    )


@pytest.mark.parametrize(
    "block",
    [
        HYPERBAND,
        "{type: asha, min_iter: 2}",
        "{type: hyperband_brackets, min_iter: 2, max_iter: 3}",
        "{type: median, min_trials: 1}",
        "{type: percentile, percentile: 30, min_trials: 1}",
    ],
)
def test_a_trial_within_noise_of_the_best_goes_on_unless_strict(tmp_path, block):
    outcomes = []
    for name, text in (("default", block), ("strict", block.replace("}", ", strict: true}"))):
        (tmp_path / name).mkdir()
        sweep = Sweep(tmp_path / name, text)
        best = sweep.start()
        sweep.evaluate(best, 6, noise=1.0)
        sweep.study.tell(best, 1.0)
        near, far = sweep.start(), sweep.start()
        outcomes.append((sweep.evaluate(near, 6, 0.01, noise=1.0), sweep.evaluate(far, 6, 2.0)))
    (near, far), (near_strict, far_strict) = outcomes
    assert near is None and far and near_strict and far_strict
    assert "Wilcoxon" in far and "Wilcoxon" not in near_strict


def test_what_leads_a_rung_is_never_ended(tmp_path):
    sweep = Sweep(tmp_path, "{type: percentile, percentile: 1, min_trials: 1}")
    first = sweep.start()
    sweep.evaluate(first, 6)
    sweep.study.tell(first, 1.0)
    assert sweep.evaluate(sweep.start(), 6, worse=-0.5) is None


def test_a_trial_without_the_files_of_the_best_is_not_confirmed(tmp_path):
    sweep = Sweep(tmp_path, HYPERBAND)
    best = sweep.start()
    sweep.evaluate(best, 6)
    sweep.paths.trial(best.number).eval_losses(6).unlink()
    assert sweep.evaluate(sweep.start(), 6, worse=0.5) is None


def test_a_loss_that_is_no_number_needs_no_confirmation(tmp_path):
    sweep = Sweep(tmp_path, HYPERBAND)
    sweep.evaluate(sweep.start(), 6)
    reason = sweep.pruning.decide(sweep.start(), CONFIG, 6, float("nan"))
    assert reason is not None and reason.startswith("eval/loss not a number at step 6")
    assert sweep.lines()[-1]["loss"] is None


# The comparison


def test_the_paired_test_agrees_with_optunas_wilcoxon_pruner():
    random = np.random.default_rng(1)
    pruned = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        oracle = WilcoxonPruner(p_threshold=0.2, n_startup_steps=0)
    for _ in range(120):
        num = int(random.choice([1, 2, 3, 5, 14, 20, 29]))  # with ties, SciPy is slow on 6 to 13
        # Quarters: differences of zero and ties among them are common, and sums are exact.
        best, ours = random.integers(4, 20, (2, num)) / 4
        ours = best + (ours - best) * random.integers(0, 2, num) + random.integers(0, 2) / 4
        examples = optuna.create_study()
        examples.add_trial(
            create_trial(value=best.mean(), intermediate_values=dict(enumerate(best)))
        )
        running = examples.ask()
        for step, loss in enumerate(ours):
            running.report(loss, step)
        rungs = optuna.create_study()
        rungs.add_trial(create_trial(value=best.mean(), intermediate_values={5: best.mean()}))
        rungs.ask().report(ours.mean(), 5)
        order = random.permutation(num)  # examples are joined by id, not by their place
        losses = [table(best), table(ours).iloc[order]]
        pruner = WilcoxonRungPruner(lambda trial, _, losses=losses: losses[trial.number], 0.2)
        pruned.append(pruner.prune(rungs, rungs.trials[1]))
        assert pruned[-1] == oracle.prune(examples, examples.trials[1])
    assert 20 < sum(pruned) < 100


@pytest.mark.parametrize(
    ("metric_worse", "outlier", "is_ended"),
    [
        (0.1, 0.0, True),
        (-0.1, 0.0, False),  # long examples are better: it leads by the metric
        (0.1, -9.0, False),  # nearly all are a little worse, one is much better
    ],
)
def test_worse_means_by_the_metric_and_by_the_mean_of_the_examples(metric_worse, outlier, is_ended):
    study = optuna.create_study()
    for value in (3.0, 3.0 + metric_worse):
        study.ask().report(value, 2)
    ours = EXAMPLES + 0.1
    ours[0] += outlier
    losses = [table(EXAMPLES), table(ours)]
    pruner = WilcoxonRungPruner(lambda trial, _: losses[trial.number])
    assert pruner.prune(study, study.trials[1]) == is_ended


@pytest.mark.parametrize(
    ("state", "is_ended"),
    [(None, True), (TrialState.COMPLETE, True), (TrialState.PRUNED, True), (TrialState.FAIL, False)],
)  # fmt: skip
def test_a_trial_is_compared_with_the_best_in_flight_or_ended_but_not_failed(
    tmp_path, state, is_ended
):
    sweep = Sweep(tmp_path, "{type: wilcoxon}")
    best = sweep.start()
    sweep.evaluate(best, 6)
    if state is not None:
        sweep.study.tell(best, 1.0 if state == TrialState.COMPLETE else None, state)
    reason = sweep.evaluate(sweep.start(), 6, worse=0.5)
    assert (reason is not None) == is_ended
    if reason:
        assert "wilcoxon keeps what may be as good as the best of 2; best is trial 0" in reason


def test_only_values_of_the_same_number_are_compared(tmp_path):
    sweep = Sweep(tmp_path, "{type: wilcoxon}")
    sweep.evaluate(sweep.start(), 12)
    assert sweep.evaluate(sweep.start(), 6, worse=0.5) is None


def test_wilcoxon_compares_from_min_iter_on(tmp_path):
    sweep = Sweep(tmp_path, "{type: wilcoxon, min_iter: 3}")
    best, worse = sweep.start(), sweep.start()
    for step in (6, 12):
        sweep.evaluate(best, step)
    assert sweep.evaluate(worse, 6, 0.5) is None
    assert sweep.evaluate(worse, 12, 0.5) is not None


def test_wilcoxon_ends_what_is_less_likely_than_p_threshold(tmp_path):
    reasons = []
    for threshold in (0.01, 0.9):
        (tmp_path / str(threshold)).mkdir()
        sweep = Sweep(tmp_path / str(threshold), f"{{type: wilcoxon, p_threshold: {threshold}}}")
        sweep.evaluate(sweep.start(), 6, noise=1.0)
        reasons.append(sweep.evaluate(sweep.start(), 6, 0.2, noise=1.0))
    assert reasons[0] is None and reasons[1] is not None


def test_trials_that_differ_in_eval_steps_are_compared_at_the_same_value(tmp_path):
    sweep = Sweep(tmp_path, HYPERBAND, "{eval_steps: {values: [6, 10]}}")
    every_6, every_10 = sweep.start(eval_steps=6), sweep.start(eval_steps=10)
    sweep.evaluate(every_6, 6)
    config = TrialConfig(max_steps=60, eval_steps=10)
    assert sweep.evaluate(every_10, 10, worse=0.5, config=config) is not None


# Twins


def run_to_a_late_twin(block, tmp_path):
    """The first trial passes the rung alone; two better ones come; a twin of the first is last."""
    sweep = Sweep(tmp_path, block)
    first = sweep.start()
    assert sweep.evaluate(first, 6, worse=0.5) is None
    for worse in (0.2, 0.0):
        assert sweep.evaluate(sweep.start(), 6, worse) is None
    return sweep, first


def test_successive_halving_alone_would_end_the_twin_of_a_trial_that_went_on():
    study = optuna.create_study(pruner=SuccessiveHalvingPruner(2, 3))
    ended = []
    for value in (0.5, 0.2, 0.0, 0.5):
        trial = study.ask()
        trial.report(value, 2)
        ended.append(trial.should_prune())
    assert ended == [False, False, False, True]


@pytest.mark.parametrize("block", [HYPERBAND, STRICT])
def test_the_twin_of_a_trial_that_went_on_goes_on(tmp_path, block):
    sweep, _ = run_to_a_late_twin(block, tmp_path)
    assert sweep.evaluate(sweep.start(), 6, worse=0.5) is None
    assert sweep.evaluate(sweep.start(), 6, worse=0.4) is not None


def test_the_twin_of_a_trial_that_ended_later_goes_on_until_there(tmp_path):
    sweep, first = run_to_a_late_twin(STRICT, tmp_path)
    sweep.evaluate(sweep.start(), 30)
    assert sweep.evaluate(first, 30, worse=0.5) is not None
    sweep.study.tell(first, state=TrialState.PRUNED)
    twin = sweep.start()
    assert sweep.evaluate(twin, 6, worse=0.5) is None
    assert sweep.evaluate(twin, 30, worse=0.5) is not None


@pytest.mark.parametrize("block", [HYPERBAND, STRICT])
@pytest.mark.parametrize("is_told", [True, False])
def test_the_twin_of_a_trial_that_was_ended_ends_too(tmp_path, block, is_told):
    sweep = Sweep(tmp_path, block)
    sweep.evaluate(sweep.start(), 6)
    for _ in range(2):
        trial = sweep.start()
        assert sweep.evaluate(trial, 6, worse=0.5) is not None
        if is_told:
            sweep.study.tell(trial, state=TrialState.PRUNED)


def test_the_twin_of_a_failed_trial_is_judged_by_its_rank(tmp_path):
    sweep, first = run_to_a_late_twin(STRICT, tmp_path)
    sweep.study.tell(first, state=TrialState.FAIL)
    assert sweep.evaluate(sweep.start(), 6, worse=0.5) is not None


# Resumed and forked trials


def test_a_resumed_trial_is_decided_by_the_value_that_it_reported_first(tmp_path):
    sweep = Sweep(tmp_path, "{type: median, min_trials: 1}")
    best, again = sweep.start(), sweep.start()
    sweep.evaluate(best, 6)
    sweep.study.tell(best, 1.0)
    for _ in range(2):  # Optuna would warn, which is an error here
        assert sweep.evaluate(again, 6, worse=0.5) is not None
    assert sweep.values(again) == pytest.approx({2: EXAMPLES.mean() + 0.5})


@pytest.mark.parametrize("block", [HYPERBAND, STRICT])
def test_a_trial_that_was_to_end_when_its_process_died_ends_when_resumed(tmp_path, block):
    sweep = Sweep(tmp_path, block)
    sweep.evaluate(sweep.start(), 6)
    trial = sweep.start()
    reason = sweep.evaluate(trial, 6, worse=0.5)
    resumed = optuna.trial.Trial(sweep.study, trial._trial_id)
    assert reason is not None and sweep.evaluate(resumed, 6, worse=0.5) == reason


def test_a_resumed_trial_is_judged_as_of_the_step_that_it_repeats(tmp_path):
    sweep = Sweep(tmp_path, "{type: wilcoxon}")
    best, trial = sweep.start(), sweep.start()
    for step in (6, 12):
        sweep.evaluate(best, step)
    assert sweep.evaluate(trial, 6, worse=-0.5) is None
    assert sweep.evaluate(trial, 12, worse=0.5) is not None
    assert sweep.evaluate(trial, 6, worse=-0.5) is None


def history(sweep, trial, losses):
    """Lines of a metrics.jsonl with an evaluation every 6 steps, its per-example losses beside it."""
    lines = [{"step": 0, "time": 1.0, "eval/loss": 9.0}]
    for number, worse in enumerate(losses, start=1):
        step = 6 * number
        lines.append({"step": step, "time": 1.0, "train/loss": 2.0})
        lines.append({"step": step, "time": 1.0, "eval/loss": sweep.measure(trial, step, worse)})
    return lines


def test_a_forked_trial_stands_at_the_rungs_of_its_stage(tmp_path):
    sweep = Sweep(tmp_path, STRICT)
    forked = sweep.start()
    lines = history(sweep, forked, [0.3, 0.2, 0.1, 0.1, 0.0, -0.1])
    assert sweep.pruning.forked(forked, CONFIG, lines) is None
    assert list(sweep.values(forked)) == [2, 3, 4, 5, 6, 7]
    # A later trial meets its value of that rung, 0.3, and not the last one.
    assert sweep.evaluate(sweep.start(), 6, worse=0.25) is None
    assert sweep.evaluate(sweep.start(), 6, worse=0.35) is not None


def test_a_forked_trial_has_no_values_of_a_cooldown(tmp_path):
    sweep = Sweep(tmp_path, STRICT)
    forked = sweep.start()
    sweep.pruning.forked(forked, COOLING, history(sweep, forked, [0.1] * 10))
    assert list(sweep.values(forked)) == [2, 3, 4, 5, 6, 7, 8, 9]


def test_a_forked_trial_ends_by_its_last_value_alone(tmp_path):
    sweep = Sweep(tmp_path, HYPERBAND)
    leader = sweep.start()
    for step in (6, 12, 18, 24, 30):
        sweep.evaluate(leader, step)
    behind, ahead = sweep.start(), sweep.start()
    reason = sweep.pruning.forked(behind, CONFIG, history(sweep, behind, [0.5] * 5))
    assert reason is not None and "at step 30 (value 6)" in reason
    recovered = history(sweep, ahead, [0.5, 0.5, 0.5, 0.5, -0.5])
    assert sweep.pruning.forked(ahead, CONFIG, recovered) is None


def test_forked_trials_are_not_ended_by_their_leader(tmp_path):
    sweep = Sweep(tmp_path, STRICT)
    leader = sweep.start()
    sweep.evaluate(leader, 6, worse=0.5)
    for worse in (0.1, 0.0):
        sweep.evaluate(sweep.start(), 6, worse)
    for _ in range(3):
        forked = sweep.start()
        assert sweep.pruning.forked(forked, CONFIG, history(sweep, forked, [0.5])) is None


# The types


def ended_at(sweep, worse, steps=(6, 12, 18, 24, 30, 36, 42, 48)):
    """For each step of `steps`: where a new trial ends that is worse from there on, than all before it."""
    best = sweep.start()
    for step in steps:
        sweep.evaluate(best, step)
    sweep.study.tell(best, 1.0)
    found = []
    for first in steps:
        trial = sweep.start()
        for step in steps:
            if sweep.evaluate(trial, step, worse + first / 1000 if step >= first else 0.0):
                found.append((first, step))
                sweep.study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            found.append((first, None))
            sweep.study.tell(trial, 1.0)
    return dict(found)


@pytest.mark.parametrize(
    ("block", "rungs"),
    [
        ("{type: hyperband, min_iter: 2, eta: 3}", [6, 30]),
        ("{type: hyperband, min_iter: 1, eta: 3}", [12, 48]),  # value 1 is the base model's
        ("{type: hyperband, max_iter: 8, s: 2, eta: 2}", [6, 18, 42]),
        ("{type: asha, min_iter: 2, eta: 2}", [6, 18, 42]),
        ("{type: asha, min_iter: 2, eta: 2, s: 1}", [18, 42]),
        ("{type: asha, min_iter: 1, eta: 2}", [6, 18, 42]),
        ("{type: wilcoxon, min_iter: 6}", [30, 36, 42, 48]),
        ("{type: median, min_iter: 7, min_trials: 1}", [36, 42, 48]),
    ],
)
def test_each_type_compares_at_its_rungs(tmp_path, block, rungs):
    ended = ended_at(Sweep(tmp_path, block), 0.5)
    if "median" in block:
        # It takes a trial's best value so far: one that was as good as the others goes on.
        assert ended == {6: 36} | dict.fromkeys((12, 18, 24, 30, 36, 42, 48))
        return
    assert ended == {
        first: next((rung for rung in rungs if rung >= first), None) for first in ended
    }


def test_median_waits_for_min_trials_to_finish(tmp_path):
    sweep = Sweep(tmp_path, "{type: median, min_trials: 2}")
    ended = []
    for worse in (0.5, 0.4):
        good = sweep.start()
        sweep.evaluate(good, 6)
        sweep.study.tell(good, 1.0)
        ended.append(sweep.evaluate(sweep.start(), 6, worse) is not None)
    assert ended == [False, True]


def test_percentile_keeps_that_share_of_the_finished(tmp_path):
    sweep = Sweep(tmp_path, "{type: percentile, percentile: 50, min_trials: 3, strict: true}")
    for worse in (0.0, 0.2, 0.4):
        good = sweep.start()
        sweep.evaluate(good, 6, worse)
        sweep.study.tell(good, 1.0)
    assert sweep.evaluate(sweep.start(), 6, worse=0.1) is None
    reason = sweep.evaluate(sweep.start(), 6, worse=0.3)
    assert reason is not None and "percentile keeps the best 50 % of 4;" in reason


def test_brackets_compare_trials_of_the_same_bracket_only(tmp_path):
    sweep = Sweep(tmp_path, "{type: hyperband_brackets, min_iter: 2, max_iter: 6, strict: true}")
    for number in range(12):
        trial = sweep.start()
        for step in (6, 12, 18, 24, 30):
            if sweep.evaluate(trial, step, worse=number / 10):
                break
    first = [line for line in sweep.lines() if line["value_number"] == 2]
    second = [line for line in sweep.lines() if line["value_number"] == 6]
    in_bracket_of_2 = {line["trial"] for line in first}
    in_bracket_of_6 = {line["trial"] for line in second} - in_bracket_of_2
    assert in_bracket_of_2 and in_bracket_of_6
    assert in_bracket_of_2 | in_bracket_of_6 == set(range(12))
    assert max(line["num_compared"] for line in first) == len(in_bracket_of_2)


def test_patient_ends_a_trial_that_becomes_worse_whatever_the_others_do(tmp_path):
    sweep = Sweep(tmp_path, "{type: patient, patience: 2, min_delta: 0.05}")
    trial = sweep.start()
    path = [0.5, 0.3, 0.34, 0.32, 0.31, 0.4, 0.4, 0.4]
    ended = [sweep.evaluate(trial, 6 * n, worse) is not None for n, worse in enumerate(path, 1)]
    assert ended == [False] * 7 + [True]


def test_wilcoxon_cannot_be_built_without_losses(tmp_path):
    with pytest.raises(ValueError, match="wilcoxon compares losses, but none are given"):
        build_pruner(define(tmp_path, "{type: wilcoxon}"))


def test_without_losses_the_rule_decides_alone(tmp_path):
    pruner = build_pruner(define(tmp_path, HYPERBAND))
    assert isinstance(pruner, ConfirmedPruner) and pruner.wilcoxon is None


# The log


def test_every_decision_is_a_line_whether_kept_or_ended(tmp_path):
    sweep = Sweep(tmp_path, HYPERBAND)
    sweep.evaluate(sweep.start(), 6)
    sweep.evaluate(sweep.start(), 6, 0.001, noise=1.0)
    reason = sweep.evaluate(sweep.start(), 6, 0.5)
    first, kept, ended = sweep.lines()
    mean = EXAMPLES.mean()
    assert first.pop("time") > 1.7e9
    assert first == {
        "trial": 0,
        "step": 6,
        "value_number": 2,
        "loss": pytest.approx(mean),
        "pruned": False,
        "rule": "hyperband keeps the best third of 1",
        "num_compared": 1,
        "best_trial": None,
        "best_loss": None,
        "p_value": None,
    }
    assert (kept["pruned"], kept["best_trial"], kept["best_loss"]) == (
        False,
        0,
        pytest.approx(mean),
    )
    assert kept["p_value"] > 0.1
    assert ended["pruned"] and ended["p_value"] < 0.1 and ended["num_compared"] == 3
    assert Decision(**ended).reason == reason


def test_between_two_rungs_there_is_nothing_to_decide(tmp_path):
    sweep = Sweep(tmp_path, HYPERBAND)
    trial = sweep.start()
    for step in range(6, 61, 6):
        sweep.evaluate(trial, step)
    assert [line["value_number"] for line in sweep.lines()] == [2, 6]


def test_a_studys_own_pruner_is_asked_and_named(tmp_path):
    sweep = Sweep(tmp_path, None)
    sweep.study.pruner = optuna.pruners.ThresholdPruner(upper=3.3)
    assert sweep.evaluate(sweep.start(), 6) is None
    reason = sweep.evaluate(sweep.start(), 6, worse=2)
    assert reason is not None and ": ThresholdPruner decides on one of 2; best is" in reason
