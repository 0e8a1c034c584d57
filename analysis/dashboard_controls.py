"""Buttons, the dialog that asks before anything is done, and what is still waiting; as Dash components.

The dialog is the browser's own: it keeps the focus, Escape closes it, and what lies under it is out of reach.
"""

from collections.abc import Sequence
from typing import Any

from dash import dcc, html

from analysis.dashboard_actions import LABELS, Field, Question, request_line
from analysis.dashboard_promotion import PromotionState
from analysis.dashboard_rows import clock

# The order of the page: whatever the dialog's fields hold goes along, by name.
SHOW_DIALOG = """
function(asked) {
    const dialog = document.getElementById("ask");
    if (asked && !dialog.open) { dialog.showModal(); }
    return window.dash_clientside.no_update;
}
"""
CLOSE_DIALOG = """
function() {
    const dialog = document.getElementById("ask");
    if (dialog && dialog.open) { dialog.close(); }
    return window.dash_clientside.no_update;
}
"""
SEND_ORDER = """
function(clicks, asked, secret) {
    if (!clicks || !asked) { return window.dash_clientside.no_update; }
    const values = {};
    for (const field of document.querySelectorAll("#ask-body [name]")) { values[field.name] = field.value; }
    return {...asked, values, secret, clicks};
}
"""


def dialog(secret: str) -> list[Any]:
    """The dialog of all pages, closed, and what its callbacks keep."""
    named: Any = {"aria-labelledby": "ask-title", "aria-describedby": "ask-body"}
    return [
        html.Dialog(
            [
                html.H2(id="ask-title"),
                html.Div(id="ask-body"),
                html.P(id="ask-error", role="alert"),
                html.Div(
                    [
                        html.Button("Cancel", id="ask-cancel", type="button"),
                        html.Button(id="ask-go", type="button", className="go"),
                    ],
                    className="buttons",
                ),
            ],
            id="ask",
            className="card",
            **named,
        ),
        dcc.Store(id="asked"),
        dcc.Store(id="order"),
        dcc.Store(id="done"),
        dcc.Store(id="secret", data=secret),
    ]


def buttons(actions: Sequence[str]) -> list[Any]:
    return [
        html.Button(LABELS[action], id={"do": action}, type="button", className="act")
        for action in actions
    ]


def question_body(question: Question) -> list[Any]:
    """The sentence, and a labelled input for every field."""
    return [html.P(question.text), *(_field(field) for field in question.fields)]


def waiting(
    pending: Sequence[dict[str, Any]],
    promotion: PromotionState | None,
    *,
    is_running: bool,
    root: str,
) -> list[Any]:
    """Requests that the runner has not taken yet, and the last promotion."""
    parts: list[Any] = []
    if pending:
        lines = [
            html.Li(f"{request_line(request)} (asked at {_when(request)})") for request in pending
        ]
        text = "Waits for the runner, which looks every few seconds:"
        if not is_running:
            text = f"Waits for sweeps.run, which does not run {root}: the command that began it goes on."
        parts.append(html.Div([html.P(text), html.Ul(lines)], className="card text caveats"))
    if promotion is not None:
        parts.append(html.P(promotion.text, className="line"))
        if promotion.log:
            log = html.Pre(
                promotion.log, tabIndex="0", role="region", **_label("End of promote.log")
            )
            parts.append(
                html.Details(
                    [html.Summary("End of promote.log"), log],
                    className="card",
                    open=promotion.is_running or "failed" in promotion.text,
                )
            )
    return parts


def _field(field: Field) -> html.Div:
    identity = f"ask-{field.name}"
    if field.values:
        options = [html.Option(value, value=value) for value in field.values]
        entry: Any = html.Select(options, id=identity, name=field.name)
    else:
        entry = dcc.Input(
            id=identity,
            name=field.name,
            type="text",
            value=field.default,
            autoComplete="off",
        )
    text = field.name
    if field.low is not None:
        text += f" ({field.low:g} to {field.high:g})"
    return html.Div([html.Label(text, htmlFor=identity), entry], className="field")


def _when(request: dict[str, Any]) -> str:
    time_s = request.get("time")
    return clock(float(time_s)) if isinstance(time_s, int | float) else "?"


def _label(text: str) -> Any:
    return {"aria-label": text}
