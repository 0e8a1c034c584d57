"""What telling W&B costs a training step: the same trial with and without it, in turn, in one process.

    python -m benchmarks.tracking

W&B's real client writes an offline run (its own process does the work that sending one would be, too). Two
numbers: the time that the training thread itself spends in the tracker, and the median step beside the
median step without W&B, which has the machine's noise in it.
"""

import contextlib
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.config import TrialConfig
from training.job import Job, JobOptions, Outcome, Trials
from training.pack import run_pack
from training.paths import TrialPaths, write_json
from training.tracking import ReportTo, WandbTracker

RESULTS = Path(__file__).with_name("results")
ROUNDS = 3
SETTINGS = {
    "max_steps": 12,
    "eval_steps": 12,
    "max_eval_samples": 8,
    "max_length": 256,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-4,
}
PACKS = (1, 4)


def main() -> None:
    results = {}
    print(
        "| trials in the pack | step, s | with W&B, s | ratio | in the tracker, µs a step | share |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for size in PACKS:
        steps: dict[ReportTo, list[float]] = {"none": [], "wandb": []}
        spent: list[float] = []
        for _ in range(ROUNDS):
            for report_to, measured in steps.items():
                with _timed_tracker() as calls:
                    measured.extend(step_times(size, report_to))
                if report_to == "wandb":
                    # Rows of a step and of the evaluations alike.
                    spent.append(sum(calls) / SETTINGS["max_steps"])
        alone, told = statistics.median(steps["none"]), statistics.median(steps["wandb"])
        tracker_s = statistics.median(spent)
        results[size] = {
            "step_s": round(alone, 4),
            "step_with_wandb_s": round(told, 4),
            "tracker_us_a_step": round(tracker_s * 1e6, 1),
            "share": tracker_s / alone,
        }
        print(
            f"| {size} | {alone:.3f} | {told:.3f} | {told / alone:.3f} | {tracker_s * 1e6:.0f} | "
            f"{tracker_s / alone:.3%} |"
        )
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "tracking.json", json.loads(json.dumps(results)))


def step_times(size: int, report_to: ReportTo) -> list[float]:
    """Seconds of each step of a pack of `size` trials; the last one has an evaluation in it."""
    directory = Path(tempfile.mkdtemp(prefix="loraloom-benchmark-"))
    try:
        trials = _Trials(directory, size)
        options = JobOptions(slots=size, report_to=report_to)
        run_pack(trials, options)
        options.close_trackers()
        lines = [
            json.loads(line)
            for line in TrialPaths(directory / "0").metrics.read_text("utf-8").splitlines()
        ]
        times = [line["time"] for line in lines if "train/loss" in line]
        return [after - before for before, after in itertools.pairwise(times)]
    finally:
        shutil.rmtree(directory)


class _Trials(Trials):
    def __init__(self, directory: Path, size: int):
        self.jobs = [
            Job(
                config=TrialConfig.from_dict({**SETTINGS, "seed": number}),
                paths=TrialPaths(directory / str(number)),
            )
            for number in range(size)
        ]

    def next_job(self) -> Job | None:
        return self.jobs.pop(0) if self.jobs else None

    def done(self, job: Job, outcome: Outcome) -> None:
        if isinstance(outcome, Exception):
            raise outcome


@contextlib.contextmanager
def _timed_tracker() -> Iterator[list[float]]:
    """Seconds of every call that training makes."""
    calls: list[float] = []
    log = WandbTracker.log

    def timed(self: WandbTracker, row: int, metrics: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        log(self, row, metrics)
        calls.append(time.perf_counter() - started)

    WandbTracker.log = timed
    try:
        yield calls
    finally:
        WandbTracker.log = log


if __name__ == "__main__":
    main()
