"""Answers to the sweep's fixed prompts on a trial's page: the base model's beside the tuned ones, by step."""

from collections.abc import Mapping, Sequence
from typing import Any

from dash import html

Samples = Mapping[int, Sequence[Mapping[str, Any]]]


def samples_view(samples: Samples) -> Any:
    """Every prompt with its answers side by side; all of them are text, whatever they hold."""
    if not samples:
        text = "None: samples are made of trials that lead their sweep, at their evaluations."
        return html.P(text, className="card text")
    prompts = list(dict.fromkeys(answer["prompt"] for step in samples.values() for answer in step))
    return [
        html.Div(
            [
                html.P(prompt, className="prompt"),
                html.Div(
                    [
                        _answer(step, answer)
                        for step, answers in samples.items()
                        for answer in answers
                        if answer["prompt"] == prompt
                    ],
                    className="answers",
                    tabIndex="0",
                    role="group",
                    **_label(f"Answers to prompt {number}"),
                ),
            ],
            className="card sample",
        )
        for number, prompt in enumerate(prompts, 1)
    ]


def _answer(step: int, answer: Mapping[str, Any]) -> html.Div:
    end = "" if answer["ended"] else ", cut"
    who = "base model" if step == 0 else f"step {step:,}"
    title = f"{who} ({answer['num_tokens']} tokens{end})"
    return html.Div([html.P(title, className="line"), html.P(answer["response"], className="said")])


def _label(text: str) -> Any:
    return {"aria-label": text}
