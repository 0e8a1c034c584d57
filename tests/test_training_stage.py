"""Stages: a forked trial equals the one that trained everything itself; a name for each content."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import TrialConfig
from training.engine import PackedEngine
from training.fork import stage_name
from training.job import Job, JobOptions, Outcome, Trials
from training.pack import run_pack
from training.paths import TrialPaths, read_json
from training.prepared import prepare
from training.schedules import is_cooling_down, learning_rate, shared_steps
from training.stage import list_stages

SCHEDULES = ["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"]


class Queue(Trials):
    """Jobs one after the other, or at once, that share stages."""

    def __init__(self, root: Path, configs: list[TrialConfig], branches: list[tuple[int, ...]]):
        self.stages = root / "stages"
        self.jobs = [
            Job(
                config=config,
                paths=TrialPaths(root / "trials" / f"{n:04d}"),
                stages=self.stages,
                branches=points,
            )
            for n, (config, points) in enumerate(zip(configs, branches, strict=True))
        ]
        self.left = list(self.jobs)
        self.stored_steps: list[tuple[int, int]] = []
        self.outcomes: dict[int, Outcome] = {}
        self.prune_at: dict[int, int] = {}

    def next_job(self) -> Job | None:
        return self.left.pop(0) if self.left else None

    def evaluated(self, job: Job, step: int, loss: float) -> str | None:
        return "enough" if self.prune_at.get(self.jobs.index(job)) == step else None

    def stored(self, job: Job, step: int) -> None:
        self.stored_steps.append((self.jobs.index(job), step))

    def done(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[self.jobs.index(job)] = outcome

    def run(self, slots: int = 1) -> "Queue":
        run_pack(self, JobOptions(slots=slots, report_to="none"))
        return self

    def result(self, number: int) -> dict[str, Any]:
        return read_json(self.jobs[number].paths.result)

    def metrics(self, number: int) -> list[dict[str, Any]]:
        lines = self.jobs[number].paths.metrics.read_text().splitlines()
        return [json.loads(line) for line in lines]


Make = Callable[..., TrialConfig]


@pytest.fixture
def make(tiny_settings: dict[str, Any]) -> Make:
    def make_config(**settings: Any) -> TrialConfig:
        stable = {"lr_scheduler_type": "warmup_stable_decay"}
        return TrialConfig.from_dict({**tiny_settings, "lora_r": 4, **stable, **settings})

    return make_config


def assert_equal_trials(forked: Queue, alone: Queue, number: int) -> None:
    """Same history, at the same steps, and the same result, files included."""
    ours, theirs = forked.metrics(number), alone.metrics(number)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        for name in ("train/loss", "eval/loss", "learning_rate", "grad_norm"):
            assert (name in line) == (name in other)
            if name in line:
                assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-12), line["step"]
    ours, theirs = forked.result(number), alone.result(number)
    for name in ("eval/loss", "last_eval/loss", "train/loss", "base_eval/loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    for name in ("best_step", "num_steps", "tokens", "state"):
        assert ours[name] == theirs[name]
    files = [queue.jobs[number].paths for queue in (forked, alone)]
    names = [sorted(path.name for path in one.evaluations.iterdir()) for one in files]
    assert names[0] == names[1]
    assert (files[0].adapter / "adapter_model.safetensors").is_file()


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "weight_decay": 0.1},
    "dropout": {"lora_dropout": 0.2},
    "4bit": {"load_in_4bit": True},
}


@pytest.mark.parametrize(
    ("schedule", "variant"),
    [
        pytest.param(
            schedule,
            variant,
            marks=()
            if variant == "plain" or schedule == "warmup_stable_decay"
            else pytest.mark.slow,
        )
        for schedule in SCHEDULES
        for variant in VARIANTS
    ],
)
def test_a_forked_trial_equals_the_unshared_one(
    make: Make, tmp_path: Path, schedule: str, variant: str
) -> None:
    if variant != "plain" and schedule in ("linear", "cosine", "constant_with_warmup"):
        schedules = {"warmup_steps": 5}
    else:
        schedules = {"warmup_steps": 3}
    settings = {"lr_scheduler_type": schedule, **schedules, **VARIANTS[variant]}
    long, short = make(max_steps=15, **settings), make(max_steps=9, **settings)
    shared = shared_steps(long, short)
    assert shared == {"constant": 9, "constant_with_warmup": 9, "warmup_stable_decay": 8}.get(
        schedule, schedules["warmup_steps"] + 1
    )
    forked = Queue(tmp_path / "forked", [long, short], [(shared,), (shared,)]).run()
    alone = Queue(tmp_path / "alone", [long, short], [(), ()]).run()
    assert forked.stored_steps == [(0, shared)]
    assert forked.result(1)["steps_saved"] == shared
    assert forked.result(1)["forked_from"]["trial"] == "0000"
    assert forked.result(0)["steps_saved"] == 0 and forked.result(0)["forked_from"] is None
    for number in (0, 1):
        assert_equal_trials(forked, alone, number)


def test_a_longer_trial_forks_a_shorter_ones_end(make: Make, tmp_path: Path) -> None:
    """With a constant rate; and what the shorter one evaluated at its own end is not in the stage."""
    settings = {"lr_scheduler_type": "constant"}
    configs = [make(max_steps=6, **settings), make(max_steps=10, **settings)]
    forked = Queue(tmp_path / "forked", configs, [(6,), (6,)]).run()
    alone = Queue(tmp_path / "alone", configs, [(), ()]).run()
    assert forked.result(1)["steps_saved"] == 6
    for number in (0, 1):
        assert_equal_trials(forked, alone, number)
    assert not any("eval/loss" in line and line["step"] == 6 for line in forked.metrics(1))


def test_a_stage_of_a_forked_trial_is_forked_in_its_turn(make: Make, tmp_path: Path) -> None:
    configs = [make(max_steps=steps) for steps in (5, 10, 20)]
    forked = Queue(tmp_path / "forked", configs, [(4,), (4, 8), (4, 8)]).run()
    alone = Queue(tmp_path / "alone", configs, [(), (), ()]).run()
    assert [forked.result(number)["steps_saved"] for number in range(3)] == [0, 4, 8]
    assert forked.result(2)["forked_from"]["trial"] == "0001"
    for number in range(3):
        assert_equal_trials(forked, alone, number)


def test_what_a_pruned_trial_trained_is_kept_for_those_that_share_it(
    make: Make, tmp_path: Path
) -> None:
    configs = [make(max_steps=20), make(max_steps=15)]
    forked = Queue(tmp_path / "forked", configs, [(12,), (12,)])
    forked.prune_at = {0: 8}
    forked.run()
    alone = Queue(tmp_path / "alone", configs, [(), ()]).run()
    pruned = forked.result(0)
    assert (pruned["state"], pruned["reason"], pruned["num_steps"]) == ("pruned", "enough", 8)
    assert forked.result(1)["steps_saved"] == 8
    assert_equal_trials(forked, alone, 1)


def test_a_trial_that_its_stage_decides_gets_no_slot(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with what it took over, and others still fork what it shares with them."""

    class Deciding(Queue):
        def began(self, job: Job, step: int) -> str | None:
            return "enough" if self.jobs.index(job) == 1 and step else None

    admitted: list[int] = []
    admit = PackedEngine.admit

    def counting(self: PackedEngine, config: TrialConfig, *args: Any) -> Any:
        admitted.append(config.max_steps)
        return admit(self, config, *args)

    monkeypatch.setattr(PackedEngine, "admit", counting)
    configs = [make(max_steps=steps) for steps in (5, 20, 10)]
    queue = Deciding(tmp_path / "forked", configs, [(4,), (4, 8), (4, 8)]).run()
    assert admitted == [5, 10]
    decided = queue.result(1)
    assert (decided["state"], decided["reason"], decided["num_steps"]) == ("pruned", "enough", 4)
    assert (
        decided["steps_saved"] == 4
        and decided["last_eval/loss"] == queue.metrics(1)[-1]["eval/loss"]
    )
    assert (1, 4) in queue.stored_steps  # nobody waits for more of it
    assert not queue.jobs[1].paths.state.exists()
    alone = Queue(tmp_path / "alone", configs, [(), (), ()]).run()
    for number in (0, 2):
        assert_equal_trials(queue, alone, number)


