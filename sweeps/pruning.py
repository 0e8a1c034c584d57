"""Early stopping on held-out loss: which trials end at a rung, decided by Optuna's pruners.

`early_terminate` -> `build_pruner` -> the study's pruner. An evaluation -> `Pruning.decide` -> the value is
reported to Optuna, the pruner asked, the decision appended to pruning.jsonl -> why the trial ends, or None.
What Optuna calls a step is the number of values of the metric, as W&B counts them: the base model's, before
any training, is the first. docs/pruning.md says what each type does.
"""

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from sweeps.ledger import METRIC
from sweeps.spec import SweepDefinition
from training.config import TrialConfig
from training.paths import SweepPaths
from training.schedules import is_cooling_down

P_THRESHOLD = 0.1
"""Optuna's own default of its Wilcoxon pruner."""
ETA = 3
"""W&B's default."""
MIN_TRIALS = 5
"""Optuna's default of its median and percentile pruners."""
FIRST_TRAINED_VALUE = 2

Losses = Callable[[int, int], pd.DataFrame]
"""Per-example validation losses of a trial, by its number, after a number of optimizer steps."""


def build_pruner(definition: SweepDefinition, losses: Losses | None = None) -> BasePruner:
    """Optuna's pruner for `early_terminate`; NopPruner where the definition has none.

    Args:
        definition: the sweep.
        losses: `example_id`, `loss_sum` (nats) and `num_tokens` of a trial's evaluation. None: nothing
            can be confirmed, so that the rule decides alone, as with `strict`.

    Raises:
        ValueError: type wilcoxon without losses.
    """
    block = definition.config.get("early_terminate")
    if block is None:
        return NopPruner()
    kind, at_value = block["type"], _losses_at_value(definition, losses)
    if kind == "patient":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # its interface may change
            return PatientPruner(None, block["patience"], block.get("min_delta", 0.0))
    if kind == "wilcoxon":
        if at_value is None:
            raise ValueError("early_terminate.type wilcoxon compares losses, but none are given")
        return WilcoxonRungPruner(
            at_value,
            p_threshold=block.get("p_threshold", P_THRESHOLD),
            min_iter=block.get("min_iter", FIRST_TRAINED_VALUE),
        )
    inner, kept = _rule_of(block)
    wilcoxon = None
    if at_value is not None and not block.get("strict", False):
        wilcoxon = WilcoxonRungPruner(at_value)
    return ConfirmedPruner(inner, wilcoxon, rule=f"{kind} keeps {kept}")


