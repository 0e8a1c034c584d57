"""The stages of a sweep: where its trials part from one another, and what is stored of that.

    python -m sweeps.stages runs/quickstart            lists them
    python -m sweeps.stages runs/quickstart --delete   frees their space; trials and results stay

`branch_points` says after which steps of a trial another trial of the search space may part from it: there,
and nowhere else, a stage is stored (`training.fork`). `Sharing` knows which trials in flight are about to
store a stage that others wait for.
"""

import itertools
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from optuna.distributions import BaseDistribution
from rich import box
from rich.table import Table

from sweeps.directory import locked
from sweeps.ledger import read_sweep
from sweeps.parameters import listed_values
from sweeps.terminal import make_console
from training.cli import make_parser, parse, run_command
from training.config import TrialConfig
from training.job import Job
from training.paths import SweepPaths
from training.schedules import SCHEDULE_SETTINGS, shared_steps
from training.stage import list_stages, prefix_hash

MOST_BRANCHES = 16
"""Most stages of one trial; a space with more branch points is cut at multiples of eval_steps."""
LEAST_STEPS = 2
"""A stage of fewer steps costs as much to store and load as to train."""
_MOST_ALTERNATIVES = 1024


def branch_points(space: dict[str, BaseDistribution], config: TrialConfig) -> tuple[int, ...]:
    """Steps after which another trial of the search space parts from this one, in order.

    Args:
        space: distributions of the varied settings; where one varies continuously, nothing is shared.
        config: the trial.
    """
    values = {name: listed_values(distribution) for name, distribution in space.items()}
    if not all(values.values()):
        return ()  # no two trials have the same value of what varies continuously
    choices = {
        name: values[name]
        for name in SCHEDULE_SETTINGS
        if name in space and name != "learning_rate"  # another peak is another rate from the start
    }
    points = set()
    alternatives = itertools.product(*choices.values())
    for point in itertools.islice(alternatives, _MOST_ALTERNATIVES):
        other = replace(config, **dict(zip(choices, point, strict=True)))
        steps = shared_steps(config, other)
        if steps >= LEAST_STEPS and other != config:
            points.add(steps)
    if len(points) > MOST_BRANCHES:
        points = {step - step % config.eval_steps for step in points} - {0}
        points = set(sorted(points)[:: -(-len(points) // MOST_BRANCHES)]) if points else points
    return tuple(sorted(points))


def planned_steps(
    space: dict[str, BaseDistribution], configs: Sequence[TrialConfig], shares_stages: bool = True
) -> int:
    """Steps that all of these trials need when each shared one is trained once."""
    total, seen = 0, set[str]()
    for config in sorted(configs, key=lambda config: -config.max_steps):
        prefixes = _prefixes_at(config, branch_points(space, config) if shares_stages else ())
        shared = max((step for prefix, step in prefixes.items() if prefix in seen), default=0)
        total += config.max_steps - shared
        seen |= prefixes.keys()
    return total


@dataclass
class Sharing:
    """Which stages are stored, and which trials in flight are on their way to one.

    By the settings alone: whether base model and data are the same, too, is for the process that trains to
    see. A stage that turns out not to fit is trained again, which costs time and nothing else.
    """

    stored: set[str] = field(default_factory=set)
    """`prefix_hash` of every stage."""
    leaders: dict[int, dict[str, int]] = field(default_factory=dict)
    """Trial in flight -> prefix and step of the stages that it has not stored yet."""

    @classmethod
    def of(cls, paths: SweepPaths) -> "Sharing":
        return cls({stage.prefix for _, stage in list_stages(paths.stages)})

    def began(self, number: int, job: Job) -> None:
        self.leaders[number] = {
            prefix: step for prefix, step in _prefixes(job).items() if prefix not in self.stored
        }

    def stored_by(self, number: int, job: Job, step: int) -> None:
        prefix = prefix_hash(job.config, step)
        self.stored.add(prefix)
        self.leaders.get(number, {}).pop(prefix, None)

    def passed(self, number: int, step: int) -> None:
        """The trial stores nothing up to this step any more."""
        ahead = {prefix: at for prefix, at in self.leaders.get(number, {}).items() if at > step}
        self.leaders[number] = ahead

    def ended(self, number: int) -> None:
        self.leaders.pop(number, None)

    def is_worth_waiting(self, job: Job) -> bool:
        """Whether a trial in flight is about to store more of this one's steps than are stored."""
        prefixes = _prefixes(job)
        longest = max(
            (step for prefix, step in prefixes.items() if prefix in self.stored), default=0
        )
        return any(
            prefixes.get(prefix, 0) > longest
            for leader in self.leaders.values()
            for prefix in leader
        )


def _prefixes(job: Job) -> dict[str, int]:
    """Prefix and step of each of the trial's branch points; computed once."""
    if job.prefixes is None:
        job.prefixes = _prefixes_at(job.config, job.branches)
    return job.prefixes


def _prefixes_at(config: TrialConfig, branches: Iterable[int]) -> dict[str, int]:
    return {prefix_hash(config, step): step for step in branches}


@dataclass(kw_only=True)
class StagesOptions:
    """Options of `python -m sweeps.stages`."""

    delete: bool = field(
        default=False,
        metadata={"help": "Delete all stages: trials that need one train its steps again."},
    )


def main() -> None:
    parser = make_parser(
        "sweeps.stages", "List, or delete, the stages that a sweep's trials share.", [StagesOptions]
    )
    parser.add_argument("sweep", help="sweep directory, e.g. runs/quickstart")
    options, positional = parse(parser)
    record = read_sweep(Path(positional.sweep))
    if options.delete:
        with locked(record.paths):
            num = len(list_stages(record.paths.stages))
            size = _size_bytes(record.paths.stages)
            shutil.rmtree(record.paths.stages, ignore_errors=True)
        make_console().print(f"{num} stages deleted, {size / 2**20:,.0f} MiB freed")
        return
    _print_stages(record.paths)


def _print_stages(paths: SweepPaths) -> None:
    forks: dict[str, list[int]] = {}
    saved = 0
    for trial in read_sweep(paths.root).all_trials:
        origin = trial.result.get("forked_from")
        if origin:
            forks.setdefault(origin["stage"], []).append(trial.number)
            saved += trial.result["steps_saved"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "steps", "by trial", "forked by", "MiB", "settings"):
        table.add_column(name, justify="right" if name in ("steps", "MiB") else "left")
    total = 0
    stages = sorted(list_stages(paths.stages), key=lambda item: (item[1].trial, item[1].step))
    for path, stage in stages:
        size = _size_bytes(path)
        total += size
        varied = {
            name: stage.settings[name]
            for name in ("learning_rate", "lora_r", "lr_scheduler_type", "seed")
            if name in stage.settings
        }
        table.add_row(
            path.name,
            str(stage.step),
            stage.trial,
            ", ".join(map(str, forks.get(path.name, []))) or "-",
            f"{size / 2**20:,.0f}",
            " ".join(f"{name}={value}" for name, value in varied.items()),
        )
    console = make_console()
    if stages:
        console.print(table, soft_wrap=False)
    console.print(
        f"{len(stages)} stages, {total / 2**20:,.0f} MiB; {saved:,} steps saved by forking them"
    )


def _size_bytes(directory: Path) -> int:
    """Files of their own; what is linked from a trial takes no space."""
    files = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return sum(status.st_size for status in files if status.st_nlink == 1)


if __name__ == "__main__":
    run_command(main)
