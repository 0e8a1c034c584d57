"""What each gate measures, whom it refuses, and what force records."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset
from deploy_sweep import trained_sweep

from deploy.gates import Gate, Gates, not_overfitted, sweep_gates
from deploy.promote import PromoteOptions, choose_trial, promote
from deploy.score import TestScore, trained_on
from sweeps.ledger import read_sweep
from training.examples import BatchOrder
from training.exceptions import ConfigError, GateError, SweepError
from training.paths import SweepPaths, read_json, write_json

NUM_EXAMPLES = 20


@pytest.fixture
def sweep(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> SweepPaths:
    """A copy of the trained sweep with a second trial, which may be changed."""
    paths = SweepPaths(tmp_path / "tiny")
    source = trained_sweep(tmp_path_factory.getbasetemp())
    shutil.copytree(source, paths.root, ignore=shutil.ignore_patterns("promoted", "test", "train"))
    shutil.copytree(paths.trial(0).root, paths.trial(1).root)
    write_json(paths.trial(1).config, {**read_json(paths.trial(1).config), "number": 1})
    return paths


def _losses(mean: float, prefix: str = "", count: int = NUM_EXAMPLES) -> pd.DataFrame:
    """Losses of `count` examples around `mean` nats a token, of two tokens each."""
    sums = [2 * (mean + 0.01 * (n % 5 - 2)) for n in range(count)]
    ids = [f"{prefix}{n}" for n in range(count)]
    return pd.DataFrame({"example_id": ids, "loss_sum": sums, "num_tokens": 2})


def _change(paths: SweepPaths, number: int, **values: Any) -> None:
    write_json(paths.trial(number).result, {**read_json(paths.trial(number).result), **values})


def _evaluated(paths: SweepPaths, number: int, losses: pd.DataFrame) -> None:
    step = read_json(paths.trial(number).result)["best_step"]
    file = paths.trial(number).eval_losses(step)
    file.parent.mkdir(exist_ok=True)
    losses.to_parquet(file)
    _change(paths, number, **{"eval/loss": losses["loss_sum"].sum() / losses["num_tokens"].sum()})


def _gates(paths: SweepPaths, number: int) -> dict[str, Gate]:
    record = read_sweep(paths.root)
    return {gate.name: gate for gate in sweep_gates(record, record.trial(number))}


def _score(adapter_train: float, adapter_test: float, base: float = 4.0) -> TestScore:
    return TestScore(
        _losses(adapter_test), _losses(base), _losses(adapter_train, "t"), _losses(base, "t"), False
    )


def test_what_is_gained_on_training_examples_alone_is_overfitting() -> None:
    half = not_overfitted(_score(adapter_train=1.0, adapter_test=2.5), 0.6)
    known_by_heart = not_overfitted(_score(adapter_train=0.5, adapter_test=3.9), 0.5)

    assert half.passed
    assert half.value["overfitting"] == pytest.approx(0.5)
    assert not known_by_heart.passed
    with pytest.raises(
        GateError,
        match=r"gained \+3\.5000 .* 20 training examples and \+0\.1000 on 20 .* at most 50%",
    ):
        Gates().check(known_by_heart)


def test_harder_test_examples_are_no_overfitting() -> None:
    score = TestScore(_losses(5.0), _losses(7.0), _losses(1.0, "t"), _losses(3.0, "t"), False)

    assert not_overfitted(score, 0.0).value["overfitting"] == pytest.approx(0.0)


def test_a_handful_of_examples_refuses_nobody_as_overfitted() -> None:
    score = TestScore(_losses(3.9), _losses(4.0), _losses(0.5, "t", 4), _losses(4.0, "t", 4), False)

    gate = not_overfitted(score, 0.5)

    assert gate.passed and gate.value["overfitting_at_least"] is None


@pytest.mark.parametrize("best_step", [3, 60])
def test_overfitting_is_looked_for_on_examples_that_were_trained_on(
    sweep: SweepPaths, best_step: int
) -> None:
    _change(sweep, 0, best_step=best_step)
    trial = read_sweep(sweep.root).trial(0)
    config = trial.config
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    order = BatchOrder(50, batch, accumulation, config.seed)
    seen = {int(n) for step in range(best_step) for rows in order.micro_batches(step) for n in rows}

    chosen = trained_on(trial, Dataset.from_dict({"number": list(range(50))}), 10)["number"]

    assert set(chosen) <= seen
    assert len(set(chosen)) == len(list(chosen)) == min(10, len(seen))


def test_a_chosen_trial_that_is_measurably_worse_than_the_leader_is_refused(
    sweep: SweepPaths,
) -> None:
    _evaluated(sweep, 0, _losses(0.5))
    _evaluated(sweep, 1, _losses(0.9))

    gate = _gates(sweep, 1)["not_worse_than_leader"]

    assert not gate.passed
    assert gate.value["leader"] == 0
    assert gate.value["low"] > 0
    with pytest.raises(GateError, match=r"worse than trial 0's, by \+0\.4000"):
        promote(sweep.root, PromoteOptions(trial=1))
    assert [path.name for path in sweep.promoted.iterdir()] in ([".lock"], [])
    assert _gates(sweep, 0)["not_worse_than_leader"].passed


def test_a_chosen_trial_within_noise_of_the_leader_passes(sweep: SweepPaths) -> None:
    leader = _losses(0.5)
    noise = [0.3 * (-1) ** n + 0.01 for n in range(NUM_EXAMPLES)]
    _evaluated(sweep, 0, leader)
    _evaluated(sweep, 1, leader.assign(loss_sum=leader["loss_sum"] + noise))

    gate = _gates(sweep, 1)["not_worse_than_leader"]

    assert gate.passed and gate.value["difference"] > 0


def test_a_comparison_that_cannot_be_made_is_not_passed(sweep: SweepPaths) -> None:
    _evaluated(sweep, 0, _losses(0.5))
    _change(sweep, 1, **{"eval/loss": 0.6})

    gate = _gates(sweep, 1)["not_worse_than_leader"]

    assert not gate.passed and "cannot be compared with the leader, 0" in gate.detail


def test_trials_of_another_validation_set_are_named(sweep: SweepPaths) -> None:
    _change(sweep, 1, validation_hash="another")

    gates = _gates(sweep, 1)

    assert not gates["same_held_out_set"].passed
    assert gates["same_held_out_set"].value == 1
    assert "trials 0 were scored on another validation set" in gates["same_held_out_set"].detail
    assert gates["not_worse_than_leader"].passed


def test_a_pruned_trial_is_promoted_only_by_force_and_one_without_result_never(
    sweep: SweepPaths,
) -> None:
    _change(sweep, 1, state="pruned")
    record = read_sweep(sweep.root)

    with pytest.raises(SweepError, match="the trial is pruned, but must be complete"):
        choose_trial(record, 1)
    assert choose_trial(record, 1, force=True).number == 1
    assert not _gates(sweep, 1)["finished"].passed

    sweep.trial(1).result.unlink()
    with pytest.raises(SweepError, match="the trial is running, but must be complete"):
        choose_trial(read_sweep(sweep.root), 1, force=True)


def test_force_publishes_and_says_which_gates_failed(sweep: SweepPaths) -> None:
    _evaluated(sweep, 0, _losses(0.5))
    _evaluated(sweep, 1, _losses(0.9))

    version = promote(sweep.root, PromoteOptions(trial=1, quantization=["F16"], force=True))

    for record in (read_json(version.verification), read_json(version.manifest)):
        assert record["forced"] is True
        assert record["failed_gates"] == ["not_worse_than_leader"]
    gates = {gate["name"]: gate for gate in read_json(version.verification)["gates"]}
    assert {"finished", "same_held_out_set", "beats_base", "not_overfitted"} < gates.keys()
    assert gates["finished"]["passed"] and gates["finished"]["value"] == "complete"
    assert gates["beats_base"]["value"]["high"] < 0
    assert not gates["not_worse_than_leader"]["passed"]
    card = version.card.read_text("utf-8")
    assert "promoted with `--force`.** Gates not met: `not_worse_than_leader`" in card


def test_a_negative_tolerance_is_named(sweep: SweepPaths) -> None:
    with pytest.raises(ConfigError, match=r"--max_overfitting is -1\.0, but must be >= 0"):
        promote(sweep.root, PromoteOptions(max_overfitting=-1.0))
