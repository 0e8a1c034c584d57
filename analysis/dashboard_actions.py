"""What the dashboard's buttons do: each asks first, says what will happen, and goes through the study.

A button's `do` -> `ask` (sentence, fields) -> the browser's answer -> `obey`, which writes a request for the
runner (`sweeps.requests`) or begins a promotion. Nothing is done for a page that does not know the secret.
"""

import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from analysis.dashboard_promotion import Promotions
from analysis.dashboard_statistics import Statistics
from analysis.live import LiveSweep, LiveTrial
from analysis.readable import load_readable
from sweeps import requests
from training.exceptions import ConfigError, LoraloomError, SweepError

STOP, SEEDS, LEADERS, QUEUE, PROMOTE = "stop", "seeds", "leaders", "queue", "promote"
LABELS = {
    STOP: "Stop this trial",
    SEEDS: "Add seeds",
    LEADERS: "Add seeds to the leaders",
    QUEUE: "Queue a setting",
    PROMOTE: "Promote",
}
NUM_SEEDS = "num_seeds"


@dataclass(frozen=True)
class Field:
    """One input of a question; with `values` it is a choice among them, otherwise a number."""

    name: str
    values: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    default: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked before anything is done."""

    action: str
    text: str
    """What is going to happen, in one sentence."""
    numbers: tuple[int, ...] = ()
    """Of the trials that it is about."""
    fields: tuple[Field, ...] = ()


class Actions:
    """The buttons of all sweeps; with `is_read_only` there are none."""

    def __init__(self, *, is_read_only: bool = False):
        self.is_read_only = is_read_only
        self.secret = secrets.token_urlsafe()
        """Stands in our own pages alone, which no other site's page can read."""
        self.promotions = Promotions()

    def on_trial(self, sweep: LiveSweep, trial: LiveTrial) -> list[str]:
        """Buttons of a trial's page."""
        if self.is_read_only:
            return []
        actions = {"running": [STOP], "complete": [SEEDS, PROMOTE]}.get(trial.state, [])
        return [action for action in actions if action == PROMOTE or takes_requests(sweep)]

    def on_sweep(self, sweep: LiveSweep, trials: list[LiveTrial]) -> list[str]:
        """Buttons of a sweep's page."""
        if self.is_read_only:
            return []
        is_done = any(trial.state == "complete" for trial in trials)
        actions = [QUEUE, *([LEADERS, PROMOTE] if is_done else [])]
        return [action for action in actions if action == PROMOTE or takes_requests(sweep)]

    def ask(
        self, action: Any, sweep: LiveSweep, trial: LiveTrial | None, known: Statistics
    ) -> Question:
        """The question behind a button.

        Raises:
            LoraloomError: it cannot be done, in one line.
        """
        seeds = Field(NUM_SEEDS, low=1, high=requests.MOST_SEEDS, default="2")
        if action == STOP and trial:
            text = (
                f"Trial {trial.number} ends at its next evaluation, as pruned; what it has is kept."
            )
            return Question(STOP, text, (trial.number,))
        if action == SEEDS and trial:
            text = f"The setting of trial {trial.number} is trained again with that many further seeds."
            return Question(SEEDS, text, (trial.number,), (seeds,))
        if action == LEADERS:
            if not known.tied:
                raise SweepError(
                    "Which trials lead is not known: their per-example losses are missing, or are still "
                    "being compared"
                )
            names = ", ".join(str(number) for number in sorted(known.tied))
            text = (
                f"Each of the {len(known.tied)} trials that may be the best one ({names}) is trained "
                "again with that many further seeds."
            )
            return Question(SEEDS, text, known.tied, (seeds,))
        if action == QUEUE:
            text = "A trial with this setting is trained next."
            return Question(QUEUE, text, fields=setting_fields(sweep))
        if action == PROMOTE:
            number = trial.number if trial else _best(sweep)
            text = (
                f"Trial {number} is scored on the test split, merged, converted and verified on this "
                "machine now (minutes); if it passes, it becomes the version in use."
            )
            return Question(PROMOTE, text, (number,))
        raise SweepError("there is nothing of that kind to do here")

    def obey(self, order: Mapping[str, Any], sweep: LiveSweep) -> str:
        """Does what was confirmed; returns what was done, in one line.

        Raises:
            LoraloomError: it cannot be done, in one line.
        """
        given = order.get("secret")
        if self.is_read_only or not isinstance(given, str):
            raise ConfigError("nothing can be changed from this page")
        if not hmac.compare_digest(given.encode(), self.secret.encode()):
            raise ConfigError("this page is of an earlier start of the dashboard: reload it")
        if order.get("action") != PROMOTE and not takes_requests(sweep):
            raise ConfigError("this sweep is not one of sweeps.run: nobody would take the request")
        action, numbers, values = order.get("action"), order.get("numbers"), order.get("values")
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ConfigError("the trials must be given by their numbers")
        if not isinstance(values, Mapping):
            raise ConfigError("the values must be given by their names")
        if action == QUEUE:
            requests.queue_setting(sweep.paths, values)
            return "The setting is queued."
        if action == SEEDS and numbers:
            count = _count(values.get(NUM_SEEDS))
            requests.add_seeds(sweep.paths, numbers, count)
            return f"Asked for {count} more seeds of {_trials(numbers)}."
        if action == STOP and len(numbers) == 1:
            requests.stop_trial(sweep.paths, numbers[0])
            return f"Asked trial {numbers[0]} to stop."
        if action == PROMOTE and len(numbers) == 1:
            self.promotions.start(sweep.paths, numbers[0])
            return f"The promotion of trial {numbers[0]} has begun."
        raise ConfigError("there is nothing of that kind to do here")


