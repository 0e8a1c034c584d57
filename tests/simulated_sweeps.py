"""Sweeps drawn at random and simulated to their end, for tests of the queue and of seeds."""

import itertools
import math
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import yaml
from hypothesis import strategies as st
from optuna.pruners import BasePruner, NopPruner

from benchmarks.simulation import (
    Disk,
    Simulation,
    make_queue,
    on_full_device,
    on_idle_device,
    study_in_memory,
    write,
)
from sweeps.ledger import METRIC, TrialRecord, read_sweep
from sweeps.spec import SweepDefinition, read_definition
from sweeps.stages import LEAST_STEPS
from sweeps.trial_queue import TrialQueue
from training.config import TrialConfig
from training.job import Job
from training.schedules import learning_rate, other_settings

optuna.logging.set_verbosity(optuna.logging.WARNING)

SCHEDULES = ("constant", "linear", "cosine", "warmup_stable_decay")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sweep and how it is run."""

    method: str = "grid"
    max_steps: tuple[int, ...] = (6, 12, 20)
    schedules: tuple[str, ...] = ("warmup_stable_decay",)
    warmups: tuple[int, ...] = (0,)
    rates: tuple[float, ...] = (2e-4,)
    ranks: tuple[int, ...] = (8,)
    eval_steps: int = 5
    run_cap: int = 12
    workers: int = 1
    slots: int = 2
    fills_device: bool = True
    target: float | None = None
    share_pruned: float = 0.0
    seed: int = 0
    deaths: tuple[tuple[float, int], ...] = ()
    """Share of the sweep's time, and worker; a number beyond the last worker is the whole process."""

    @property
    def text(self) -> str:
        varied = {
            "max_steps": self.max_steps,
            "lr_scheduler_type": self.schedules,
            "warmup_steps": self.warmups,
            "learning_rate": self.rates,
            "lora_r": self.ranks,
        }
        parameters: dict[str, Any] = {
            name: {"values": list(values)} if len(values) > 1 else {"value": values[0]}
            for name, values in varied.items()
        }
        config: dict[str, Any] = {"method": self.method, "metric": {"name": METRIC}}
        if self.target is not None:
            config["metric"]["target"] = self.target
        if self.method == "custom":
            config["scheduler"] = {
                "engine": "optuna", "source": "sweeps/study.py", "optimizer": "one_factor",
            }  # fmt: skip
        elif self.method != "grid":
            config["run_cap"] = self.run_cap
        config["parameters"] = parameters | {"eval_steps": {"value": self.eval_steps}}
        return yaml.safe_dump(config, sort_keys=False)

    @property
    def size(self) -> int:
        values = (self.max_steps, self.schedules, self.warmups, self.rates, self.ranks)
        return math.prod(map(len, values))


def some(values: Any, most: int) -> Any:
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True).map(tuple)


def cases(*, methods: tuple[str, ...] = ("grid", "random", "bayes", "custom"), **more: Any) -> Any:
    drawn = st.builds(
        Case,
        method=st.sampled_from(methods),
        max_steps=some(range(2, 31), 4),
        schedules=some(SCHEDULES, 2),
        warmups=st.sampled_from([(0,), (3,), (0, 3)]),
        rates=some((1e-4, 3e-4, 7e-4), 2),
        ranks=some((8, 16), 2),
        eval_steps=st.integers(2, 12),
        run_cap=st.integers(1, 15),
        workers=st.integers(1, 3),
        slots=st.integers(1, 8),
        fills_device=st.booleans(),
        seed=st.integers(0, 9),
        **more,
    )
    return drawn.filter(lambda case: case.method != "custom" or case.size > 1)


BAYES_OF_ONE_FAMILY = Case(
    method="bayes",
    max_steps=(3, 5),
    schedules=("constant",),
    eval_steps=2,
    run_cap=3,
    slots=3,
    fills_device=False,
    deaths=((0.55, 0),),
)
"""Of a sampler that is asked late: when the trial in flight dies, one that waits for it is the shorter."""

deaths = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=4).map(tuple)
prunings = st.sampled_from([0.1, 0.3, 0.6])


