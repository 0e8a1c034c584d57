"""Addresses of the dashboard -> pages, and what of an open page is to be sent again.

A page keeps `seen`, a mark for each of its parts. `Pages` compares them with the marks of what is on disk: a
part whose mark is the same stays as it is (`no_update`), and if all do, the answer is empty.
"""

import os
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from dash import ALL, Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.exceptions import PreventUpdate

from analysis import dashboard_controls as controls
from analysis import dashboard_layouts as layouts
from analysis import dashboard_views as views
from analysis.dashboard_actions import LABELS, Actions, error_line
from analysis.dashboard_figures import Drawings, trial_curves
from analysis.dashboard_layouts import EVERYONE
from analysis.dashboard_rows import label, shown_trials, trials_csv
from analysis.dashboard_samples import samples_view
from analysis.dashboard_statistics import StatisticsWorker
from analysis.dashboard_style import KEEP_ADDRESS, ON_ADDRESS
from analysis.lines import file_end
from analysis.live import LiveSweep, LiveTrial, Runs
from sweeps.requests import pending_requests
from training.exceptions import LoraloomError

READ_S = 0.1
"""For so long a request reads; what is left is read in the background."""
FIRST_ROWS = 40
"""Of the leaderboard, with the page itself."""
_LOG_BYTES = 16_384

Parts = dict[str, tuple[Any, Callable[[], Any]]]
"""Id and property of a part -> its mark, and what makes it."""

_SWEEP_PARTS = (
    ("counts", "children"),
    ("board", "children"),
    ("curves-box", "children"),
    ("chosen-table", "children"),
    ("findings", "children"),
    ("timeline-box", "children"),
    ("figures", "children"),
    ("decisions", "children"),
    ("chosen", "options"),
    ("buttons", "children"),
    ("waiting", "children"),
)
_LATER = ("curves-box", "timeline-box", "figures", "trial-curves-box", "chosen")
_TRIAL_PARTS = (
    ("trial-line", "children"),
    ("trial-curves-box", "children"),
    ("trial-result", "children"),
    ("trial-settings", "children"),
    ("trial-log", "children"),
    ("trial-samples", "children"),
    ("trial-buttons", "children"),
    ("trial-waiting", "children"),
)