def test_a_killed_forked_trial_goes_on_as_a_forked_one(make: Make, tmp_path: Path) -> None:
    configs = [make(max_steps=20), make(max_steps=10)]
    queue = Queue(tmp_path / "killed", configs, [(8,), (8,)])
    queue.run()
    alone = Queue(tmp_path / "alone", configs, [(), ()]).run()
    again = Queue(tmp_path / "killed", configs, [(8,), (8,)])
    again.left = [again.jobs[1]]
    shutil.rmtree(again.jobs[1].paths.root)
    options = JobOptions(slots=1, report_to="none")

    def stop_at(job: Job, step: int) -> None:
        options.stop.set()  # as SIGTERM does, once it has its slot

    again.began = stop_at  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        run_pack(again, options)
    assert again.jobs[1].paths.state.is_dir() and not again.jobs[1].paths.result.exists()
    last = Queue(tmp_path / "killed", configs, [(8,), (8,)])
    last.left = [last.jobs[1]]
    last.run()
    assert last.result(1)["steps_saved"] == 8
    assert_equal_trials(last, alone, 1)


@pytest.mark.parametrize("damage", ["torn", "version", "facts", "metrics"])
def test_a_stage_that_cannot_be_used_is_not(make: Make, tmp_path: Path, damage: str) -> None:
    configs = [make(max_steps=10), make(max_steps=5)]
    queue = Queue(tmp_path, configs[:1], [(4,)]).run()
    ((path, stage),) = list_stages(queue.stages)
    assert (stage.step, stage.trial) == (4, "0000")
    if damage == "torn":
        file = path / "state" / "state.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "version":
        file = path / "state" / "state.json"
        file.write_text(file.read_text().replace('"version": 2', '"version": 1'))
    elif damage == "metrics":
        (path / "metrics.jsonl").unlink()
    else:
        (path / "stage.json").write_text("{")
    again = Queue(tmp_path, configs, [(4,), (4,)])
    again.left = [again.jobs[1]]
    if damage == "facts":
        again.run()  # it is as if it were not there
    else:
        with pytest.warns(RuntimeWarning, match="is not used"):
            again.run()
    assert again.result(1)["forked_from"] is None
    assert again.result(1)["num_steps"] == 5
    last = Queue(tmp_path, [*configs, make(max_steps=8)], [(4,), (4,), (4,)])
    last.left = [last.jobs[2]]
    last.run()  # a whole one stands in its place
    assert last.result(2)["forked_from"]["trial"] == "0001"


