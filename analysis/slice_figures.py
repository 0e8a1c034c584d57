"""Pictures of the loss over the settings: one at a time with intervals, and over two of them at once.

Each in two halves, `_get_*_info` (data) and `_get_*_plot` (drawing).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.interpolate import griddata

from analysis.choice import LossTable, loss_intervals
from analysis.drawing import short
from analysis.findings import Findings, value_order, value_text
from analysis.load import Results, Trial
from analysis.look import BEST_COLOR, OTHER_COLOR, SCALE, styled
from analysis.outlook import trained
from analysis.stats import SEED, Interval

MIN_PLACES = 6
"""Of fewer different places in the plane nothing is drawn between them."""
MIN_VALUES = 3
"""Of fewer values along an axis there is nothing to draw between."""
REACH = 0.35
"""How far from a trial the surface is drawn, in shares of an axis."""
MOST_SLICES = 6
_GRID = 61


@dataclass(frozen=True)
class _SliceInfo:
    setting: str
    values: list[float] | list[str]
    """Numbers, or, of a setting with other values, texts."""
    is_log: bool
    names: list[str]
    losses: list[float]
    errors_low: list[float]
    errors_high: list[float]
    """Empty where there are no per-example losses."""
    best: int


@dataclass(frozen=True)
class _ContourInfo:
    settings: tuple[str, str]
    is_log: tuple[bool, bool]
    places: list[tuple[float, float]]
    losses: list[float]
    """Lowest of the trials at each place."""
    nums_trials: list[int]
    best: int
    grid_x: list[float]
    grid_y: list[float]
    surface: list[list[float | None]]
    """Rows along y; None where no trial is near, or none lies beyond."""


def slice_figures(results: Results, findings: Findings) -> dict[str, go.Figure]:
    """Figures by file name (without suffix); those that the trials are too few for are left out."""
    figures = {}
    slices = _get_slices_info(results, _by_importance(results, findings), findings.table)
    if slices:
        figures["slices"] = _get_slices_plot(slices)
    contour = _get_contour_info(results, _contour_pair(results, findings))
    if contour:
        figures["contour"] = _get_contour_plot(contour)
    return figures


def _by_importance(results: Results, findings: Findings) -> list[str]:
    """The settings, the most important first: by fANOVA, else by main effect, else as they stand."""
    known = [item.setting for item in findings.outlook.importances]
    known += [effect.setting for effect in findings.effects]
    names = [name for name in dict.fromkeys([*known, *results.settings]) if name != SEED]
    return [name for name in names if len({repr(t.params.get(name)) for t in results.compared}) > 1]


def _contour_pair(results: Results, findings: Findings) -> tuple[str, str] | None:
    """Two numeric settings: those that act together the most, else the two most important ones."""
    names = _by_importance(results, findings)
    numeric = [name for name in names if _numbers(results.compared, name) is not None]
    for item in findings.interactions or []:
        if item.is_detected and all(name in numeric for name in item.settings):
            first, second = sorted(item.settings, key=names.index)
            return first, second
    return (numeric[0], numeric[1]) if len(numeric) > 1 else None


def _get_slices_info(
    results: Results, settings: Sequence[str], table: LossTable | None
) -> list[_SliceInfo]:
    """Trials over each setting; intervals are of each trial's own loss, over examples."""
    trials = trained(results)
    if results.sweep is None or len(trials) < 2:
        return []
    intervals: list[Interval] = [] if table is None else loss_intervals(table)
    slices = []
    for setting in settings[:MOST_SLICES]:
        numbers = _numbers(trials, setting)
        order = sorted(range(len(trials)), key=lambda i: value_order(trials[i].params.get(setting)))
        texts = [value_text(trials[index].params.get(setting)) for index in order]
        losses = [trials[index].loss or 0.0 for index in order]
        slices.append(
            _SliceInfo(
                setting=setting,
                values=texts if numbers is None else [numbers[index] for index in order],
                is_log=numbers is not None and _is_log(numbers),
                names=[trials[index].name for index in order],
                losses=losses,
                errors_low=[i.estimate - i.low for i in map(intervals.__getitem__, order)]
                if intervals
                else [],
                errors_high=[i.high - i.estimate for i in map(intervals.__getitem__, order)]
                if intervals
                else [],
                best=order.index(0),
            )
        )
    return slices