def stored_losses(paths: SweepPaths) -> Losses:
    """The per-example losses that the sweep's trials have written."""
    return lambda number, step: pd.read_parquet(paths.trial(number).eval_losses(step))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a pruner says of a trial at its last value."""

    pruned: bool
    p_value: float | None = None
    """Of the paired test; None where it was not needed, or not possible."""
    at_rung: bool = True
    """Whether the rule compares trials at this value at all."""


class WilcoxonRungPruner(BasePruner):
    """Ends a trial that is worse, example by example, than the best other one at the same value.

    The same test as `optuna.pruners.WilcoxonPruner` (paired, one-sided, Wilcoxon signed-rank), which
    takes the examples for steps and so has one comparison a trial; this one has one at every value.
    The best may be running or finished, also pruned, but not failed. Values are losses: lower is better.

    Args:
        losses: per-example losses of a trial at one of its reported steps: columns `example_id`,
            `loss_sum` (nats) and `num_tokens`. FileNotFoundError from it keeps the trial.
        p_threshold: a smaller p value ends the trial, if its mean is worse, too.
        min_iter: nothing is compared before this value.
    """

    def __init__(
        self,
        losses: Callable[[FrozenTrial, int], pd.DataFrame],
        p_threshold: float = P_THRESHOLD,
        min_iter: int = 1,
    ) -> None:
        self.losses, self.p_threshold, self.min_iter = losses, p_threshold, min_iter

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return self.verdict(study, trial).pruned

    def verdict(self, study: optuna.Study, trial: FrozenTrial) -> Verdict:
        number = trial.last_step
        if number is None or number < self.min_iter:
            return Verdict(False, at_rung=False)
        best = _best_other(_standing(study, number), trial)
        # The metric weighs examples by their tokens, the test does not: worse means by both.
        if best is None or not trial.intermediate_values[number] > best.intermediate_values[number]:
            return Verdict(False)
        try:
            differences = _paired_differences(self.losses(trial, number), self.losses(best, number))
        except FileNotFoundError:
            return Verdict(False)
        if len(differences) < 2 or not np.isfinite(differences).all():
            return Verdict(False)
        test = stats.wilcoxon(differences, alternative="greater", zero_method="zsplit")
        p_value = float(test.pvalue)  # pyright: ignore[reportAttributeAccessIssue]
        return Verdict(bool(p_value < self.p_threshold and differences.mean() > 0), p_value)


class ConfirmedPruner(BasePruner):
    """Ends what another pruner wants to end, unless that may be noise or the trial has a twin.

    With few trials a rank says little: the comparison with the best trial at that value must confirm
    it. A trial whose value equals that of one that went on from there goes on as well: Optuna's rule
    ends it if more trials have come in between, but forked trials have their leader's very values.

    Args:
        inner: the rule.
        wilcoxon: the comparison; None: the rule decides alone.
        rule: what it does, for people, e.g. `hyperband keeps the best third`.
    """

    def __init__(
        self,
        inner: BasePruner,
        wilcoxon: WilcoxonRungPruner | None = None,
        *,
        rule: str | None = None,
    ) -> None:
        self.inner, self.wilcoxon = inner, wilcoxon
        self.rule = rule or f"{type(inner).__name__} decides on one"

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return self.verdict(study, trial).pruned

    def verdict(self, study: optuna.Study, trial: FrozenTrial) -> Verdict:
        number = trial.last_step
        if number is None:
            return Verdict(False, at_rung=False)
        if (key := _pruned_key(number)) in trial.system_attrs:
            # Successive halving judges a trial once a rung, but the process that asked has died.
            return Verdict(True, trial.system_attrs[key])
        num_rungs = _num_rungs(trial)
        wants = self.inner.prune(study, trial)
        at_rung = wants or self._compares(study, trial, num_rungs)
        if not wants or _has_surviving_twin(study, trial, number):
            return Verdict(False, at_rung=at_rung)
        verdict = Verdict(True)
        # No test can be made with a loss that is no number, and none is needed.
        if self.wilcoxon is not None and math.isfinite(trial.intermediate_values[number]):
            verdict = self.wilcoxon.verdict(study, trial)
        if verdict.pruned:
            study._storage.set_trial_system_attr(trial._trial_id, key, verdict.p_value)
        return verdict

    def _compares(self, study: optuna.Study, trial: FrozenTrial, num_rungs: int) -> bool:
        """Whether the rule, which has just been asked, looks at this value."""
        if not isinstance(self.inner, SuccessiveHalvingPruner | HyperbandPruner):
            return True
        # It notes every rung that a trial has reached on the trial itself.
        return _num_rungs(study._storage.get_trial(trial._trial_id)) > num_rungs


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One line of pruning.jsonl."""

    trial: int
    step: int
    """Optimizer steps."""
    value_number: int
    """How many values of the metric the trial has, with the base model's."""
    loss: float | None
    """Validation loss, nats a supervised token; None if it is no number."""
    pruned: bool
    rule: str
    num_compared: int
    """Trials that the rule compares, this one included."""
    best_trial: int | None
    """The best of the others at this value."""
    best_loss: float | None
    p_value: float | None
    """That the trial is as good as the best; None where it was not computed."""
    time: float
    """Unix seconds."""

    @property
    def reason(self) -> str:
        """The decision as one line for people."""
        loss = "not a number" if self.loss is None else f"{self.loss:.4f}"
        parts = [f"{METRIC} {loss} at step {self.step} (value {self.value_number}): {self.rule}"]
        if self.best_trial is not None:
            parts.append(f"best is trial {self.best_trial} with {self.best_loss:.4f}")
        if self.p_value is not None:
            parts.append(f"Wilcoxon p {self.p_value:.2g}")
        return "; ".join(parts)


