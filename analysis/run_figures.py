"""Pictures of how the trials went: loss curves, the stage tree, and who was trained when.

Each in two halves, `_get_*_info` (data) and `_get_*_plot` (drawing). A step that several trials share belongs
to the one that trained it, as in `analysis.history`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from analysis.drawing import short, smoothed, thinned
from analysis.history import History
from analysis.lines import EVAL, STEP, TIME, TRAIN
from analysis.load import Results
from analysis.look import OTHER_COLOR, PALETTE, SHARED_COLOR, STATE_COLORS, styled

NUM_LEADERS = len(PALETTE)
"""Trials whose curves have a colour and a name; the others are grey."""
MOST_ROWS = 40
"""Of more trials the time line has a row a slot, not a row a trial."""
_GREY = "#b9b9b9"
_ROW_PX = 22


@dataclass(frozen=True)
class _Curve:
    name: str
    train: list[tuple[int, float]]
    """Smoothed and thinned; of a fork, its own steps."""
    evaluated: list[tuple[int, float]]
    """Of a fork, from the last evaluation of the stage on, so that its line leaves the one it came from."""
    best_step: int | None
    is_leader: bool


@dataclass(frozen=True)
class _Branch:
    """A trial as a row of the stage tree."""

    name: str
    state: str
    row: int
    start: int
    """Step that it was forked at; 0 for one that began anew."""
    end: int
    shared: int
    """Steps until here were trained for other trials, too; 0 for none."""
    parent_row: int | None
    best_step: int | None


@dataclass(frozen=True)
class _Stint:
    """A time in which a trial was trained, minutes from the sweep's first one."""

    name: str
    state: str
    row: int
    start: float
    end: float
    evaluations: list[float]
    is_last: bool


def run_figures(results: Results, histories: Mapping[int, History]) -> dict[str, go.Figure]:
    """Figures by file name (without suffix); those without anything to show are left out."""
    figures = {}
    curves = _get_curves_info(results, histories)
    if curves:
        figures["loss_curves"] = _get_curves_plot(curves)
    branches = _get_tree_info(histories)
    if branches:
        figures["stage_tree"] = _get_tree_plot(branches)
    stints = _get_timeline_info(histories)
    if stints:
        figures["timeline"] = _get_timeline_plot(stints)
    return figures


def _get_curves_info(results: Results, histories: Mapping[int, History]) -> list[_Curve]:
    leaders = [trial.number for trial in results.ranked if trial.same_as is None][:NUM_LEADERS]
    curves = []
    for trial in results.trials:
        history = histories.get(trial.number)
        if history is None or history.same_as is not None:
            continue
        train, evaluated = history.train, history.evaluated
        own = train[:, STEP] > history.saved
        steps, losses = thinned(train[own, STEP], smoothed(train[:, TRAIN])[own])
        before = evaluated[evaluated[:, STEP] <= history.saved, STEP]
        kept = evaluated[evaluated[:, STEP] >= max(before, default=0.0)]
        if len(steps) or len(kept) > 1:
            curves.append(
                _Curve(
                    name=trial.name,
                    train=_points(steps, losses),
                    evaluated=_points(*thinned(kept[:, STEP], kept[:, EVAL])),
                    best_step=trial.best_step,
                    is_leader=trial.number in leaders,
                )
            )
    return curves