class Pages:
    """Pages over the sweeps of `runs`."""

    def __init__(self, runs: Runs, root: Path, *, is_read_only: bool = False):
        self.runs, self.root = runs, root
        self.actions = Actions(is_read_only=is_read_only)
        self._workers: dict[int, StatisticsWorker] = {}
        self._drawn: dict[int, Drawings] = {}
        self._lock = threading.Lock()

    def attach(self, app: Dash) -> None:
        """Gives `app` its layout and its callbacks."""
        app.layout = html.Div(
            [
                dcc.Location(id="address", refresh="callback-nav"),
                dcc.Store(id="nothing"),
                html.P(id="outcome", role="status"),
                html.Div(id="page"),
                *controls.dialog(self.actions.secret),
            ]
        )
        app.callback(
            Output("page", "children"), Input("address", "pathname"), State("address", "search")
        )(self.page)
        app.clientside_callback(ON_ADDRESS, Output("nothing", "data"), Input("address", "pathname"))
        app.clientside_callback(
            KEEP_ADDRESS,
            Output("nothing", "data", allow_duplicate=True),
            Input("chosen", "value"),
            Input("everyone", "value"),
            prevent_initial_call=True,
        )
        app.callback(
            Output("sweeps", "children"),
            Output("sweeps-seen", "data"),
            Input("sweeps-tick", "n_intervals"),
            State("sweeps-seen", "data"),
            prevent_initial_call=True,
        )(self.update_sweeps)
        app.callback(
            *(Output(*part) for part in _SWEEP_PARTS),
            Output("sweep-seen", "data"),
            Input("sweep-tick", "n_intervals"),
            Input("chosen", "value"),
            Input("everyone", "value"),
            State("sweep-seen", "data"),
        )(self.update_sweep)
        app.callback(
            *(Output(*part) for part in _TRIAL_PARTS),
            Output("trial-seen", "data"),
            Input("trial-tick", "n_intervals"),
            State("trial-seen", "data"),
        )(self.update_trial)

        self._attach_actions(app)

    def _attach_actions(self, app: Dash) -> None:
        app.callback(
            Output("ask-title", "children"),
            Output("ask-body", "children"),
            Output("ask-error", "children"),
            Output("ask-go", "children"),
            Output("ask-go", "disabled"),
            Output("asked", "data"),
            Input({"do": ALL}, "n_clicks"),
            State("address", "pathname"),
            prevent_initial_call=True,
        )(self.ask)
        app.callback(
            Output("ask-error", "children", allow_duplicate=True),
            Output("outcome", "children"),
            Output("done", "data"),
            Input("order", "data"),
            running=[(Output("ask-go", "disabled"), True, False)],
            prevent_initial_call=True,
        )(self.obey)
        nothing = Output("nothing", "data", allow_duplicate=True)
        app.clientside_callback(
            controls.SHOW_DIALOG, nothing, Input("asked", "data"), prevent_initial_call=True
        )
        app.clientside_callback(
            controls.SEND_ORDER,
            Output("order", "data"),
            Input("ask-go", "n_clicks"),
            State("asked", "data"),
            State("secret", "data"),
            prevent_initial_call=True,
        )
        app.clientside_callback(
            controls.CLOSE_DIALOG,
            nothing,
            Input("ask-cancel", "n_clicks"),
            Input("done", "data"),
            Input("address", "pathname"),
            prevent_initial_call=True,
        )

    # Actions

    def ask(self, clicks: list[int | None], pathname: str | None) -> Any:
        """The dialog's content for the button that was pressed."""
        if not any(clicks) or not isinstance(ctx.triggered_id, dict):
            raise PreventUpdate  # the buttons have come, nobody has pressed one
        action = ctx.triggered_id["do"]
        sweep, trial = self._place(pathname)
        if sweep is None or action not in LABELS:
            raise PreventUpdate
        title, asked = LABELS[action], {"path": pathname, "time": time.time()}
        try:
            question = self.actions.ask(action, sweep, trial, self._worker(sweep).current())
        except (LoraloomError, OSError) as error:
            return title, [], error_line(error), title, True, asked
        body = controls.question_body(question)
        asked |= {"action": question.action, "numbers": list(question.numbers)}
        return title, body, "", title, False, asked

    def obey(self, order: Any) -> Any:
        """Does what was confirmed in the dialog: an error stands in it, an outcome above the page."""
        sweep, _ = self._place(_of(order, "path"))
        if sweep is None:
            return "There is no such sweep here any more.", no_update, no_update
        try:
            outcome = self.actions.obey(order, sweep)
        except (LoraloomError, OSError) as error:
            return error_line(error), no_update, no_update
        return "", outcome, time.time()

    # Pages

    def page(self, pathname: str | None, search: str | None) -> Any:
        """The page at an address; names in it are looked up, never opened."""
        if (pathname or "/") == "/":
            return self._sweeps_page()
        sweep, trial = self._place(pathname)
        if sweep is not None and trial is not None:
            return self._trial_page(sweep, trial)
        if sweep is not None:
            return self._sweep_page(sweep, search or "")
        text = "There is no such sweep or trial here."
        return views.frame("Not found", [("Sweeps", "/")], [views.message(text)])

    def _place(self, pathname: Any) -> tuple[LiveSweep | None, LiveTrial | None]:
        """The sweep and the trial that an address names, as far as they are there."""
        if not isinstance(pathname, str):
            return None, None
        match [unquote(part) for part in pathname.strip("/").split("/")]:
            case ["sweep", name] if (sweep := self.runs.sweep(name)) is not None:
                return sweep, None
            case ["sweep", name, "trial", number] if (sweep := self.runs.sweep(name)) is not None:
                sweep.follow(READ_S)
                is_number = number.isdecimal() and len(number) < 10
                trial = sweep.trial(int(number)) if is_number else None
                return (None, None) if trial is None else (sweep, trial)
        return None, None

    def csv(self, name: str) -> str | None:
        """trials.csv of a sweep; None if there is none of that name."""
        sweep = self.runs.sweep(name)
        if sweep is None:
            return None
        sweep.refresh()
        return trials_csv(sweep, self._worker(sweep).complete())

    def _sweeps_page(self) -> Any:
        mark, table = self._sweeps_part()
        return layouts.sweeps_page(table(), mark)

    def _sweep_page(self, sweep: LiveSweep, search: str) -> Any:
        chosen, everyone = _choice(search)
        parts = self._sweep_parts(sweep, chosen, everyone, max_rows=FIRST_ROWS)
        made, marks = _texts(parts)
        if len(sweep.trials) > FIRST_ROWS:
            marks.pop("board")  # a browser needs half a second for 200 rows: the others come next
        seen = {"name": sweep.name, "marks": marks}
        return layouts.sweep_page(sweep.name, made, seen, chosen, everyone=everyone)

    def _trial_page(self, sweep: LiveSweep, trial: LiveTrial) -> Any:
        parts = self._trial_parts(sweep, trial)
        made, marks = _texts(parts)
        seen = {"name": sweep.name, "number": trial.number, "marks": marks}
        return layouts.trial_page(sweep.name, trial, made, seen)

    # Updates

    def update_sweeps(self, _: Any, seen: Any) -> Any:
        mark, table = self._sweeps_part()
        if mark == seen:
            raise PreventUpdate
        return table(), mark

    def update_sweep(self, _: Any, chosen: Any, everyone: Any, seen: Any) -> Any:
        sweep = self.runs.sweep(_of(seen, "name"))
        if sweep is None:
            raise PreventUpdate
        numbers = [number for number in chosen or [] if isinstance(number, int)]
        parts = self._sweep_parts(sweep, numbers, bool(everyone))
        return _changed(parts, _SWEEP_PARTS, seen)

    def update_trial(self, _: Any, seen: Any) -> Any:
        sweep, number = self.runs.sweep(_of(seen, "name")), _of(seen, "number")
        if sweep is None or not isinstance(number, int):
            raise PreventUpdate
        sweep.follow(READ_S)
        trial = sweep.trial(number)
        if trial is None:
            raise PreventUpdate
        return _changed(self._trial_parts(sweep, trial), _TRIAL_PARTS, seen)

    # Parts

    def _sweeps_part(self) -> tuple[Any, Callable[[], Any]]:
        sweeps = self.runs.sweeps()
        for sweep in sweeps:
            sweep.follow(READ_S / len(sweeps), with_metrics=False)
        mark = [[sweep.name, sweep.records_version, sweep.changed_s] for sweep in sweeps]
        return mark, lambda: views.sweeps_table(sweeps, str(self.root))

    def _sweep_parts(
        self, sweep: LiveSweep, chosen: list[int], everyone: bool, max_rows: int | None = None
    ) -> Parts:
        is_whole = sweep.follow(READ_S)
        known = self._worker(sweep).current()
        trials = sweep.counted
        shown = shown_trials(trials, chosen, everyone=everyone)
        compared = [trial for trial in trials if trial.number in chosen]
        drawings = self._drawings(sweep)
        mark, records = [id(sweep), sweep.version], [id(sweep), sweep.records_version]
        return {
            "counts": (
                [*mark, is_whole],
                lambda: views.counts_line(sweep, trials, is_whole=is_whole),
            ),
            "board": (
                [*mark, known.version, chosen],
                lambda: views.leaderboard(sweep, trials, known, chosen, max_rows),
            ),
            "curves-box": (
                [*records, [[trial.number, trial.version] for trial in shown]],
                lambda: views.graph("curves", drawings.curves(shown)),
            ),
            "chosen-table": (
                [*mark, chosen],
                lambda: views.comparison(compared) if len(compared) > 1 else None,
            ),
            "findings": ([id(sweep), known.version], lambda: views.findings_list(known)),
            "figures": (
                [id(sweep), known.figures_version],
                lambda: views.figures_list(known),
            ),
            "timeline-box": (
                mark,
                lambda: views.graph("timeline", drawings.timeline(trials)),
            ),
            "decisions": (
                [id(sweep), len(sweep.decisions)],
                lambda: views.decisions_table(sweep.decisions),
            ),
            "chosen": (
                records,
                lambda: [{"label": label(trial), "value": trial.number} for trial in trials],
            ),
            **self._action_parts("", sweep, self.actions.on_sweep(sweep, trials)),
        }

    def _trial_parts(self, sweep: LiveSweep, trial: LiveTrial) -> Parts:
        result = trial.record.result if trial.record else {}
        settings = trial.record.settings if trial.record else {}
        mark = [trial.version, trial.changed_s, trial.state]
        text = file_end(trial.paths.log, _LOG_BYTES)
        return {
            "trial-line": (mark, lambda: views.trial_line(trial)),
            "trial-curves-box": (
                mark,
                lambda: views.graph("trial-curves", trial_curves(trial)),
            ),
            "trial-result": (mark[1:], lambda: views.facts(result, "Result")),
            "trial-settings": (mark[1:], lambda: views.facts(settings, "Settings")),
            "trial-log": ([zlib.crc32(text.encode())], lambda: views.log(text)),
            "trial-samples": (
                _samples_mark(trial),
                lambda: samples_view(trial.record.samples() if trial.record else {}),
            ),
            **self._action_parts("trial-", sweep, self.actions.on_trial(sweep, trial)),
        }

    def _action_parts(self, prefix: str, sweep: LiveSweep, actions: list[str]) -> Parts:
        pending = pending_requests(sweep.paths)
        promotion = self.actions.promotions.state(sweep.paths)
        is_running, root = sweep.is_running, str(sweep.paths.root)
        mark = [
            [request["id"] for request in pending],
            is_running,
            promotion and [promotion.text, zlib.crc32(promotion.log.encode())],
        ]
        return {
            f"{prefix}buttons": (actions, lambda: controls.buttons(actions)),
            f"{prefix}waiting": (
                mark,
                lambda: controls.waiting(pending, promotion, is_running=is_running, root=root),
            ),
        }

    def _worker(self, sweep: LiveSweep) -> StatisticsWorker:
        with self._lock:
            return self._workers.setdefault(id(sweep), StatisticsWorker(sweep))

    def _drawings(self, sweep: LiveSweep) -> Drawings:
        with self._lock:
            return self._drawn.setdefault(id(sweep), Drawings())


