"""Orders of a sweep's trials, compared in virtual time (`benchmarks.simulation`).

python -m benchmarks.scheduling     the table of docs/scheduling.md, about 30 s
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml

from benchmarks.simulation import (
    SLOTS,
    Landscape,
    SimulatedTrial,
    Simulation,
    landscapes,
    make_queue,
    on_idle_device,
)
from sweeps.spec import SweepDefinition, read_definition
from sweeps.trial_queue import TrialQueue
from training.job import Job

RESULTS = Path(__file__).with_name("results")
GRID = Path(__file__).parents[1] / "sweeps" / "configs" / "grid.yaml"
NUM_LANDSCAPES = 8
TIMES_STEPS = 10
"""The grid's steps are those of minutes on a CPU: too short for rungs."""
PRUNING = {"type": "hyperband", "min_iter": 2, "eta": 3, "strict": True}
"""By rank alone: simulated losses have no examples, by which a test could confirm it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []
    for policy in POLICIES:
        rows.append(measure(policy))
        print(rows[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scheduling.json").write_text(json.dumps(rows, indent=2) + "\n")
    (RESULTS / "scheduling.md").write_text(table(rows))
    print(f"\n{table(rows)}\n{RESULTS / 'scheduling.json'}")


# Orders to compare with the one that `TrialQueue` has


class Racing(TrialQueue):
    """Nobody waits for a stage: who comes first stores it, and meanwhile others train the same steps."""

    def _is_ready(self, job: Job) -> bool:
        return all(job.config != other.config for other in self.running.values())


class SamplersOrder(TrialQueue):
    """The first that can begin."""

    def _take_ready(self) -> Job | None:
        job = next((job for job in self.waiting if self._is_ready(job)), None)
        if job is not None:
            self.waiting.remove(job)
        return job


class LongestFirst(TrialQueue):
    """Of all that can begin, the longest."""

    def _take_ready(self) -> Job | None:
        ready = [job for job in self.waiting if self._is_ready(job)]
        job = max(ready, key=lambda job: job.config.max_steps, default=None)
        if job is not None:
            self.waiting.remove(job)
        return job


@dataclass(frozen=True)
class Policy:
    name: str
    kind: type[TrialQueue] = TrialQueue
    slots: int = SLOTS
    shares_stages: bool = True


POLICIES = (
    Policy("one trial at a time, nothing shared", slots=1, shares_stages=False),
    Policy("8 slots, nothing shared", shares_stages=False),
    Policy("shared, racing", Racing),
    Policy("shared, the sampler's order", SamplersOrder),
    Policy("shared, longest first", LongestFirst),
    Policy("shared, shortest first (ours)"),
)


def grid_definition(root: Path, early_terminate: Mapping[str, Any] | None) -> SweepDefinition:
    """The 36 trials of grid.yaml with more steps and a schedule that lets them share."""
    config = yaml.safe_load(GRID.read_text("utf-8"))
    parameters = config["parameters"]
    values = parameters["max_steps"]["values"]
    parameters["max_steps"]["values"] = [TIMES_STEPS * steps for steps in values]
    parameters["lr_scheduler_type"] = {"value": "warmup_stable_decay"}
    if early_terminate:
        config["early_terminate"] = dict(early_terminate)
    path = root / "grid.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return read_definition(path)


def measure(policy: Policy) -> dict[str, Any]:
    """What the 36 trials need under one policy, and with pruning on average over landscapes."""
    whole = simulate(policy)
    pruned, gaps = [], []
    for landscape in landscapes(NUM_LANDSCAPES):
        pruned.append(simulate(policy, landscape, PRUNING))
        gaps.append(best_loss(pruned[-1]) - least_loss(pruned[-1]))
    return {
        "policy": policy.name,
        # With one worker the order does not hang on the time of a step: one simulation gives both times.
        "steps": len(whole.trained),
        "time_idle_device": whole.time,
        "first_result": whole.ended[0],
        "num_stages": len(whole.disk.stages),
        "pruning": {
            "steps": round(statistics.mean(len(run.trained) for run in pruned)),
            "time_idle_device": round(statistics.mean(run.time for run in pruned)),
            "gap": round(statistics.mean(gaps), 4),
        },
    }


def simulate(
    policy: Policy,
    landscape: Landscape | None = None,
    early_terminate: Mapping[str, Any] | None = None,
    step_time: Callable[[int], float] = on_idle_device,
) -> Simulation:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        queue = make_queue(
            grid_definition(root, early_terminate),
            root / "runs",
            kind=policy.kind,
            shares_stages=policy.shares_stages,
        )
        return Simulation(
            queue=queue,
            slots=policy.slots,
            step_time=step_time,
            landscape=landscape or Landscape(),
        ).run()


def best_loss(simulation: Simulation) -> float:
    best = simulation.queue.best()
    assert best is not None
    return best[1]


def least_loss(simulation: Simulation) -> float:
    """Of the trial that is best if none is pruned."""
    queue = simulation.queue
    losses = []
    for point in queue.planned or []:
        trial = SimulatedTrial.alone(queue.definition.trial_config(point), simulation.landscape)
        losses.append(min(loss for _, loss in trial.evals[1:]))
    return min(losses)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a policy."""
    lines = [
        "| order | steps | time, idle device | first result | stages "
        "| steps, pruning | time, pruning | gap to the best |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['policy']} | {row['steps']:,} | {row['time_idle_device']:,.0f} "
        f"| {row['first_result']:,.0f} | {row['num_stages']} | {row['pruning']['steps']:,} "
        f"| {row['pruning']['time_idle_device']:,} | {row['pruning']['gap']:.4f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
