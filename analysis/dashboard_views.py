"""What the dashboard's pages show, as Dash components.

Every text from a file becomes a text node, which a browser never reads as HTML; names in addresses are
percent-encoded. Each part stands in a container with an id of its own, so that an update can leave it alone.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from dash import dcc, html

from analysis.dashboard_rows import (
    clock,
    difference_text,
    label,
    loss_text,
    max_steps_text,
    minutes,
    number_text,
    origin,
    ranked,
    reason,
    text_form,
    value_form,
    varied,
)
from analysis.dashboard_statistics import FIGURES, Statistics
from analysis.drawing import Figure
from analysis.lines import number_or_none
from analysis.live import LiveSweep, LiveTrial

NUM_DECISIONS = 200
_STATES = ("running", "complete", "pruned", "stopped", "failed", "damaged")


def sweep_address(name: str) -> str:
    return f"/sweep/{quote(name, safe='')}"


def trial_address(sweep: str, number: int) -> str:
    return f"{sweep_address(sweep)}/trial/{number}"


def frame(title: str, trail: Sequence[tuple[str, str]], children: Sequence[Any]) -> html.Main:
    """A page under its heading; `trail` leads back, as texts and addresses."""
    links: list[Any] = []
    for text, address in trail:
        links += [dcc.Link(text, href=address), " / "]
    path = html.Nav(links, **_aria(label="Where you are")) if links else None
    return html.Main([path, html.H1(title), *children])


def message(text: str) -> html.P:
    return html.P(text, className="card text")


# The list of sweeps


def sweeps_table(sweeps: Sequence[LiveSweep], root: str) -> Any:
    if not sweeps:
        return message(
            f"{root} holds no sweep yet. python -m sweeps.run CONFIG begins one, and it appears here."
        )
    header = ("sweep", "best eval/loss", "trials", *_STATES, "last change")
    rows = []
    for sweep in sweeps:
        trials = sweep.counted
        counts = Counter(trial.state for trial in trials)
        losses = [t.loss for t in trials if t.state == "complete" and t.loss is not None]
        cells = [
            html.Th(dcc.Link(sweep.name, href=sweep_address(sweep.name)), scope="row"),
            html.Td(f"{min(losses):.4f}" if losses else ""),
            html.Td(f"{len(trials):,}"),
            *(html.Td(f"{counts[state]:,}" if counts[state] else "") for state in _STATES),
            html.Td(clock(sweep.changed_s)),
        ]
        rows.append(html.Tr(cells))
    return _table(header, rows, "Sweeps")


# One sweep


def counts_line(sweep: LiveSweep, trials: Sequence[LiveTrial], *, is_whole: bool) -> list[Any]:
    counts = Counter(trial.state for trial in trials)
    parts: list[Any] = [html.Span(f"{len(trials):,} trials")]
    parts += [
        html.Span([f"{counts[state]:,} ", _state(state)]) for state in _STATES if counts[state]
    ]
    parts.append(html.Span(f"last change {clock(sweep.changed_s)}"))
    if not is_whole:
        parts.append(html.Span("reading…"))
    return parts


def leaderboard(
    sweep: LiveSweep,
    trials: Sequence[LiveTrial],
    statistics: Statistics,
    chosen: Iterable[int],
    max_rows: int | None = None,
) -> Any:
    if not trials:
        return message("No trial has begun yet.")
    settings, marked = varied(trials), set(chosen)
    header = (
        "trial", "eval/loss", "difference to the best [95 %]", "state", "step / max_steps", *settings,
        "minutes",
    )  # fmt: skip
    rows = []
    for trial in ranked(trials)[:max_rows]:
        params = trial.record.params if trial.record else {}
        look = "best" if trial.number == statistics.best else ""
        link = dcc.Link(label(trial), href=trial_address(sweep.name, trial.number))
        cells = [
            _quick("Th", link, scope="row", title=label(trial)),
            _quick("Td", loss_text(trial)),
            _quick("Td", difference_text(trial, trials, statistics)),
            _quick("Td", _state(trial.state), title=reason(trial)),
            _quick("Td", f"{trial.num_steps:,} / {max_steps_text(trial)}"),
            *(
                _quick("Td", value, title=value)
                for value in map(value_form, map(params.get, settings))
            ),
            _quick("Td", number_text(minutes(trial), ".1f")),
        ]
        look += " chosen" if trial.number in marked else ""
        rows.append(_quick("Tr", cells, className=look.strip()))
    return _table(header, rows, "Leaderboard", "card table board")


def findings_list(statistics: Statistics) -> Any:
    left_out = [
        html.P(f"Left out: {text}", className="card text caveats") for text in statistics.left_out
    ]
    if statistics.problem:
        return [*left_out, message(f"None yet: {statistics.problem}.")]
    if not statistics.findings:
        return [*left_out, message("Being computed…")]
    return [
        *left_out,
        html.Ul([html.Li(text) for text in statistics.findings], className="card text list"),
        html.Details(
            [
                html.Summary("What this does not show"),
                html.Ul([html.Li(text) for text in statistics.caveats], className="text list"),
            ],
            className="card caveats",
        ),
    ]


def figures_list(statistics: Statistics) -> Any:
    """The report's figures, each with what it shows."""
    if not statistics.figures:
        return message("Drawn once the findings are there, and trials are enough.")
    return [
        html.Div(
            [
                html.P(FIGURES[name], className="line"),
                html.Div(graph(f"figure-{name}", figure), className="card drawing"),
            ]
        )
        for name, figure in statistics.figures.items()
    ]


