"""The one look of all figures: colours that the colour-blind can tell apart, and the layout's template."""

import plotly.graph_objects as go

BEST_COLOR, BASELINE_COLOR, OTHER_COLOR = "#1a7f5a", "#8a6d3b", "#7a9cc6"
SHARED_COLOR = "#1f3a6e"
"""Of what several trials have in common; darker than `OTHER_COLOR` in print, too."""
PALETTE = (
    "#1a7f5a", "#d1495b", "#3066be", "#edae49", "#6f4a8e",
    "#00798c", "#a05a2c", "#7f7f7f", "#b5bd00", "#e377c2",
)  # fmt: skip
STATE_COLORS = {
    "complete": "#1a7f5a",
    "running": "#3066be",
    "pruned": "#b07d12",
    "failed": "#c23b4e",
}
SCALE = "Cividis"
"""Of a loss as a colour: told apart by the colour-blind, and as grey."""


def styled(figure: go.Figure, title: str) -> go.Figure:
    """The figure with title, font and margins as all others."""
    figure.update_layout(
        title={"text": title, "x": 0.01, "font": {"size": 20}},
        template="plotly_white",
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 14, "color": "#222"},
        margin={"l": 70, "r": 30, "t": 80, "b": 70},
    )
    return figure