@dataclass
class Pruning:
    """Asks a study's pruner at each evaluation, and logs what it says.

    Values measured in a cooldown are not reported: a trial whose learning rate falls looks better than
    a longer one whose rate does not yet, and would end it.
    """

    study: optuna.Study
    paths: SweepPaths
    """`decisions` is appended to."""

    def decide(
        self, trial: optuna.Trial, config: TrialConfig, step: int, loss: float
    ) -> str | None:
        """Why the trial ends at this evaluation, or None.

        Args:
            trial: in flight.
            config: its settings.
            step: optimizer steps; an evaluation between two multiples of `eval_steps` does not count.
            loss: validation loss, nats a supervised token. The first that is told for a step holds: a
                resumed trial measures some of them again.
        """
        number = self._value_number(config, step)
        if number is None:
            return None
        return self._decide(self._reported(trial, number, loss), step)

    def forked(
        self, trial: optuna.Trial, config: TrialConfig, metrics: Iterable[Mapping[str, Any]]
    ) -> str | None:
        """The same for a trial that begins with a stage: it stands at every rung that the stage has passed.

        Args:
            trial: in flight.
            config: its settings.
            metrics: lines of its metrics.jsonl, in order.

        Returns:
            Why the trial ends at the last of these values, or None.
        """
        frozen, last = None, 0
        for line in metrics:
            step, loss = line.get("step", 0), line.get(METRIC)
            number = self._value_number(config, step)
            if number is None or step <= 0 or loss is None:
                continue
            if frozen is not None:
                self._verdict(frozen)  # takes its place at this rung, which the stage has passed
            frozen, last = self._reported(trial, number, loss), step
        return None if frozen is None else self._decide(frozen, last)

    def _value_number(self, config: TrialConfig, step: int) -> int | None:
        """Number of the value that is measured after `step` steps; None if it does not count."""
        if isinstance(self.study.pruner, NopPruner):
            return None
        if step % config.eval_steps or is_cooling_down(config, step):
            return None
        return step // config.eval_steps + 1

    def _reported(self, trial: optuna.Trial, number: int, loss: float) -> FrozenTrial:
        """The trial as it stood when it had `number` values."""
        if number not in self._stored(trial).intermediate_values:
            trial.report(loss, number)
        frozen = copy.copy(self._stored(trial))
        # A trial that was killed has reported more than it has saved.
        frozen.intermediate_values = {
            step: value for step, value in frozen.intermediate_values.items() if step <= number
        }
        return frozen

    def _stored(self, trial: optuna.Trial) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _verdict(self, frozen: FrozenTrial) -> Verdict:
        pruner = self.study.pruner
        if isinstance(pruner, WilcoxonRungPruner | ConfirmedPruner):
            return pruner.verdict(self.study, frozen)
        return Verdict(pruner.prune(self.study, frozen))

    def _decide(self, frozen: FrozenTrial, step: int) -> str | None:
        verdict = self._verdict(frozen)
        if not verdict.at_rung:
            return None
        number = frozen.last_step
        assert number is not None
        standing, loss = _standing(self.study, number), frozen.intermediate_values[number]
        rule, num_compared = _explain(self.study, frozen, standing)
        best = _best_other(standing, frozen)
        decision = Decision(
            trial=frozen.number,
            step=step,
            value_number=number,
            loss=loss if math.isfinite(loss) else None,
            pruned=verdict.pruned,
            rule=rule,
            num_compared=num_compared,
            best_trial=None if best is None else best.number,
            best_loss=None if best is None else best.intermediate_values[number],
            p_value=verdict.p_value,
            time=round(time.time(), 3),
        )
        line = json.dumps(asdict(decision), allow_nan=False) + "\n"
        with open(self.paths.decisions, "ab", buffering=0) as file:
            file.write(line.encode())  # one call: lines of several processes do not mix
        return decision.reason if decision.pruned else None


def _losses_at_value(
    definition: SweepDefinition, losses: Losses | None
) -> Callable[[FrozenTrial, int], pd.DataFrame] | None:
    """`losses` by the number of a trial's value; trials may differ in `eval_steps`."""
    if losses is None:
        return None

    def at_value(trial: FrozenTrial, number: int) -> pd.DataFrame:
        settings = {**definition.constants, **trial.params}
        eval_steps = settings.get("eval_steps", TrialConfig.eval_steps)
        return losses(trial.number, (number - 1) * eval_steps)

    return at_value


