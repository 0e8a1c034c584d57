"""How the dashboard's pages are put together: which part stands where, under which id.

`made` holds the parts by id, as `dashboard_pages` makes them; drawings come with the first update. Last on a
page stands what it has seen, and its clock.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dash import dcc, html

from analysis import dashboard_views as views
from analysis.live import LiveTrial

INTERVAL_MS = 2000
EVERYONE = "all"
"""In the address: the curves of all trials are drawn."""


def sweeps_page(table: Any, mark: Any) -> html.Main:
    """The list of sweeps."""
    return views.frame(
        "Sweeps",
        [],
        [
            html.Div(table, id="sweeps"),
            dcc.Store(id="sweeps-seen", data=mark),
            dcc.Interval(id="sweeps-tick", interval=INTERVAL_MS),
        ],
    )


def sweep_page(
    name: str, made: Mapping[str, Any], seen: Any, chosen: Sequence[int], *, everyone: bool
) -> html.Main:
    """One sweep."""
    choice = dcc.Checklist(
        id="chosen",
        options=list(chosen),  # the others come with the drawings
        value=list(chosen),
        className="choices",
    )
    controls = [
        html.Details(
            [html.Summary("Trials to compare"), views.group(choice, "Trials to compare")],
            open=bool(chosen),
        ),
        dcc.Checklist(
            id="everyone",
            options=[{"label": "curves of all trials", "value": EVERYONE}],
            value=[EVERYONE] if everyone else [],
        ),
        html.A("trials.csv", href=f"{views.sweep_address(name)}/trials.csv", download=""),
    ]
    return views.frame(
        name,
        [("Sweeps", "/")],
        [
            html.Div(made["counts"], id="counts", className="line"),
            html.Div(made["buttons"], id="buttons", className="buttons"),
            html.Div(made["waiting"], id="waiting"),
            views.section("Leaderboard", "board", made["board"]),
            html.H2("Loss curves"),
            html.Div(controls, className="controls"),
            html.P(
                "Strong: eval/loss, the best step large. Faint: train/loss, smoothed. Steps that "
                "several trials share are drawn once, with the one that trained them.",
                className="line",
            ),
            html.Div(id="curves-box", className="card drawing"),
            html.Div(made["chosen-table"], id="chosen-table", className="below"),
            views.section("Findings", "findings", made["findings"]),
            html.H2("Time line"),
            html.Div(id="timeline-box", className="card drawing low"),
            views.section("Figures", "figures", None),
            views.section("Prunings", "decisions", made["decisions"]),
            dcc.Store(id="sweep-seen", data=seen),
            dcc.Interval(id="sweep-tick", interval=INTERVAL_MS),
        ],
    )


def trial_page(sweep: str, trial: LiveTrial, made: Mapping[str, Any], seen: Any) -> html.Main:
    """One trial."""
    title = trial.record.name if trial.record else f"trial {trial.number}"
    trail = [("Sweeps", "/"), (sweep, views.sweep_address(sweep))]
    return views.frame(
        f"Trial {trial.number}: {title}",
        trail,
        [
            html.Div(made["trial-line"], id="trial-line", className="line"),
            html.Div(made["trial-buttons"], id="trial-buttons", className="buttons"),
            html.Div(made["trial-waiting"], id="trial-waiting"),
            html.H2("Curves"),
            html.Div(id="trial-curves-box", className="card drawing tall"),
            views.section("Samples", "trial-samples", made["trial-samples"]),
            html.Div(
                [
                    views.section("Settings", "trial-settings", made["trial-settings"]),
                    views.section("Result", "trial-result", made["trial-result"]),
                ],
                className="columns",
            ),
            views.section("End of trial.log", "trial-log", made["trial-log"]),
            dcc.Store(id="trial-seen", data=seen),
            dcc.Interval(id="trial-tick", interval=INTERVAL_MS),
        ],
    )
