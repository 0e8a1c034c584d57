"""The report's pictures, each in two halves: `_get_*_info` (data) and `_get_*_plot` (drawing).

`make_figures` gives them by file name; `write_images` draws them as PNG with one browser for all.
"""

import logging
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.findings import Findings, params_text, value_order, value_text
from analysis.load import Results
from analysis.look import BASELINE_COLOR, BEST_COLOR, OTHER_COLOR, PALETTE, styled
from analysis.outlook_figures import outlook_figures
from analysis.run_figures import run_figures
from analysis.slice_figures import slice_figures
from analysis.stats import Effect, Interval, improvement
from training.paths import write_atomic

IMAGE_SIZE = {"width": 1200, "scale": 2}
NO_CHROME = (
    "no PNGs: drawing them needs a Chrome; install Debian's chromium or run `plotly_get_chrome`, "
    "then repeat the command (report.html has the same pictures)"
)
NOT_DRAWN = "no PNGs: {}; report.html has the same pictures"


@dataclass(frozen=True)
class _ComparisonInfo:
    """Bars from the lowest loss to the highest; all lists are in that order."""

    labels: list[str]
    losses: list[float]
    errors_low: list[float]
    """From the loss to the end of the interval of its difference to the baseline; may be empty."""
    errors_high: list[float]
    improvements: list[float]
    """Percent against the baseline."""
    best: int
    baseline: int
    base_loss: float | None
    loss_name: str
    settings: list[str]


@dataclass(frozen=True)
class _EffectInfo:
    setting: str
    lines: list[tuple[str, list[str], list[float]]]
    """Name (the other settings), values as text, losses."""


def make_figures(results: Results, findings: Findings) -> dict[str, go.Figure]:
    """Figures by file name (without suffix), in the report's order."""
    effects, outlook = findings.effects, findings.outlook
    figures = {
        "experiment_comparison": _get_comparison_plot(
            _get_comparison_info(results, findings.against_baseline)
        )
    }
    runs = run_figures(results, findings.histories)
    figures |= {name: figure for name, figure in runs.items() if name == "loss_curves"}
    if effects:
        figures["settings"] = _get_effects_plot(_get_effects_info(results, effects))
    return figures | slice_figures(results, findings) | outlook_figures(results, outlook) | runs


def write_images(
    figures: Mapping[str, go.Figure], directory: Path, image_format: Literal["png", "svg"] = "png"
) -> str | None:
    """Writes NAME.png (or .svg) for each figure, or none; then it says why."""
    import kaleido
    from choreographer.errors import BrowserFailedError, ChromeNotFoundError

    logging.getLogger("kaleido").setLevel(logging.ERROR)
    logging.getLogger("choreographer").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        drawings = [
            {
                "fig": figure,
                "path": str(Path(temporary) / f"{name}.{image_format}"),
                "opts": {
                    **IMAGE_SIZE,
                    "format": image_format,
                    "height": max(700, figure.to_dict()["layout"].get("height", 0)),
                },
            }
            for name, figure in figures.items()
        ]
        try:
            # Without this, kaleido's page waits for MathJax from the network.
            errors = kaleido.write_fig_from_object_sync(drawings, kopts={"mathjax": False})
        except (ChromeNotFoundError, BrowserFailedError):
            return NO_CHROME
        if errors:  # kaleido hands back what went wrong with a picture, and raises nothing
            cause = str(errors[0]).strip() or type(errors[0]).__name__
            return NOT_DRAWN.format(cause.splitlines()[0])
        for name in figures:
            drawn = Path(temporary) / f"{name}.{image_format}"
            write_atomic(directory / drawn.name, lambda path, drawn=drawn: _copy(drawn, path))
    return None


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _get_comparison_info(
    results: Results, against_baseline: Mapping[int, Interval]
) -> _ComparisonInfo:
    ranked = results.ranked
    baseline = results.baseline.loss or 0
    # Paired: intervals of the losses themselves overlap even where every difference is real.
    intervals = [against_baseline.get(trial.number) for trial in ranked]
    intervals = [i if i and math.isfinite(i.high) else None for i in intervals]
    known = any(intervals)
    return _ComparisonInfo(
        labels=_unique(
            [_label(trial.name, trial.params, results.settings) for trial in ranked],
            [trial.number for trial in ranked],
        ),
        losses=[trial.loss or 0 for trial in ranked],
        errors_low=[i.estimate - i.low if i else 0.0 for i in intervals] if known else [],
        errors_high=[i.high - i.estimate if i else 0.0 for i in intervals] if known else [],
        improvements=[improvement(trial.loss or 0, baseline) for trial in ranked],
        best=0,
        baseline=ranked.index(results.baseline),
        base_loss=results.best.base_loss,
        loss_name="train loss" if results.sweep is None else "eval/loss at the best step",
        settings=results.settings,
    )