def _rule_of(block: Mapping[str, Any]) -> tuple[BasePruner, str]:
    """Pruner of a type that compares trials by rank, and what it keeps."""
    eta, min_iter = block.get("eta", ETA), block.get("min_iter", 0)
    shares = {2: "the best half", 3: "the best third", 4: "the best quarter"}
    kept = shares.get(eta, f"the best 1 in {eta}")
    match block["type"]:
        case "hyperband":
            return _successive_halving(_first_rung(block, eta), eta, 0), kept
        case "asha":
            return _successive_halving(min_iter, eta, block.get("s", 0)), kept
        case "hyperband_brackets":
            return HyperbandPruner(min_iter, block["max_iter"], eta), f"{kept} of its bracket"
        case "median":
            trials = block.get("min_trials", MIN_TRIALS)
            return MedianPruner(trials, n_warmup_steps=min_iter), "the better half"
        case "percentile":
            percentile, trials = block["percentile"], block.get("min_trials", MIN_TRIALS)
            pruner = PercentilePruner(percentile, trials, n_warmup_steps=min_iter)
            return pruner, f"the best {percentile:g} %"
        case kind:
            raise ValueError(f"early_terminate.type is {kind!r}, which sweeps.spec refuses")


def _first_rung(block: Mapping[str, Any], eta: int) -> int:
    """W&B's lowest rung: `min_iter`, or down from `max_iter` in `s` divisions by `eta`."""
    if "min_iter" in block:
        return block["min_iter"]
    first = block["max_iter"]
    for _ in range(block["s"]):
        first = first // eta or first  # W&B leaves out rungs below 1
    return first


def _successive_halving(min_iter: int, eta: int, rate: int) -> SuccessiveHalvingPruner:
    # At value 1 all trials have the base model's loss. It is not reported, and Optuna, which compares
    # at the first value that it is told, would take value 2 for that rung.
    rate = max(rate, 1) if min_iter == 1 else rate
    return SuccessiveHalvingPruner(min_iter, eta, min_early_stopping_rate=rate)


def _standing(study: optuna.Study, number: int) -> list[FrozenTrial]:
    """Trials that have a value of this number, failed ones left out."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.FAIL
        and math.isfinite(trial.intermediate_values.get(number, math.nan))
    ]


def _best_other(standing: list[FrozenTrial], trial: FrozenTrial) -> FrozenTrial | None:
    """The best of the others; the first of equals."""
    number = trial.last_step
    assert number is not None
    others = [other for other in standing if other.number != trial.number]
    return min(others, key=lambda other: other.intermediate_values[number], default=None)


def _has_surviving_twin(study: optuna.Study, trial: FrozenTrial, number: int) -> bool:
    return any(
        other.number != trial.number
        and other.intermediate_values[number] == trial.intermediate_values[number]
        and _survived(other, number)
        for other in _standing(study, number)
    )


def _survived(trial: FrozenTrial, number: int) -> bool:
    """Whether the trial went on after this value."""
    assert trial.last_step is not None
    is_pruned = trial.state == TrialState.PRUNED or _pruned_key(number) in trial.system_attrs
    return trial.last_step > number or not is_pruned


def _pruned_key(number: int) -> str:
    return f"pruned_at_value_{number}"


def _num_rungs(trial: FrozenTrial) -> int:
    return sum(key.startswith("completed_rung_") for key in trial.system_attrs)


def _paired_differences(losses: pd.DataFrame, best: pd.DataFrame) -> np.ndarray:
    """How much worse each example's loss is, nats a token."""
    pairs = losses.merge(best, on="example_id", suffixes=("", "_best"))
    difference = pairs["loss_sum"] / pairs["num_tokens"]
    return (difference - pairs["loss_sum_best"] / pairs["num_tokens_best"]).to_numpy()


def _explain(
    study: optuna.Study, trial: FrozenTrial, standing: list[FrozenTrial]
) -> tuple[str, int]:
    """The rule in words, and how many trials it compares, this one included."""
    pruner = study.pruner
    inner = pruner.inner if isinstance(pruner, ConfirmedPruner) else pruner
    others = [other for other in standing if other.number != trial.number]
    if isinstance(inner, PatientPruner):
        return "patient keeps what has not become worse", 1
    if isinstance(inner, HyperbandPruner):
        bracket = inner._get_bracket_id(study, trial)
        others = [other for other in others if inner._get_bracket_id(study, other) == bracket]
    elif isinstance(inner, PercentilePruner):
        others = [other for other in others if other.state == TrialState.COMPLETE]
    if isinstance(pruner, ConfirmedPruner):
        rule = pruner.rule
    elif isinstance(pruner, WilcoxonRungPruner):
        rule = "wilcoxon keeps what may be as good as the best"
    else:
        rule = f"{type(pruner).__name__} decides on one"
    return f"{rule} of {len(others) + 1}", len(others) + 1
