"""A trial's state: saved whole, restored into another pack, and not used when it is damaged or another's."""

import warnings
from pathlib import Path

import pytest
import torch
from tiny_packs import TRAIN, assert_equal, close, finish, make_config, make_model

from training.checkpoint import capture, load_state, restore, save_state
from training.engine import PackedEngine
from training.examples import Examples
from training.trial import StepResult

DIFFERENT = {"lora_r": 6, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_trial_restored_in_another_pack_equals_the_undisturbed_one(
    dropout: float, tmp_path: Path
) -> None:
    config = make_config(**DIFFERENT, lora_dropout=dropout, max_steps=14, weight_decay=0.1)
    examples = Examples(TRAIN)
    with PackedEngine(make_model()) as engine:
        trial = engine.admit(config, examples, "whole")
        (expected,) = finish(engine, [trial], tmp_path)
    steps: list[StepResult] = []
    with PackedEngine(make_model()) as engine:
        trial = engine.admit(config, examples, "first")
        while trial.step < 6:
            steps += [result for _, result in engine.step()]
        save_state(capture(trial, {"note": 1}), tmp_path / "state")
    with PackedEngine(make_model()) as engine:
        engine.admit(make_config(seed=5), examples, "mate")
        trial = engine.admit(config, examples, "second")
        state = load_state(tmp_path / "state")
        assert state is not None and state.record == {"note": 1}
        restore(trial, state)
        assert trial.step == 6
        while not trial.is_done:
            steps += [result for owner, result in engine.step() if owner is trial]
        run = close(engine, trial, steps, tmp_path / "second")
    assert_equal(run, expected, 1e-5)


def test_a_state_before_the_first_step_is_a_fresh_trial(tmp_path: Path) -> None:
    config = make_config(max_steps=3)
    with PackedEngine(make_model()) as engine:
        trial = engine.admit(config, Examples(TRAIN), "t1")
        save_state(capture(trial), tmp_path / "state")
        (expected,) = finish(engine, [trial], tmp_path)
        again = engine.admit(config, Examples(TRAIN), "t2")
        state = load_state(tmp_path / "state")
        assert state is not None
        restore(again, state)
        (run,) = finish(engine, [again], tmp_path)
    assert_equal(run, expected, 1e-6)


def test_a_captured_state_does_not_change_with_its_trial() -> None:
    with PackedEngine(make_model()) as engine:
        trial = engine.admit(make_config(), Examples(TRAIN), "t1")
        engine.step()
        state = capture(trial)
        before = {name: tensor.clone() for name, tensor in state.tensors.items()}
        engine.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors.items())
    assert float(before["exp_avg_sq"].sum()) > 0


def test_a_torn_state_is_not_used(tmp_path: Path) -> None:
    with PackedEngine(make_model()) as engine:
        save_state(capture(engine.admit(make_config(), Examples(TRAIN), "t1")), tmp_path / "state")
    file = tmp_path / "state" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match="is not used"):
        assert load_state(tmp_path / "state") is None


def test_a_state_of_another_version_is_not_used(tmp_path: Path) -> None:
    with PackedEngine(make_model()) as engine:
        save_state(capture(engine.admit(make_config(), Examples(TRAIN), "t1")), tmp_path / "state")
    facts = tmp_path / "state" / "state.json"
    facts.write_text(facts.read_text().replace('"version": 2', '"version": 0'))
    with pytest.warns(RuntimeWarning, match="its version is 0, but must be 2"):
        assert load_state(tmp_path / "state") is None


def test_no_state_is_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_state(tmp_path / "state") is None


def test_a_state_of_other_settings_is_refused() -> None:
    with PackedEngine(make_model()) as engine:
        state = capture(engine.admit(make_config(lora_r=4), Examples(TRAIN), "t1"))
        other = engine.admit(make_config(lora_r=8), Examples(TRAIN), "t2")
        with pytest.raises(ValueError, match="other layers or more steps"):
            restore(other, state)
