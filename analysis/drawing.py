"""How the dashboard, and the report's figures of many points, draw: plain dicts with packed numbers, thinned.

Building and checking plotly objects of 200 trials would take longer than all the rest of an update. Drawings
are for a light page, which is what a downloaded PNG has; `dashboard_style` recolours them on a dark one.
"""

import base64
import time
from typing import Any

import numpy as np
from scipy.signal import lfilter
from tsdownsample import LTTBDownsampler

Figure = dict[str, Any]
Points = tuple[np.ndarray, np.ndarray]

NUM_POINTS = 500
"""Of a curve, after thinning."""
_MEMORY = 0.85
"""Weight of the past in the moving average of train losses, as in the report's figure."""


def axes(x_title: str, y_title: str) -> Figure:
    """Layout of a drawing."""
    axis = {"gridcolor": "#e6e4de", "zeroline": False, "automargin": True}
    return {
        "xaxis": {**axis, "title": {"text": x_title}},
        "yaxis": {**axis, "title": {"text": y_title}},
        "font": {"family": "Inter, Helvetica, Arial, sans-serif", "size": 13, "color": "#222"},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "margin": {"l": 56, "r": 12, "t": 28, "b": 44},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "uirevision": "kept",  # the user's zoom outlives an update
    }


def line(points: Points, color: str, width: float) -> Figure:
    """Trace of one curve."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": packed(points[0], "i4"),
        "y": packed(points[1], "f4"),
        "line": {"color": color, "width": width},
    }


def packed(values: np.ndarray, dtype: str) -> dict[str, str]:
    """Numbers as plotly.js reads them, a third of their size as text."""
    return {
        "dtype": dtype,
        "bdata": base64.b64encode(values.astype(f"<{dtype}").tobytes()).decode(),
    }


def thinned(steps: np.ndarray, values: np.ndarray) -> Points:
    """Points that keep the look of the line (Steinarsson 2013, largest triangle three buckets)."""
    if len(steps) <= NUM_POINTS:
        return steps, values
    kept = LTTBDownsampler().downsample(
        np.ascontiguousarray(steps), np.ascontiguousarray(values), n_out=NUM_POINTS
    )
    return steps[kept], values[kept]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving average, corrected at its start as in Adam (Kingma & Ba 2015)."""
    if not len(values):
        return values
    averages = np.asarray(lfilter([1 - _MEMORY], [1, -_MEMORY], values))
    return averages / (1 - _MEMORY ** np.arange(1, len(values) + 1))


def local_ms(time_s: float) -> float:
    """plotly draws a date as if it were UTC: this one looks like the clock on the wall."""
    return (time_s + time.localtime(time_s).tm_gmtoff) * 1000


def short(name: str, length: int = 40) -> str:
    """Fit for a legend. plotly takes `<b>` and `<a>` in texts for markup."""
    name = name if len(name) <= length else f"{name[: length - 1]}…"
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
