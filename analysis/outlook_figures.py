"""Pictures of what to expect: importance, the trend over steps, loss against time, all settings at once."""

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from analysis.load import Results
from analysis.look import BEST_COLOR, OTHER_COLOR, PALETTE, styled
from analysis.outlook import Outlook
from analysis.trends import Importance, StepsTrend

MIN_LINES = 6
"""Of fewer trials parallel coordinates show nothing that the bars do not."""


@dataclass(frozen=True)
class _FrontInfo:
    names: list[str]
    minutes: list[float]
    losses: list[float]
    front: list[int]
    """Indices of the trials on the front, the fastest first."""


@dataclass(frozen=True)
class _ParallelInfo:
    names: list[str]
    values: list[list[str]]
    """Of each setting: one text a trial."""
    losses: list[float]


def outlook_figures(results: Results, outlook: Outlook) -> dict[str, go.Figure]:
    """Figures by file name (without suffix); those that the trials are too few for are left out."""
    figures = {}
    if outlook.importances:
        figures["importance"] = _get_importance_plot(outlook.importances)
    if outlook.trend:
        figures["steps"] = _get_trend_plot(outlook.trend)
    if len(outlook.front) > 1:
        figures["loss_against_time"] = _get_front_plot(_get_front_info(results, outlook))
    if len(results.compared) >= MIN_LINES and len(results.settings) > 1:
        figures["parallel_coordinates"] = _get_parallel_plot(_get_parallel_info(results))
    return figures


def _get_importance_plot(shares: list[Importance]) -> go.Figure:
    names = [item.setting for item in shares]
    figure = go.Figure()
    figure.add_bar(
        x=[item.fanova for item in shares],
        y=names,
        orientation="h",
        name="fANOVA (± over forests)",
        marker_color=BEST_COLOR,
        error_x={"type": "data", "array": [item.fanova_spread for item in shares]},
    )
    figure.add_bar(
        x=[item.ped_anova for item in shares],
        y=names,
        orientation="h",
        name="PED-ANOVA",
        marker_color=OTHER_COLOR,
    )
    figure.update_xaxes(title="share of the loss that the setting explains", tickformat=".0%")
    figure.update_yaxes(autorange="reversed", automargin=True, ticksuffix="  ")
    return styled(figure, "Importance of each setting")


def _get_trend_plot(trend: StepsTrend) -> go.Figure:
    steps = np.geomspace(trend.steps[0], trend.doubled_steps, 60)
    figure = go.Figure()
    figure.add_scatter(
        x=steps, y=trend.predict(steps), mode="lines", name="power law",
        line={"color": OTHER_COLOR, "dash": "dash"},
    )  # fmt: skip
    figure.add_scatter(
        x=trend.steps, y=trend.losses, mode="markers", name="trials",
        marker={"color": BEST_COLOR, "size": 11},
    )  # fmt: skip
    last = float(trend.predict(trend.steps[-1]))
    figure.add_scatter(
        x=[trend.doubled_steps],
        y=[last - trend.gain],
        mode="markers",
        name="twice the steps, 95 %",
        marker={"color": PALETTE[1], "size": 11, "symbol": "diamond-open"},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [trend.gain - trend.gain_low],
            "arrayminus": [trend.gain_high - trend.gain],
        },
    )
    figure.update_xaxes(title="max_steps", type="log")
    figure.update_yaxes(title="eval/loss, nats a token")
    return styled(figure, "What more steps would buy (an extrapolation)")


def _get_front_info(results: Results, outlook: Outlook) -> _FrontInfo:
    trials = [t for t in results.compared if t.minutes and t.same_as is None]
    order = sorted(outlook.front, key=lambda trial: trial.minutes or 0)
    return _FrontInfo(
        names=[trial.name for trial in trials],
        minutes=[trial.minutes or 0.0 for trial in trials],
        losses=[trial.loss or 0.0 for trial in trials],
        front=[trials.index(trial) for trial in order],
    )


def _get_front_plot(info: _FrontInfo) -> go.Figure:
    figure = go.Figure()
    figure.add_scatter(
        x=[info.minutes[index] for index in info.front],
        y=[info.losses[index] for index in info.front],
        mode="lines",
        line={"color": BEST_COLOR, "shape": "hv"},
        name="nothing is better and faster",
    )
    figure.add_scatter(
        x=info.minutes,
        y=info.losses,
        # The others would write over one another; they have their names under the pointer.
        text=[name if n in info.front else "" for n, name in enumerate(info.names)],
        customdata=info.names,
        mode="markers+text" if len(info.front) <= 12 else "markers",
        textposition="top right",
        marker={
            "size": 11,
            "color": [
                BEST_COLOR if n in info.front else OTHER_COLOR for n in range(len(info.names))
            ],
        },
        name="trials",
        hovertemplate="%{customdata}: %{y:.4f} in %{x:.2f} min<extra></extra>",
    )
    figure.update_xaxes(title="minutes of training", type="log")
    figure.update_yaxes(title="eval/loss at the best step, nats a token")
    return styled(figure, "Loss against time")


def _get_parallel_info(results: Results) -> _ParallelInfo:
    from analysis.findings import value_text

    trials = results.ranked
    return _ParallelInfo(
        names=results.settings,
        values=[[value_text(t.params.get(name)) for t in trials] for name in results.settings],
        losses=[trial.loss or 0.0 for trial in trials],
    )


def _get_parallel_plot(info: _ParallelInfo) -> go.Figure:
    dimensions = []
    for name, values in zip(info.names, info.values, strict=True):
        choices = sorted(set(values), key=lambda text: (_number(text), text))
        dimensions.append(
            {
                "label": name,
                "values": [choices.index(value) for value in values],
                "tickvals": list(range(len(choices))),
                "ticktext": choices,
            }
        )
    dimensions.append({"label": "eval/loss", "values": info.losses})
    figure = go.Figure(
        go.Parcoords(
            dimensions=dimensions,
            line={"color": info.losses, "colorscale": "Viridis", "showscale": True},
        )
    )
    styled(figure, "All settings at once (drag along an axis to choose)")
    return figure.update_layout(margin_t=140)  # the axes' names stand above them


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return float("inf")