def decisions_table(decisions: Sequence[Mapping[str, Any]]) -> Any:
    if not decisions:
        return message("No trial has come to a rung.")
    header = ("time", "trial", "step", "eval/loss", "verdict", "rule", "best there", "p")
    rows = []
    for line in list(reversed(decisions))[:NUM_DECISIONS]:
        is_pruned = line.get("pruned") is True
        best = number_or_none(line.get("best_trial"))
        best_loss = number_text(number_or_none(line.get("best_loss")), ".4f")
        cells = [
            html.Td(clock(number_or_none(line.get("time")) or 0.0)),
            html.Td(f"{int(line['trial'])}"),
            html.Td(f"{int(line['step']):,}"),
            html.Td(number_text(number_or_none(line.get("loss")), ".4f") or "not a number"),
            html.Td(_state("pruned") if is_pruned else "goes on"),
            html.Td(text_form(line.get("rule")), className="left long"),
            html.Td("" if best is None else f"trial {int(best)}: {best_loss}"),
            html.Td(number_text(number_or_none(line.get("p_value")), ".2g")),
        ]
        rows.append(html.Tr(cells))
    note = [html.P(f"The last {NUM_DECISIONS} of {len(decisions):,}.", className="line")]
    return [*(note if len(decisions) > NUM_DECISIONS else []), _table(header, rows, "Prunings")]


def comparison(trials: Sequence[LiveTrial]) -> Any:
    """Chosen trials side by side: every setting in which they differ, and what came of it."""
    settings = [trial.record.settings if trial.record else {} for trial in trials]
    names = list(dict.fromkeys(name for each in settings for name in each))
    rows = [
        html.Tr(
            [
                html.Th(name, scope="row"),
                *(html.Td(value_form(each.get(name))) for each in settings),
            ]
        )
        for name in names
        if len({repr(each.get(name)) for each in settings}) > 1
    ]
    outcomes = {
        "state": [_state(trial.state) for trial in trials],
        "steps": [f"{trial.num_steps:,}" for trial in trials],
        "eval/loss": [loss_text(trial) for trial in trials],
        "minutes": [number_text(minutes(trial), ".1f") for trial in trials],
    }
    rows += [
        html.Tr([html.Th(name, scope="row"), *(html.Td(value) for value in values)])
        for name, values in outcomes.items()
    ]
    header = ("", *(label(trial) for trial in trials))
    return _table(header, rows, "The chosen trials side by side", "card table board")


def graph(identity: str, figure: Figure) -> dcc.Graph:
    """A drawing; the mode bar's camera saves it as a PNG."""
    config: Any = {
        "displaylogo": False,
        "showSendToCloud": False,  # plotly's button that uploads the figure to its makers
        "plotlyServerURL": "",
        "displayModeBar": True,
        "responsive": True,
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
        "toImageButtonOptions": {"format": "png", "scale": 2, "filename": identity},
        "showTips": False,
    }
    return dcc.Graph(id=identity, figure=figure, config=config)


def group(children: Any, name: str) -> html.Div:
    """Controls that belong together."""
    return html.Div(children, role="group", **_aria(label=name))


def section(title: str, identity: str, children: Any) -> html.Div:
    return html.Div([html.H2(title), html.Div(children, id=identity)])


# One trial


def facts(values: Mapping[str, Any], name: str) -> Any:
    if not values:
        return message("Not there yet.")
    rows = [
        html.Tr([html.Th(key, scope="row"), html.Td(value_form(value))])
        for key, value in values.items()
    ]
    table = html.Table(html.Tbody(rows), className="facts")
    return _region(table, name, "card table")


def log(text: str) -> Any:
    if not text:
        return message("No trial.log: nothing has gone wrong.")
    return _region(html.Pre(text), "End of trial.log", "card table")


def trial_line(trial: LiveTrial) -> list[Any]:
    parts: list[Any] = [
        html.Span(_state(trial.state)),
        html.Span(f"step {trial.num_steps:,} of {max_steps_text(trial)}"),
    ]
    if trial.loss is not None:
        parts.append(html.Span(f"eval/loss {loss_text(trial)}"))
    spent = minutes(trial)
    if spent is not None:
        parts.append(html.Span(f"{spent:.1f} minutes"))
    if trial.steps_saved:
        parts.append(html.Span(f"steps up to {trial.steps_saved:,} from {origin(trial)}"))
    if reason(trial):
        parts.append(html.Span(reason(trial)))
    return parts


def _table(header: Sequence[str], rows: Sequence[Any], name: str, look: str = "card table") -> Any:
    head = html.Thead(
        html.Tr([html.Th(text, scope="col") if text else html.Td() for text in header])
    )
    return _region(html.Table([head, html.Tbody(rows)]), name, look)


def _quick(kind: str, children: Any, **props: Any) -> dict[str, Any]:
    """An element as Dash sends it: its own class checks every property, a tenth of a second a table."""
    props = {"children": children, **props}
    return {"type": kind, "namespace": "dash_html_components", "props": props}


def _region(children: Any, name: str, look: str) -> html.Div:
    # What scrolls must be reached with the keyboard, and then say what it is.
    return html.Div(children, className=look, tabIndex="0", role="region", **_aria(label=name))


def _aria(**names: str) -> Any:
    return {f"aria-{name}": value for name, value in names.items()}


def _state(state: str) -> html.Span:
    # A state of a file becomes a class only if it is one of ours.
    return html.Span(state, className=f"state {state}" if state in _STATES else "state")
