"""The doctor finds a machine fit, and one whose attention is wrong unfit; the planner counts what is used."""

from typing import Any

import pytest
import torch
from tiny_packs import TRAIN, make_config, make_model

from training import doctor, planner
from training.engine import PackedEngine
from training.examples import Examples
from training.exceptions import ConfigError


def test_a_sound_machine_passes_both_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.check_exactness(make_config(), make_model(max_position_embeddings=128)) == []
    assert capsys.readouterr().out.count("ok") == 2


def test_a_wrong_gradient_is_found_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from training import packed_lora

    accumulate = packed_lora._accumulate

    def wrong(total: Any, left: Any, right: Any, alpha: float) -> None:
        accumulate(total, left, right, alpha * 1.01)

    monkeypatch.setattr(packed_lora, "_accumulate", wrong)
    problems = doctor.check_exactness(make_config(), make_model(max_position_embeddings=128))
    assert len(problems) == 2
    assert "fast attention differs by" in problems[0]
    assert "FAILED" in capsys.readouterr().out


def test_a_trial_needs_its_adapter_its_moments_and_its_activations() -> None:
    config = make_config(lora_r=8, per_device_train_batch_size=2)
    with PackedEngine(make_model()) as engine:
        trial = engine.admit(config, Examples(TRAIN), "t")
        parameters = planner.num_adapter_parameters(engine, config)
        assert parameters == trial.adapter.weights.numel()
        per_token = planner.bytes_per_token(engine)
        # At least what every layer must keep for its backward pass: its inputs, in float32.
        assert per_token > 4 * 2 * (48 * 4 + 96 * 2)
        plan = planner.plan_slots(engine, config, Examples(TRAIN))
    longest = sorted(Examples(TRAIN).lengths)[-2:]
    assert plan.trial_bytes == 16 * parameters + int(per_token * sum(longest))
    assert plan.slots == planner.MOST_SLOTS["cpu"]


@pytest.mark.parametrize(("free", "slots"), [(0, 1), (4.0, 3), (1e9, 8)])
def test_slots_are_what_fits_and_at_least_one(
    free: float, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    with PackedEngine(make_model()) as engine:
        need = planner.plan_slots(engine, config, Examples(TRAIN)).trial_bytes
        monkeypatch.setattr(planner, "free_bytes", lambda device: int(free * need))
        plan = planner.plan_slots(engine, config, Examples(TRAIN))
    assert plan.slots == slots
    planner.check_slots(plan, plan.fitting)
    expected = rf"--slots is {plan.fitting + 1}, but must be <= {plan.fitting} here: a trial needs"
    with pytest.raises(ConfigError, match=expected):
        planner.check_slots(plan, plan.fitting + 1)


def test_the_plan_is_said_in_one_line() -> None:
    plan = planner.Plan(slots=8, fitting=30, trial_bytes=2**29, free_bytes=20 * 2**30)
    text = planner.describe_plan(plan, 8)
    assert text == "8 slots: a trial needs 0.50 GiB of 20.0 GiB free"
    assert planner.describe_plan(plan, 1).startswith("1 slot:")


def test_free_memory_is_that_of_the_device() -> None:
    assert 2**28 < planner.free_bytes(torch.device("cpu")) < 2**44