def _texts(parts: Parts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts to read at once, and their marks: a page is there before plotly is, which is large."""
    texts = {name: part for name, part in parts.items() if name not in _LATER}
    made = {name: make() for name, (_, make) in texts.items()}
    return made, {name: mark for name, (mark, _) in texts.items()}


def _changed(parts: Parts, outputs: tuple[tuple[str, str], ...], seen: dict[str, Any]) -> Any:
    """What a callback returns: parts with another mark than the page has, and the new marks."""
    marks = {name: mark for name, (mark, _) in parts.items()}
    stale = {name for name, mark in marks.items() if seen.get("marks", {}).get(name) != mark}
    if not stale:
        raise PreventUpdate
    values = [parts[name][1]() if name in stale else no_update for name, _ in outputs]
    return [*values, {**seen, "marks": marks}]


def _choice(search: str) -> tuple[list[int], bool]:
    """Trials that the address names: their numbers, or all."""
    text = parse_qs(search.lstrip("?")).get("trials", [""])[0]
    if text == EVERYONE:
        return [], True
    numbers = [int(part) for part in text.split(",") if part.isdecimal() and len(part) < 10]
    return list(dict.fromkeys(numbers)), False


def _of(seen: Any, name: str) -> Any:
    return seen.get(name) if isinstance(seen, dict) else None


def _samples_mark(trial: LiveTrial) -> Any:
    try:
        entries = [(entry.name, entry.stat().st_mtime) for entry in os.scandir(trial.paths.samples)]
    except OSError:
        return []
    return [list(entry) for entry in sorted(entries)]