CHANGES: dict[str, Any] = {
    "lora_r": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj"],
    "use_rslora": True,
    "seed": 1,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-2,
    "warmup_steps": 2,
    "eval_steps": 5,
    "max_eval_samples": 3,
    "max_length": 32,
    "load_in_4bit": True,
}
"""What enters the first four of ten steps, or their evaluations."""
SAME: dict[str, Any] = {
    "max_steps": 20,
    "decay_fraction": 0.5,
    "decay_type": "linear",
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": True,
    "per_device_eval_batch_size": 2,
}


def test_a_name_changes_with_what_matters_and_with_nothing_else(make: Make) -> None:
    base = make(max_steps=10)
    name = stage_name(base, 4, "content")
    for setting, value in CHANGES.items():
        changed = make(**{"max_steps": 10, setting: value})
        assert stage_name(changed, 4, "content") != name, setting
        assert shared_steps(base, changed) == 0, setting
    for setting, value in SAME.items():
        changed = make(**{"max_steps": 10, setting: value})
        assert stage_name(changed, 4, "content") == name, setting
        assert shared_steps(base, changed) >= 4, setting
    assert stage_name(base, 5, "content") != name
    assert stage_name(base, 4, "other") != name
    known = {field.name for field in dataclasses.fields(TrialConfig)}
    elsewhere = {  # which base model and examples these name is in the content
        "model_name_or_path", "model_revision", "trust_remote_code", "dtype", "dataset_name",
        "dataset_train_split", "validation_fraction", "test_fraction",
    }  # fmt: skip
    assert known == CHANGES.keys() | SAME.keys() | elsewhere


def test_the_content_is_that_of_the_files(
    make: Make, tmp_path: Path, tiny_settings: dict[str, Any]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_settings["model_name_or_path"], model)
    data = tmp_path / "data.jsonl"
    shutil.copy(tiny_settings["dataset_name"], data)
    config = make(model_name_or_path=str(model), dataset_name=str(data))
    content = prepare(config).content
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    assert prepare(make(model_name_or_path=str(moved), dataset_name=str(data))).content == content
    data.write_text("\n".join(data.read_text().splitlines()[:-20]) + "\n")
    fewer = prepare(config).content
    assert fewer != content
    other = tmp_path / "other"
    shutil.copytree(model, other)
    file = other / "model.safetensors"
    bytes_ = bytearray(file.read_bytes())
    bytes_[-1] ^= 1
    file.write_bytes(bytes(bytes_))
    assert prepare(make(model_name_or_path=str(other), dataset_name=str(data))).content != fewer


settings = st.fixed_dictionaries(
    {
        "max_steps": st.integers(1, 30),
        "lr_scheduler_type": st.sampled_from(SCHEDULES),
        "warmup_steps": st.integers(0, 8),
        "decay_fraction": st.floats(0, 1),
        "decay_type": st.sampled_from(["1-sqrt", "linear"]),
    }
)


@given(settings, settings)
def test_trials_share_the_steps_whose_rates_are_equal(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    a, b = TrialConfig(**one), TrialConfig(**two)
    shared = shared_steps(a, b)
    assert shared == shared_steps(b, a) <= min(a.max_steps, b.max_steps)
    assert all(learning_rate(a, step) == learning_rate(b, step) for step in range(shared))
    if shared < min(a.max_steps, b.max_steps):
        assert learning_rate(a, shared) != learning_rate(b, shared)
    assert (stage_name(a, shared, "") == stage_name(b, shared, "")) or shared == 0


@given(settings)
def test_a_trial_cools_down_where_its_rate_falls_at_its_end(one: dict[str, Any]) -> None:
    config = TrialConfig(**{**one, "lr_scheduler_type": "warmup_stable_decay"})
    for step in range(1, config.max_steps + 1):
        after_warmup = range(config.warmup_steps, step)
        has_fallen = any(learning_rate(config, s) < config.learning_rate for s in after_warmup)
        assert is_cooling_down(config, step) == has_fallen
