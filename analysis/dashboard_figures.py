"""The dashboard's pictures, each in two halves: `_get_*_info` (data) and `_get_*_plot` (drawing)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.dashboard_shared import drawn_from
from analysis.drawing import (
    Figure,
    Points,
    axes,
    line,
    local_ms,
    packed,
    short,
    smoothed,
    thinned,
)
from analysis.figures import PALETTE
from analysis.lines import EVAL, NORM, RATE, STEP, TIME, TRAIN, number_or_none
from analysis.live import LiveTrial

STATE_COLORS = {
    "complete": "#1a7f5a",
    "running": "#3066be",
    "stopped": "#7a5ba8",
    "pruned": "#b07d12",
    "failed": "#c23b4e",
    "damaged": "#7f7f7f",
}


@dataclass(frozen=True)
class Curve:
    """What a trial trained itself, thinned."""

    label: str
    train: Points
    """Smoothed."""
    evaluated: Points
    best_step: float | None


@dataclass(frozen=True)
class Stint:
    """Time without a long break in which a trial was trained, Unix seconds."""

    number: int
    label: str
    state: str
    start_s: float
    end_s: float


class Drawings:
    """Figures of a sweep; what is drawn of trials that have gained nothing is not made again."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Any, Any]] = {}

    def curves(self, shown: Sequence[LiveTrial]) -> Figure:
        """Loss curves of the trials shown."""
        return _get_curves_plot(
            [
                self._made(_get_curve_info, trial, saved)
                for trial, saved in zip(shown, drawn_from(shown), strict=True)
            ]
        )

    def timeline(self, trials: Sequence[LiveTrial]) -> Figure:
        """Who trained when."""
        stints = []
        for trial, saved in zip(trials, drawn_from(trials), strict=True):
            stints += self._made(_get_timeline_info, trial, saved)
        return _get_timeline_plot(stints)

    def _made(self, make: Callable[[LiveTrial, float], Any], trial: LiveTrial, saved: float) -> Any:
        key = (trial.version, trial.state, saved, trial.loss)
        known = self._kept.get((make, trial.paths.root))
        if known is None or known[0] != key:
            known = self._kept[make, trial.paths.root] = (key, make(trial, saved))
        return known[1]


def label_of(trial: LiveTrial) -> str:
    name = trial.record.name if trial.record else "damaged"
    return f"{trial.number} {short(name)}"


def trial_curves(trial: LiveTrial) -> Figure:
    """Everything a trial's metrics say, steps that it took from a stage included."""
    return _get_trial_plot(_get_trial_info(trial), trial.steps_saved or 0)


def _get_curve_info(trial: LiveTrial, saved: float) -> Curve:
    best = trial.record.result.get("best_step") if trial.record else None
    train, evaluated = trial.metrics.series(TRAIN), trial.metrics.series(EVAL)
    smooth = smoothed(train[:, TRAIN])
    own = train[:, STEP] > saved
    # From the point before its own on, so that a fork's line leaves the one that it came from.
    first = evaluated[:, STEP] >= max([0.0, *evaluated[evaluated[:, STEP] <= saved, STEP]])
    kept = evaluated[first] if saved < trial.num_steps or not saved else evaluated[:0]
    return Curve(
        label=label_of(trial),
        train=thinned(train[own, STEP], smooth[own]),
        evaluated=thinned(kept[:, STEP], kept[:, EVAL]),
        best_step=number_or_none(best),
    )


def _get_curves_plot(curves: Sequence[Curve]) -> Figure:
    data = []
    for number, curve in enumerate(curves):
        color = PALETTE[number % len(PALETTE)]
        if len(curve.train[0]):
            data.append(
                {
                    **line(curve.train, color, 1),
                    "name": f"{curve.label} train/loss",
                    "legendgroup": curve.label,
                    "showlegend": False,
                    "opacity": 0.4,
                    "hoverinfo": "skip",
                }
            )
        if len(curve.evaluated[0]):
            steps, _ = curve.evaluated
            marked = len(steps) <= 60
            sizes = [11 if step == curve.best_step else 5 for step in steps] if marked else 5
            data.append(
                {
                    **line(curve.evaluated, color, 2.5),
                    "mode": "lines+markers" if marked else "lines",
                    "marker": {"size": sizes},
                    "name": curve.label,
                    "legendgroup": curve.label,
                    "hovertemplate": "step %{x}: %{y:.4f}",
                }
            )
    layout = axes("step (0 is the base model)", "nats a token")
    layout["showlegend"] = len(curves) <= 12
    layout["hovermode"] = "closest"
    return {"data": data, "layout": layout}