def takes_requests(sweep: LiveSweep) -> bool:
    """Whether `sweeps.run` runs it: W&B's agents, and what was pulled from there, take no requests."""
    return sweep.paths.study.is_file() or sweep.paths.decision_lock.is_file()


def _best(sweep: LiveSweep) -> int:
    """The best trial among those that can be read."""
    results, _ = load_readable(sweep.paths.root)
    if results.sweep is None:
        raise SweepError(f"{sweep.paths.root}: no trial has finished")
    return results.sweep.best().number


def setting_fields(sweep: LiveSweep) -> tuple[Field, ...]:
    """An input for each setting that the sweep varies.

    Raises:
        SweepError: the definition cannot be read.
    """
    path = sweep.paths.definition
    try:
        parameters = yaml.safe_load(path.read_text("utf-8"))["parameters"]
        varied = {str(name): spec for name, spec in parameters.items() if "value" not in spec}
        fields = tuple(_setting_field(name, spec) for name, spec in varied.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        raise SweepError(f"{path}: cannot be read as a sweep's definition") from None
    if not fields:
        raise SweepError(f"{path}: varies no setting")
    return fields


def _setting_field(name: str, spec: Mapping[str, Any]) -> Field:
    if "values" in spec:
        return Field(name, tuple(_text(value) for value in spec["values"]))
    low, high = float(spec["min"]), float(spec["max"])
    return Field(name, low=low, high=high, default=_text(spec["min"]))


def request_line(request: Mapping[str, Any]) -> str:
    """A pending request in words."""
    numbers = request.get("numbers")
    match request.get("action"):
        case requests.STOP_TRIAL:
            return f"stop trial {request.get('number')}"
        case requests.ADD_SEEDS:
            who = _trials(numbers) if isinstance(numbers, list) else ""
            return f"{request.get('num_seeds')} more seeds of {who}"
        case requests.QUEUE_SETTING if isinstance(params := request.get("params"), Mapping):
            return "train " + ", ".join(f"{name} {_text(value)}" for name, value in params.items())
    return str(request.get("action"))


def error_line(error: LoraloomError | OSError) -> str:
    return " ".join(str(error).split())


def _count(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"num_seeds is {value!r}, but must be a whole number") from None


def _trials(numbers: list[Any]) -> str:
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _text(value: Any) -> str:
    """A value as the form sends it and `queue_setting` reads it."""
    return value if isinstance(value, str) else json.dumps(value)
