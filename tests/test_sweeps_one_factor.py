"""The one-factor design: what is tried, in which order, and what becomes the combination."""

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState, create_trial

from sweeps.one_factor import OneFactorSampler
from training.exceptions import SweepError

NINE_RUNS = {
    "max_steps": [60, 300, 500, 1000],
    "learning_rate": [1e-4, 2e-4, 5e-4],
    "lora_r": [8, 16, 32],
}
# The original study's own losses.
LOSSES = {
    (60, 2e-4, 16): 1.1774,
    (300, 2e-4, 16): 0.9736,
    (500, 2e-4, 16): 0.9414,
    (1000, 2e-4, 16): 0.9068,
    (500, 1e-4, 16): 0.9684,
    (500, 5e-4, 16): 0.9216,
    (500, 2e-4, 8): 0.9561,
    (500, 2e-4, 32): 0.9286,
    (1000, 5e-4, 32): 0.8916,
}


def make_study(factors):
    return optuna.create_study(sampler=OneFactorSampler(factors))


def sampler_of(study) -> OneFactorSampler:
    assert isinstance(study.sampler, OneFactorSampler)
    return study.sampler


def ask(study):
    sampler = sampler_of(study)
    trial = study.ask({name: optuna.distributions.CategoricalDistribution(values)
                       for name, values in sampler.factors.items()})  # fmt: skip
    return trial, tuple(trial.params[name] for name in sampler.factors)


def run_all(study, losses, num_trials):
    """Runs the design; a point without a loss fails. Returns the names and points."""
    done = []
    for _ in range(num_trials):
        trial, point = ask(study)
        loss = losses.get(point)
        study.tell(trial, loss, state=TrialState.FAIL if loss is None else None)
        done.append((trial.user_attrs["name"], point))
    return done


def test_the_nine_run_study_is_asked_for_in_its_order():
    study = make_study(NINE_RUNS)
    assert run_all(study, LOSSES, 9) == [
        ("baseline", (60, 2e-4, 16)),
        ("max_steps=300", (300, 2e-4, 16)),
        ("centre", (500, 2e-4, 16)),
        ("max_steps=1000", (1000, 2e-4, 16)),
        ("learning_rate=0.0001", (500, 1e-4, 16)),
        ("learning_rate=0.0005", (500, 5e-4, 16)),
        ("lora_r=8", (500, 2e-4, 8)),
        ("lora_r=32", (500, 2e-4, 32)),
        ("combination", (1000, 5e-4, 32)),
    ]
    assert sampler_of(study).is_exhausted(study)


def test_the_design_starts_at_the_centre_where_steps_are_not_varied():
    study = make_study({"lora_r": [8, 16, 32]})
    names = [name for name, _ in run_all(study, {(8,): 3.0, (16,): 2.0, (32,): 1.0}, 4)]
    assert names == ["baseline", "lora_r=8", "lora_r=32", "combination"]


def test_steps_come_first_when_a_server_has_sorted_the_parameters():
    sampler = OneFactorSampler(dict(sorted(NINE_RUNS.items())))
    assert sampler.baseline == {"max_steps": 60, "learning_rate": 2e-4, "lora_r": 16}
    assert len(sampler.design) == 8


def test_a_tie_goes_to_the_centre_then_to_the_first_listed_value():
    same = dict.fromkeys(LOSSES, 1.0)
    study = make_study(NINE_RUNS)
    assert run_all(study, same, 9)[-1] == ("combination", (500, 2e-4, 16))
    worse_centre = {**same, (500, 2e-4, 16): 2.0}
    study = make_study(NINE_RUNS)
    run_all(study, worse_centre, 8)
    assert sampler_of(study).next_point(study)[1] == {
        "max_steps": 60, "learning_rate": 1e-4, "lora_r": 8,
    }  # fmt: skip


def test_a_failed_trial_is_tried_and_never_best():
    losses = {point: loss for point, loss in LOSSES.items() if point != (1000, 2e-4, 16)}
    losses[500, 5e-4, 32] = 0.9
    study = make_study(NINE_RUNS)
    names = run_all(study, losses, 9)
    assert names[3] == ("max_steps=1000", (1000, 2e-4, 16))
    assert names[-1] == ("combination", (500, 5e-4, 32))


@pytest.mark.filterwarnings("ignore:The value nan is not acceptable")
def test_a_trial_that_ends_in_nan_is_never_best():
    study = make_study(NINE_RUNS)
    losses = {**LOSSES, (500, 5e-4, 16): float("nan"), (1000, 2e-4, 32): 0.9}
    assert run_all(study, losses, 9)[-1] == ("combination", (1000, 2e-4, 32))


def test_the_centres_values_are_combined_when_every_trial_has_failed():
    study = make_study(NINE_RUNS)
    assert run_all(study, {}, 9)[-1] == ("combination", (500, 2e-4, 16))


def test_the_combination_changes_when_a_failed_trial_succeeds_at_last():
    losses = {point: loss for point, loss in LOSSES.items() if point != (1000, 2e-4, 16)}
    losses[500, 5e-4, 32] = 0.9
    study = make_study(NINE_RUNS)
    run_all(study, losses, 9)
    assert sampler_of(study).is_exhausted(study)
    study.enqueue_trial({"max_steps": 1000, "learning_rate": 2e-4, "lora_r": 16})
    trial, _ = ask(study)
    study.tell(trial, 0.9068)
    assert not sampler_of(study).is_exhausted(study)
    assert ask(study)[1] == (1000, 5e-4, 32)


def test_a_study_rebuilt_from_trials_without_names_continues_where_it_was():
    study = make_study(NINE_RUNS)
    distributions: dict[str, BaseDistribution] = {name: optuna.distributions.CategoricalDistribution(values)
                     for name, values in NINE_RUNS.items()}  # fmt: skip
    points = list(LOSSES.items())[:8]
    for point, loss in reversed(points[1:]):  # a tracker's list may come in any order
        params = dict(zip(NINE_RUNS, point, strict=True))
        study.add_trial(create_trial(params=params, distributions=distributions, value=loss))
    assert ask(study)[1] == (60, 2e-4, 16)


def test_the_combination_waits_for_running_trials():
    study = make_study({"max_steps": [1, 2]})
    trials = [ask(study)[0] for _ in range(2)]
    study.tell(trials[0], 1.0)
    with pytest.raises(SweepError, match="still running: run one trial at a time"):
        ask(study)
    assert not sampler_of(study).is_exhausted(study)


def test_a_point_in_flight_is_not_asked_for_twice():
    study = make_study(NINE_RUNS)
    points = [ask(study)[1] for _ in range(8)]
    assert len(set(points)) == 8


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["max_steps", "lora_r", "lora_alpha", "seed"]),
        st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True),
        min_size=1,
    ),
    st.randoms(use_true_random=False),
)
def test_every_design_moves_one_factor_at_a_time_and_ends_with_its_best_values(factors, random):
    study = make_study(factors)
    sampler = sampler_of(study)
    values = {}
    for index in range(sampler.num_trials):
        trial, point = ask(study)
        values.setdefault(point, random.random())
        study.tell(trial, values[point])
        moved = sum(trial.params[name] != sampler.centre[name] for name in factors)
        if index < sampler.num_trials - 1:
            assert moved <= 1
            continue
        for name in factors:
            at = {
                value: values[tuple({**sampler.centre, name: value}.values())]
                for value in factors[name]
            }
            assert at[trial.params[name]] == min(at.values())
    assert sampler.is_exhausted(study)
    assert len(values) >= sum(len(items) - 1 for items in factors.values()) + 1