def _label(name: str, params: Mapping[str, Any], settings: list[str]) -> str:
    text = " · ".join(value_text(params.get(setting)) for setting in settings)
    # A trial without a name of its own is called by its parameters, which stand there already.
    return text if "=" in name else f"<b>{name}</b>  {text}"


def _unique(labels: list[str], numbers: list[int]) -> list[str]:
    """Bars of one label would be stacked into one: such labels get their trial's number."""
    return [
        f"{label}  (trial {number})" if labels.count(label) > 1 else label
        for label, number in zip(labels, numbers, strict=True)
    ]


def _get_comparison_plot(info: _ComparisonInfo) -> go.Figure:
    colors = [OTHER_COLOR] * len(info.losses)
    colors[info.baseline] = BASELINE_COLOR
    colors[info.best] = BEST_COLOR
    changes = [f"{'−' if gain >= 0 else '+'}{abs(gain):.1f} %" for gain in info.improvements]
    changes[info.baseline] = "baseline"
    texts = [f"{loss:.4f}  {text}" for loss, text in zip(info.losses, changes, strict=True)]
    error = (
        {
            "type": "data",
            "symmetric": False,
            "array": info.errors_high,
            "arrayminus": info.errors_low,
            "color": "#444",
            "thickness": 1.2,
        }
        if info.errors_high
        else None
    )
    figure = go.Figure(
        go.Bar(
            x=info.losses,
            y=info.labels,
            orientation="h",
            marker_color=colors,
            text=texts,
            textposition="inside",
            insidetextanchor="start",
            textfont={"color": "white", "size": 14},
            error_x=error,
        )
    )
    highest = max(info.losses) * 1.06
    if info.base_loss is not None:
        highest = max(highest, info.base_loss * 1.03)
        figure.add_vline(
            x=info.base_loss,
            line={"color": "#555", "dash": "dash", "width": 1.5},
            annotation_text=f"base model {info.base_loss:.4f}",
            annotation_position="top left",
        )
    bars = "; whiskers: 95 % interval of the difference to the baseline" if info.errors_high else ""
    figure.update_xaxes(title=f"{info.loss_name}, nats a token{bars}", range=[0, highest])
    figure.update_yaxes(autorange="reversed", automargin=True, ticksuffix="  ")
    figure.update_layout(height=max(450, 150 + 26 * len(info.losses)))  # a label has its line
    return styled(figure, f"Trials by loss ({' · '.join(info.settings)})")


def _get_effects_info(results: Results, effects: list[Effect]) -> list[_EffectInfo]:
    infos = []
    for effect in effects:
        others = [name for name in results.settings if name != effect.setting]
        lines = []
        for group in effect.groups:
            points = sorted(group.items(), key=lambda item: value_order(item[0]))
            fixed = results.scored[points[0][1]].params
            losses = [results.scored[index].loss or 0 for _, index in points]
            lines.append(
                (params_text(fixed, others), [value_text(value) for value, _ in points], losses)
            )
        infos.append(_EffectInfo(effect.setting, lines))
    return infos


def _get_effects_plot(infos: list[_EffectInfo]) -> go.Figure:
    figure = make_subplots(
        rows=1, cols=len(infos), shared_yaxes=True, subplot_titles=[i.setting for i in infos]
    )
    for column, info in enumerate(infos, 1):
        for number, (name, values, losses) in enumerate(info.lines):
            figure.add_scatter(
                x=values,
                y=losses,
                mode="lines+markers",
                name=name,
                line={"color": PALETTE[number % len(PALETTE)], "width": 2.5},
                marker={"size": 9},
                showlegend=False,
                hovertemplate=f"{name}<br>{info.setting} %{{x}}: %{{y:.4f}}<extra></extra>",
                row=1,
                col=column,
            )
        figure.update_xaxes(type="category", row=1, col=column)
    figure.update_yaxes(title="loss, nats a token", row=1, col=1)
    return styled(figure, "What each setting does, all others equal")