def _get_curves_plot(curves: Sequence[_Curve]) -> go.Figure:
    figure = go.Figure()
    others = [curve for curve in curves if not curve.is_leader]
    leaders = [curve for curve in curves if curve.is_leader]
    if others:
        # One trace with gaps: hundreds of traces make a page slow.
        points = [point for curve in others for point in [*curve.evaluated, (None, None)]]
        figure.add_scatter(
            x=[step for step, _ in points],
            y=[loss for _, loss in points],
            mode="lines",
            line={"color": _GREY, "width": 1},
            name=f"{len(others)} others",
            hoverinfo="skip",
        )
    for number, curve in enumerate(leaders):
        color = PALETTE[number % len(PALETTE)]
        if curve.train:
            steps, losses = zip(*curve.train, strict=True)
            figure.add_scatter(
                x=steps,
                y=losses,
                mode="lines",
                line={"color": color, "width": 1, "dash": "dot"},
                opacity=0.45,
                legendgroup=curve.name,
                showlegend=False,
                name=f"{short(curve.name)} train/loss (smoothed)",
            )
        if curve.evaluated:
            steps, losses = zip(*curve.evaluated, strict=True)
            small = 6 if len(steps) <= 60 else 0
            figure.add_scatter(
                x=steps,
                y=losses,
                mode="lines+markers",
                line={"color": color, "width": 2.5},
                marker={"size": [13 if step == curve.best_step else small for step in steps]},
                legendgroup=curve.name,
                name=short(curve.name),
            )
    figure.update_xaxes(title="step (0 is the base model)", rangemode="tozero")
    figure.update_yaxes(title="nats a token")
    figure.update_layout(legend={"font": {"size": 12}})
    return styled(figure, "Loss curves: eval/loss (lines; best step large), train/loss (dotted)")


def _get_tree_info(histories: Mapping[int, History]) -> list[_Branch]:
    """Rows in the order in which the tree is walked, parents first; empty where nothing is shared."""
    shown = {number: h for number, h in histories.items() if h.same_as is None and h.num_steps}
    if not any(history.saved for history in shown.values()):
        return []
    children: dict[int | None, list[History]] = {}
    for history in shown.values():
        parent = history.parent if history.saved and history.parent in shown else None
        children.setdefault(parent, []).append(history)
    branches: list[_Branch] = []
    rows: dict[int, int] = {}

    def walk(history: History) -> None:
        forks = sorted(children.get(history.number, []), key=lambda h: (h.saved, h.number))
        rows[history.number] = len(rows)
        branches.append(
            _Branch(
                name=f"{history.number} {history.name}",
                state=history.state,
                row=rows[history.number],
                start=history.saved,
                end=history.num_steps,
                shared=max((fork.saved for fork in forks), default=0),
                parent_row=rows.get(history.parent) if history.parent is not None else None,
                best_step=history.best_step,
            )
        )
        for fork in forks:
            walk(fork)

    for root in children.get(None, []):
        walk(root)
    return branches


def _get_tree_plot(branches: Sequence[_Branch]) -> go.Figure:
    figure = go.Figure()
    _add_lines(
        figure,
        [
            ((branch.start, branch.start), (branch.parent_row, branch.row))
            for branch in branches
            if branch.parent_row is not None
        ],
        "fork", {"color": "#666", "width": 1.5, "dash": "dot"},
    )  # fmt: skip
    shared = [(b.start, b.shared, b.row) for b in branches if b.shared > b.start]
    _add_lines(
        figure, [((start, end), (row, row)) for start, end, row in shared],
        "trained once for several trials", {"color": SHARED_COLOR, "width": 7},
    )  # fmt: skip
    alone = [(max(b.start, b.shared), b.end, b.row) for b in branches if b.end > b.shared]
    _add_lines(
        figure, [((start, end), (row, row)) for start, end, row in alone],
        "trained for one", {"color": OTHER_COLOR, "width": 4},
    )  # fmt: skip
    marks = {"best step": ("circle", [(b.best_step, b.row) for b in branches if b.best_step])}
    for state, symbol in (("pruned", "x"), ("failed", "cross"), ("running", "triangle-right")):
        marks[state] = (symbol, [(b.end, b.row) for b in branches if b.state == state])
    for name, (symbol, points) in marks.items():
        if points:
            figure.add_scatter(
                x=[step for step, _ in points], y=[row for _, row in points], mode="markers",
                name=name, hovertemplate=f"{name}, step %{{x}}<extra></extra>",
                marker={"symbol": symbol, "size": 9, "color": STATE_COLORS.get(name, "#222")},
            )  # fmt: skip
    saved, whole = sum(b.start for b in branches), sum(b.end for b in branches)
    figure.update_xaxes(title="step", rangemode="tozero")
    _name_rows(figure, [branch.name for branch in branches])
    return styled(figure, f"Stage tree: {saved:,} of {whole:,} steps were taken from another trial")


