"""The picture of a promotion's types: KL divergence from the merged model against size, one point each.

Data (`_get_points_info`) and drawing (`_get_points_plot`) apart; `write_picture` draws it as PNG.
"""

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

from deploy.measure import Measurement, Recommendation
from training.paths import write_atomic

RECOMMENDED_COLOR, OTHER_COLOR = "#d55e00", "#0072b2"
"""Vermilion and blue of Okabe and Ito, which the colour-blind tell apart; the marks differ in shape, too."""
FLOOR = 1e-7
"""What is drawn of a divergence of 0 on the logarithmic axis."""
SIZE = {"format": "png", "width": 900, "height": 600, "scale": 2}
NO_CHROME = (
    "no quantization.png: drawing it needs a Chrome; install Debian's chromium or run "
    "`plotly_get_chrome`, then promote again"
)


@dataclass(frozen=True)
class _PointsInfo:
    """One point a type, the smallest file first; divergences in nats a token."""

    names: list[str]
    sizes_mb: list[float]
    divergences: list[float]
    above: list[float]
    """From the divergence to the upper end of its interval; 0 without one."""
    below: list[float]
    recommended: list[bool]


def write_picture(
    measured: Sequence[Measurement], recommendation: Recommendation, path: Path
) -> str | None:
    """Writes the PNG; where none can be drawn, says why."""
    import kaleido
    from choreographer.errors import BrowserFailedError, ChromeNotFoundError

    logging.getLogger("kaleido").setLevel(logging.ERROR)
    logging.getLogger("choreographer").setLevel(logging.ERROR)
    figure = _get_points_plot(_get_points_info(measured, recommendation))
    with tempfile.TemporaryDirectory() as temporary:
        drawn = Path(temporary) / path.name
        drawing = {"fig": figure, "path": str(drawn), "opts": SIZE}
        try:
            # Without this, kaleido's page waits for MathJax from the network.
            errors = kaleido.write_fig_from_object_sync([drawing], kopts={"mathjax": False})
        except (ChromeNotFoundError, BrowserFailedError):
            return NO_CHROME
        if errors:  # kaleido hands back what went wrong with a picture, and raises nothing
            cause = str(errors[0]).strip() or type(errors[0]).__name__
            return f"no {path.name}: {cause.splitlines()[0]}"
        content = drawn.read_bytes()
    write_atomic(path, lambda target: _write(target, content))
    return None


def _get_points_info(
    measured: Sequence[Measurement], recommendation: Recommendation
) -> _PointsInfo:
    items = sorted(measured, key=lambda item: item.size_bytes)
    estimates = [max(item.kl.estimate, FLOOR) for item in items]
    known = [math.isfinite(item.kl.high) for item in items]
    pairs = list(zip(items, estimates, known, strict=True))
    return _PointsInfo(
        names=[item.quantization for item in items],
        sizes_mb=[item.size_bytes / 1e6 for item in items],
        divergences=estimates,
        above=[max(item.kl.high - kl, 0.0) if is_known else 0.0 for item, kl, is_known in pairs],
        # A logarithmic axis has no room for an end at 0.
        below=[
            max(kl - max(item.kl.low, kl / 10), 0.0) if is_known else 0.0
            for item, kl, is_known in pairs
        ],
        recommended=[item.quantization == recommendation.quantization for item in items],
    )


def _get_points_plot(info: _PointsInfo) -> go.Figure:
    figure = go.Figure()
    for is_recommended, name, color, symbol, size in (
        (False, "measured", OTHER_COLOR, "circle", 13),
        (True, "recommended", RECOMMENDED_COLOR, "star", 20),
    ):
        chosen = [n for n, flag in enumerate(info.recommended) if flag == is_recommended]
        if not chosen:
            continue
        figure.add_scatter(
            x=[info.sizes_mb[n] for n in chosen],
            y=[info.divergences[n] for n in chosen],
            text=[f"<b>{info.names[n]}</b>" if is_recommended else info.names[n] for n in chosen],
            mode="markers+text",
            textposition="top right",
            marker={"color": color, "symbol": symbol, "size": size},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [info.above[n] for n in chosen],
                "arrayminus": [info.below[n] for n in chosen],
                "thickness": 1.5,
            },
            name=name,
        )
    # Room for the label of the largest file.
    figure.update_xaxes(title="file size, MB", range=[0, max(info.sizes_mb) * 1.15])
    figure.update_yaxes(
        title="KL divergence from the merged model, nats a token", type="log", dtick=1
    )
    figure.update_layout(
        title={"text": "What each type loses (95 % interval)", "x": 0.01, "font": {"size": 20}},
        template="plotly_white",
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 15, "color": "#222"},
        margin={"l": 80, "r": 30, "t": 80, "b": 70},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