def _get_slices_plot(slices: Sequence[_SliceInfo]) -> go.Figure:
    columns = min(3, len(slices))
    rows = math.ceil(len(slices) / columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes=True,
        subplot_titles=[info.setting for info in slices],
        vertical_spacing=0.3 / rows,
    )
    for number, info in enumerate(slices):
        row, column = 1 + number // columns, 1 + number % columns
        colors = [OTHER_COLOR] * len(info.losses)
        colors[info.best] = BEST_COLOR
        figure.add_scatter(
            x=info.values,
            y=info.losses,
            mode="markers",
            marker={"size": 10, "color": colors, "line": {"color": "#fff", "width": 1}},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": info.errors_high,
                "arrayminus": info.errors_low,
                "color": "rgba(80,80,80,0.45)",
                "thickness": 1.2,
                "width": 3,
            }
            if info.errors_high
            else None,
            customdata=[short(name) for name in info.names],
            hovertemplate=f"%{{customdata}}<br>{info.setting} %{{x}}: %{{y:.4f}}<extra></extra>",
            showlegend=False,
            row=row,
            col=column,
        )
        axis: dict[str, Any] = {"type": "category"}
        if not info.values or not isinstance(info.values[0], str):
            distinct = sorted({value for value in info.values if not isinstance(value, str)})
            axis = {"type": "log" if info.is_log else "linear"}
            if len(distinct) <= 6:
                axis |= {"tickvals": distinct, "ticktext": [_tick(value) for value in distinct]}
        figure.update_xaxes(**axis, row=row, col=column)
    for row in range(1, rows + 1):
        figure.update_yaxes(title="eval/loss, nats a token", row=row, col=1)
    figure.update_layout(height=450 * rows)
    bars = "; bars: 95 % interval of each trial's own loss" if slices[0].errors_high else ""
    return styled(figure, f"Loss by each setting, the others as they were{bars}")


def _get_contour_info(results: Results, pair: tuple[str, str] | None) -> _ContourInfo | None:
    """The plane of two settings; None where it has too few places for anything between them."""
    if pair is None:
        return None
    x, y = (_numbers(results.compared, name) for name in pair)
    if x is None or y is None:
        return None
    found: dict[tuple[float, float], list[float]] = {}
    for place, trial in zip(zip(x, y, strict=True), results.compared, strict=True):
        found.setdefault(place, []).append(trial.loss or 0.0)
    places = sorted(found)
    losses = [min(found[place]) for place in places]
    is_log = (_is_log(x), _is_log(y))
    if len(places) < MIN_PLACES or min(len(set(x)), len(set(y))) < MIN_VALUES:
        return None
    points = np.array([[_scaled(v, log) for v, log in zip(p, is_log, strict=True)] for p in places])
    low, high = points.min(0), points.max(0)
    unit = (points - low) / (high - low)
    if np.linalg.matrix_rank(unit - unit[0]) < 2:  # all on one line
        return None
    axis = np.linspace(0, 1, _GRID)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    # Straight between trials, and nothing outside of them.
    surface = griddata(unit, np.array(losses), grid, method="linear")
    distance = np.linalg.norm(grid[:, :, None] - unit, axis=-1).min(-1)
    surface[distance > REACH] = np.nan
    grids = [low[i] + axis * (high[i] - low[i]) for i in range(2)]
    grids = [np.exp(values) if log else values for values, log in zip(grids, is_log, strict=True)]
    return _ContourInfo(
        settings=pair,
        is_log=is_log,
        places=places,
        losses=losses,
        nums_trials=[len(found[place]) for place in places],
        best=int(np.argmin(losses)),
        grid_x=[float(value) for value in grids[0]],
        grid_y=[float(value) for value in grids[1]],
        surface=[[float(v) if np.isfinite(v) else None for v in row] for row in surface],
    )


def _get_contour_plot(info: _ContourInfo) -> go.Figure:
    figure = go.Figure(
        go.Contour(
            x=info.grid_x,
            y=info.grid_y,
            z=info.surface,
            colorscale=SCALE,
            reversescale=True,
            connectgaps=False,
            contours={"showlabels": True, "labelfont": {"size": 12, "color": "#222"}},
            line={"color": "#fff", "width": 1},
            colorbar={"title": {"text": "eval/loss"}},
            hoverinfo="skip",
        )
    )
    figure.add_scatter(
        x=[x for x, _ in info.places],
        y=[y for _, y in info.places],
        mode="markers",
        marker={
            "color": info.losses,
            "colorscale": SCALE,
            "reversescale": True,
            "size": [17 if index == info.best else 11 for index in range(len(info.places))],
            "symbol": ["star" if i == info.best else "circle" for i in range(len(info.places))],
            "line": {"color": "#222", "width": 1.5},
        },
        customdata=list(zip(info.losses, info.nums_trials, strict=True)),
        hovertemplate="%{x}, %{y}: %{customdata[0]:.4f} (%{customdata[1]} trials)<extra></extra>",
        showlegend=False,
    )
    for axis, name, log, values in zip(
        ("x", "y"), info.settings, info.is_log, zip(*info.places, strict=True), strict=True
    ):
        distinct = sorted(set(values))
        look: dict[str, Any] = {"title": name, "type": "log" if log else "linear"}
        if len(distinct) <= 8:
            look |= {"tickvals": distinct, "ticktext": [_tick(value) for value in distinct]}
        getattr(figure, f"update_{axis}axes")(**look)
    first, second = info.settings
    title = f"Loss over {first} and {second} (points: trials; star: the lowest; between: a guess)"
    return styled(figure, title)


def _numbers(trials: Sequence[Trial], name: str) -> list[float] | None:
    values = [trial.params.get(name) for trial in trials]
    found = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return found if len(found) == len(values) else None


def _is_log(values: Sequence[float]) -> bool:
    """Whether ratios count: rates, ranks and steps are tried so."""
    return min(values) > 0 and max(values) / min(values) >= 3


def _scaled(value: float, is_log: bool) -> float:
    return math.log(value) if is_log else value


def _tick(value: float) -> str:
    return value_text(int(value) if value == int(value) else value)