def _get_timeline_info(histories: Mapping[int, History]) -> list[_Stint]:
    """Stints by trial; of many trials each is in the first slot that is free, as few as it takes."""
    found = [
        (begin, end, history) for history in histories.values() for begin, end in history.stints()
    ]
    if not found:
        return []
    first = min(begin for begin, _, _ in found)
    last = {history.number: end for _, end, history in sorted(found, key=lambda item: item[1])}
    numbers = sorted(last)
    slots: list[float] = []
    stints = []
    for begin, end, history in sorted(found, key=lambda item: (item[0], item[2].number)):
        if len(numbers) <= MOST_ROWS:
            row = numbers.index(history.number)
        else:
            row = next((r for r, until in enumerate(slots) if until <= begin), len(slots))
            slots[row : row + 1] = [end]
        times = history.own(history.evaluated)[:, TIME]
        ticks = times[(times >= begin) & (times <= end)]
        stints.append(
            _Stint(
                name=f"{history.number} {history.name}",
                state=history.state,
                row=row,
                start=(begin - first) / 60,
                end=(end - first) / 60,
                evaluations=[float(time - first) / 60 for time in ticks],
                is_last=end == last[history.number],
            )
        )
    return stints


def _get_timeline_plot(stints: Sequence[_Stint]) -> go.Figure:
    figure = go.Figure()
    num_rows = 1 + max(stint.row for stint in stints)
    width = 12 if num_rows <= MOST_ROWS else 7
    for state, color in STATE_COLORS.items():
        mine = [stint for stint in stints if stint.state == state]
        _add_lines(
            figure,
            [((stint.start, stint.end), (stint.row, stint.row)) for stint in mine],
            state,
            {"color": color, "width": width},
            [f"{short(stint.name)}, {stint.end - stint.start:.1f} min" for stint in mine],
        )
    ticks = [(time, stint.row) for stint in stints for time in stint.evaluations]
    if ticks and len(ticks) <= 3000:
        figure.add_scatter(
            x=[time for time, _ in ticks], y=[row for _, row in ticks], mode="markers",
            name="evaluation", hoverinfo="skip",
            marker={"symbol": "line-ns", "size": width, "line": {"color": "#fff", "width": 1.5}},
        )  # fmt: skip
        figure.data[-1].showlegend = False  # white marks in white
    pruned = [stint for stint in stints if stint.state == "pruned" and stint.is_last]
    if pruned:
        figure.add_scatter(
            x=[stint.end for stint in pruned], y=[stint.row for stint in pruned], mode="markers",
            name="was pruned", hoverinfo="skip",
            marker={"symbol": "x", "size": 9, "color": "#222"},
        )  # fmt: skip
    figure.update_xaxes(title="minutes since the first trial began", rangemode="tozero")
    by_trial = {stint.row: stint.name for stint in stints}
    is_by_slot = len({stint.name for stint in stints}) > MOST_ROWS
    _name_rows(figure, [f"slot {r}" if is_by_slot else by_trial[r] for r in range(num_rows)])
    return styled(figure, "Who was trained when (white marks: evaluations)")


def _add_lines(
    figure: go.Figure,
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    name: str,
    look: dict[str, object],
    texts: Sequence[str] | None = None,
) -> None:
    """One trace of separate lines, each from (x0, y0) to (x1, y1); nothing where there is none."""
    if not lines:
        return
    x = [value for (start, end), _ in lines for value in (start, end, None)]
    y = [value for _, (start, end) in lines for value in (start, end, None)]
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line=look,
        name=name,
        text=[text for text in texts for _ in range(3)] if texts else None,
        hovertemplate="%{text}<extra></extra>" if texts else None,
        hoverinfo=None if texts else "skip",
    )


def _name_rows(figure: go.Figure, names: Sequence[str]) -> None:
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[short(name, 34) for name in names],
        range=[len(names) - 0.4, -0.6],
        automargin=True,
        ticksuffix="  ",
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(
        height=max(450, 170 + _ROW_PX * len(names)),
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right"},
    )


def _points(steps: np.ndarray, losses: np.ndarray) -> list[tuple[int, float]]:
    return [(int(step), float(loss)) for step, loss in zip(steps, losses, strict=True)]