class RandomPruner(BasePruner):
    """Ends a share of all trials at each evaluation; always the same ones."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.seed = share, seed

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        draw = random.Random(f"{self.seed} {trial.number} {trial.last_step}")
        return draw.random() < self.share


@dataclass(kw_only=True)
class Queue(TrialQueue):
    told: Counter[int] = field(default_factory=Counter)

    def _tell(self, number: int, result: dict[str, Any]) -> None:
        self.told[number] += 1
        super()._tell(number, result)


@dataclass(kw_only=True)
class Done:
    """A sweep that has been simulated to its end."""

    definition: SweepDefinition
    queue: Queue
    disk: Disk
    trained: list[tuple[int, int]]
    lost: list[tuple[int, int, int]]
    """Trial, the step at which its worker died, and the step of its last saved state."""
    trials: list[TrialRecord]
    time: float

    @property
    def configs(self) -> list[TrialConfig]:
        return [trial.config for trial in self.trials]

    @cached_property
    def nodes(self) -> dict[int, list[int]]:
        return {trial.number: nodes(trial.config) for trial in self.trials}

    def times_trained(self) -> Counter[int]:
        """How often each distinct step was trained."""
        return Counter(self.nodes[number][step - 1] for number, step in self.trained)


@contextmanager
def directory() -> Iterator[Path]:
    """hypothesis runs many examples in one test, so pytest's tmp_path is not for it."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def define(root: Path, text: str) -> SweepDefinition:
    path = root / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return read_definition(path)


def simulate(root: Path, case: Case, *, watch: Any = None, **options: Any) -> Done:
    """Runs the case's sweep to its end; its deaths come at shares of the time that it takes without them."""
    if case.deaths:
        calm = simulate(root / "calm", replace(case, deaths=()), **options)
    root.mkdir(exist_ok=True)
    definition = define(root, case.text)
    study = study_in_memory(definition)
    study.pruner = RandomPruner(case.share_pruned, case.seed) if case.share_pruned else NopPruner()
    disk, told, now = Disk(), Counter[int](), 0.0
    trained, lost = [], []
    times = [(share * calm.time, worker) for share, worker in sorted(case.deaths)]  # pyright: ignore
    kills = [time for time, worker in times if worker >= case.workers]
    while True:
        queue = make_queue(definition, root / "runs", kind=Queue, study=study, told=told, **options)
        assert isinstance(queue, Queue)
        queue.resume()
        simulation = Simulation(
            queue=queue,
            slots=case.slots,
            num_workers=case.workers,
            step_time=on_full_device if case.fills_device else on_idle_device,
            deaths=[(at, worker) for at, worker in times if worker < case.workers and at >= now],
            disk=disk,
            time=now,
        )
        if watch is not None:
            simulation.watch = watch
        simulation.run(kills[0] if kills else math.inf)
        trained += simulation.trained
        lost += simulation.lost
        if not kills:
            break
        now = kills.pop(0)
        lost += [simulation.loss_of(trial) for trial in simulation.in_flight]
    return Done(
        definition=definition,
        queue=queue,
        disk=disk,
        trained=trained,
        lost=lost,
        trials=read_sweep(root / "runs").all_trials,
        time=simulation.time,
    )


# What must come out, by other means than the queue's own


def nodes(config: TrialConfig) -> list[int]:
    """Each step of a trial by all that is computed up to its end; equal for two trials that may share it.

    Two trials that part before `LEAST_STEPS` share nothing: steps before that are told apart by that one.
    """
    rates = (learning_rate(config, step) for step in range(config.max_steps))
    start = hash(repr(other_settings(config)))
    keys = list(itertools.accumulate(rates, lambda key, rate: hash((key, rate)), initial=start))[1:]
    first = keys[min(LEAST_STEPS, len(keys)) - 1]
    return [hash((first, step)) for step in range(LEAST_STEPS - 1)] + keys[LEAST_STEPS - 1 :]


def tree_size(configs: list[TrialConfig]) -> int:
    """Distinct steps of all these trials."""
    return len({node for config in configs for node in nodes(config)})


def common_steps(a: TrialConfig, b: TrialConfig) -> int:
    if other_settings(a) != other_settings(b):
        return 0
    pairs = (
        (learning_rate(a, s), learning_rate(b, s)) for s in range(min(a.max_steps, b.max_steps))
    )
    num = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return num if num >= LEAST_STEPS else 0


def end(job: Job, loss: float) -> dict[str, Any]:
    """Writes what a trial leaves that has trained all of its steps."""
    num_steps = job.config.max_steps
    result = {"state": "complete", METRIC: loss, "num_steps": num_steps, "steps_saved": 0}
    write(
        job.paths.config, {"settings": job.config.to_dict(), "engine": "none", **(job.info or {})}
    )
    write(job.paths.result, result)
    return result
