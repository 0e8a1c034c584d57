"""What a trial must be to be promoted: each gate measured, recorded, and refused where it is not met.

The cheap ones look at the sweep (`sweep_gates`), the others at losses of base and adapter (`beats_base`,
`not_overfitted`). `Gates.check` refuses at the first that is not met, unless promotion is forced; then the
record says which. What a *file* must be (`deploy.verify`) is no gate: no force publishes a broken file.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from analysis.stats import MIN_EXAMPLES, Interval, difference_interval
from deploy.score import CONFIDENCE, Comparison, TestScore
from sweeps.ledger import SweepRecord, TrialRecord
from training.exceptions import DataError, GateError


@dataclass(frozen=True)
class Gate:
    """One condition, and what was measured."""

    name: str
    passed: bool
    value: Any
    """JSON: a number, or a few by name."""
    must_be: str
    detail: str
    """One sentence, which is the error where it is not met."""


@dataclass
class Gates:
    """The gates of one promotion, in the order they were checked."""

    force: bool = False
    checked: list[Gate] = field(default_factory=list)

    def check(self, gate: Gate) -> None:
        """Raises GateError if the gate is not met and promotion is not forced."""
        self.checked.append(gate)
        if not gate.passed and not self.force:
            raise GateError(gate.detail)
        if not gate.passed:
            print(f"    forced, though {gate.detail}")

    @property
    def failed(self) -> list[str]:
        """Names of those that are not met."""
        return [gate.name for gate in self.checked if not gate.passed]

    def record(self) -> dict[str, Any]:
        """For verification.json."""
        return {
            "forced": bool(self.failed),
            "failed_gates": self.failed,
            "gates": [dataclasses.asdict(gate) for gate in self.checked],
        }


def sweep_gates(sweep: SweepRecord, trial: TrialRecord) -> list[Gate]:
    """Gates that need no model: finished, the same held-out set, not worse than the leader."""
    return [_finished(trial), _same_held_out_set(sweep, trial), _not_worse(sweep, trial)]


def beats_base(name: str, comparison: Comparison, tuned_name: str, base_name: str) -> Gate:
    """All of the interval of the difference in test loss must be below 0.

    Args:
        name: of the gate.
        comparison: both on the test examples.
        tuned_name: what is compared, for the sentence.
        base_name: with what.
    """
    interval, count = comparison.interval, comparison.num_examples
    passed = count >= MIN_EXAMPLES and interval.high < 0
    if count < MIN_EXAMPLES:
        detail = (
            f"the test split has {count} examples, but must have at least {MIN_EXAMPLES} to tell "
            f"whether {tuned_name} beats {base_name}; a larger test_fraction or max_eval_samples, "
            "or more data, makes it larger"
        )
    elif passed:
        detail = f"{tuned_name} beats {base_name} on {count} test examples: {comparison}"
    else:
        detail = (
            f"{tuned_name} does not beat {base_name} on {count} test examples: test loss differs "
            f"by {comparison}, but all of it must be below 0"
        )
    value = {"loss": comparison.tuned, "base": comparison.base, **_ends(interval)}
    return Gate(name, passed, value, f"{CONFIDENCE:.0%} interval below 0", detail)


def not_overfitted(score: TestScore, max_overfitting: float) -> Gate:
    """How much of what the adapter gained on the examples it trained on is missing on those it never saw.

    Overfitting is `1 - (gain on test) / (gain on training examples)`, a gain being the base's loss less the
    adapter's, at the promoted step: 0 if everything carries over, 1 if it only knows its examples by heart.
    That each set has a difficulty of its own is in the base's loss, too, and cancels. What happened *after*
    the promoted step is no matter, since that is not promoted. Refused is what is past the tolerance even at
    the ends of both intervals that lie nearest to each other: few examples refuse nobody by chance.
    """
    seen = difference_interval(score.base_train, score.adapter_train, confidence=CONFIDENCE)
    unseen = difference_interval(score.base, score.adapter, confidence=CONFIDENCE)
    share = 1 - unseen.estimate / seen.estimate if seen.estimate > 0 else 0.0
    can_tell = seen.low > 0 and math.isfinite(unseen.high)
    at_least = 1 - unseen.high / seen.low if can_tell else None
    passed = at_least is None or at_least <= max_overfitting
    value = {
        "overfitting": share,
        "overfitting_at_least": at_least,
        "gain_on_training_examples": seen.estimate,
        "gain_on_test_examples": unseen.estimate,
        "num_training_examples": len(score.base_train),
    }
    detail = (
        f"the adapter gained {seen.estimate:+.4f} nats a token on {len(score.base_train)} training "
        f"examples and {unseen.estimate:+.4f} on {len(score.base)} test examples: {share:.0%} is "
        "overfitting"
    )
    if not passed:
        detail += f", but must be at most {max_overfitting:.0%} (--max_overfitting)"
    return Gate("not_overfitted", passed, value, f"<= {max_overfitting:g}", detail)


def _finished(trial: TrialRecord) -> Gate:
    passed = trial.state == "complete"
    detail = f"trial {trial.number} is {trial.state}"
    detail += "" if passed else ", but must be complete"
    return Gate("finished", passed, trial.state, "complete", detail)


def _same_held_out_set(sweep: SweepRecord, trial: TrialRecord) -> Gate:
    others = [
        other.number
        for other in sweep.finished
        if other.loss is not None and _held_out_set(other) != _held_out_set(trial)
    ]
    detail = "all finished trials were scored on the same validation set"
    if others:
        detail = (
            f"trial {trial.number}: trials {_listed(others)} were scored on another validation set, but "
            "must have the same one for this trial to be compared with them"
        )
    return Gate("same_held_out_set", not others, len(others), "0 trials of another set", detail)


def _not_worse(sweep: SweepRecord, trial: TrialRecord) -> Gate:
    """Against the best trial of the same validation set, on its examples."""
    name, must_be = "not_worse_than_leader", f"{CONFIDENCE:.0%} interval not above 0"
    comparable = [
        other
        for other in sweep.finished
        if other.loss is not None and _held_out_set(other) == _held_out_set(trial)
    ]
    if not comparable:
        return Gate(name, True, None, must_be, "no finished trial is there to be worse than")
    leader = sweep.original(dataclasses.replace(sweep, all_trials=comparable).best())
    if leader.number == trial.number:
        return Gate(name, True, {"leader": leader.number}, must_be, "the trial is the leader")
    try:
        interval = difference_interval(_best_losses(trial), _best_losses(leader), CONFIDENCE)
    except (OSError, DataError) as error:
        cause = str(error).strip().splitlines()[0]
        detail = (
            f"trial {trial.number}: cannot be compared with the leader, {leader.number}: {cause}"
        )
        return Gate(name, False, {"leader": leader.number}, must_be, detail)
    worse = interval.low > 0
    detail = (
        f"trial {trial.number}: validation loss is {'' if worse else 'not measurably '}worse than trial "
        f"{leader.number}'s, by {interval.estimate:+.4f} "
        f"[{interval.low:+.4f}, {interval.high:+.4f}]"
    )
    detail += ", but must not be (the best one is promoted without --trial)" if worse else ""
    return Gate(name, not worse, {"leader": leader.number, **_ends(interval)}, must_be, detail)


def _held_out_set(trial: TrialRecord) -> str | None:
    return trial.result.get("validation_hash")


def _best_losses(trial: TrialRecord) -> Any:
    return trial.eval_losses(trial.result["best_step"])


def _ends(interval: Interval) -> dict[str, float | None]:
    """JSON knows no infinity: an end that is not known is null."""
    ends = {"difference": interval.estimate, "low": interval.low, "high": interval.high}
    return {name: end if math.isfinite(end) else None for name, end in ends.items()}


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + ("" if len(numbers) <= 5 else ", …")