def _get_timeline_info(trial: LiveTrial, saved: float) -> list[Stint]:
    table = trial.metrics.series(TIME)
    times = table[table[:, STEP] > saved, TIME]
    if not len(times):
        return []
    gaps = np.diff(times)
    usual = float(np.median(gaps)) if len(gaps) else 1.0
    breaks = np.flatnonzero(gaps > max(60.0, 20 * usual)) + 1
    label, state = label_of(trial), trial.state
    return [
        # A line has the time at which its step ended.
        Stint(trial.number, label, state, float(part.min()) - usual, float(part.max()))
        for part in np.split(times, breaks)
    ]


def _get_timeline_plot(stints: Sequence[Stint]) -> Figure:
    numbers = sorted({stint.number for stint in stints})
    rows = {number: row for row, number in enumerate(numbers)}
    width = float(np.clip(190 / max(1, len(numbers)), 2, 14))
    data = []
    for state, color in STATE_COLORS.items():
        mine = [stint for stint in stints if stint.state == state]
        if not mine:
            continue
        x = np.array([[local_ms(s.start_s), local_ms(s.end_s), np.nan] for s in mine]).ravel()
        y = np.array([[rows[s.number], rows[s.number], np.nan] for s in mine]).ravel()
        texts = [text for stint in mine for text in (_hover_text(stint),) * 3]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": packed(x, "f8"),
                "y": packed(y, "f4"),
                "text": texts,
                "hovertemplate": "%{text}<extra></extra>",
                "line": {"color": color, "width": width},
                "name": state,
                "showlegend": True,
            }
        )
    layout = axes("time of day", "trial")
    layout["xaxis"] |= {"type": "date"}
    named = numbers[:: 1 + len(numbers) // 20]
    ticks = {"tickvals": [rows[number] for number in named], "ticktext": [str(n) for n in named]}
    layout["yaxis"] |= {"range": [len(numbers) - 0.4, -0.6], **ticks}
    layout["hovermode"] = "closest"
    return {"data": data, "layout": layout}


def _get_trial_info(trial: LiveTrial) -> dict[str, Points]:
    table = trial.metrics
    train, evaluated = table.series(TRAIN), table.series(EVAL)
    rates, norms = table.series(RATE), table.series(NORM)
    return {
        "train/loss": thinned(train[:, STEP], train[:, TRAIN]),
        "train/loss, smoothed": thinned(train[:, STEP], smoothed(train[:, TRAIN])),
        "eval/loss": thinned(evaluated[:, STEP], evaluated[:, EVAL]),
        "learning_rate": thinned(rates[:, STEP], rates[:, RATE]),
        "grad_norm": thinned(norms[:, STEP], norms[:, NORM]),
    }


def _get_trial_plot(info: dict[str, Points], saved: float) -> Figure:
    looks = {
        "train/loss": (PALETTE[2], 1, 0.3, "y"),
        "train/loss, smoothed": (PALETTE[2], 1.5, 0.8, "y"),
        "eval/loss": (PALETTE[0], 2.5, 1.0, "y"),
        "learning_rate": (PALETTE[4], 1.5, 1.0, "y2"),
        "grad_norm": (PALETTE[6], 1.5, 1.0, "y3"),
    }
    data = [
        {
            **line(info[name], color, width),
            "name": name,
            "opacity": opacity,
            "yaxis": axis,
            "mode": "lines+markers" if name == "eval/loss" else "lines",
            "marker": {"size": 6},
            "hovertemplate": f"step %{{x}}: %{{y:{'.4f' if axis == 'y' else '.3g'}}}",
        }
        for name, (color, width, opacity, axis) in looks.items()
        if len(info[name][0])
    ]
    layout = axes("step", "nats a token")
    layout["yaxis"] |= {"domain": [0.48, 1]}
    low = {**layout["yaxis"], "title": {"text": ""}, "rangemode": "tozero", "nticks": 3}
    layout["yaxis2"] = low | {"domain": [0.25, 0.42], "exponentformat": "e"}
    layout["yaxis3"] = low | {"domain": [0, 0.19]}
    layout["xaxis"] |= {"anchor": "y3"}
    if saved:
        layout["shapes"] = [
            {
                "type": "line",
                "x0": saved,
                "x1": saved,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"dash": "dot", "color": "#888", "width": 1.5},
            }
        ]
    return {"data": data, "layout": layout}


def _hover_text(stint: Stint) -> str:
    minutes = (stint.end_s - stint.start_s) / 60
    return f"{stint.label}, {stint.state}, {minutes:.1f} min"
