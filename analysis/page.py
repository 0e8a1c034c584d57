"""The report as Markdown and as one HTML file that needs nothing else: no network, no other file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment
from plotly.offline import get_plotlyjs

from analysis.tables import Answer, Table


@dataclass(frozen=True)
class Page:
    """Everything a report says, as text."""

    title: str
    subtitle: str
    trials: Table
    best_row: int
    """Index of the best trial in `trials`."""
    seeds: Table | None
    """Settings with more than one seed."""
    seed_runs: Table | None
    findings: list[str]
    caveats: list[str]
    cost: list[tuple[str, str]]
    answers: list[Answer]
    replay: str
    replay_notes: list[str]
    next_commands: list[str]


def to_markdown(page: Page, images: Sequence[str]) -> str:
    """EXPERIMENT_REPORT.md; `images` are the file names of pictures beside it."""
    lines = [f"# {page.title}", "", page.subtitle, "", "## Findings", ""]
    lines += [f"- {_escape(text)}" for text in page.findings]
    lines += ["", "## Trials", "", *_markdown_table(page.trials, page.best_row)]
    for table, title in ((page.seeds, "Over seeds"), (page.seed_runs, "Each seed")):
        if table:
            lines += ["", f"## {title}", "", *_markdown_table(table)]
    for name in images:
        lines += ["", f"![{Path(name).stem.replace('_', ' ')}]({name})"]
    lines += ["", "## What this does not show", ""]
    lines += [f"- {_escape(text)}" for text in page.caveats]
    lines += ["", "## Cost", ""]
    lines += [f"- {_escape(what)}: {_escape(amount)}" for what, amount in page.cost]
    if page.answers:
        lines += ["", "## Answers before and after"]
    for answer in page.answers:
        parts = (
            ("Prompt", answer.prompt),
            ("Base model", answer.before),
            ("Best trial", answer.after),
        )
        for name, text in parts:
            lines += ["", f"{name}:", "", *(f"    {line}" for line in text.splitlines() or [""])]
    lines += ["", "## The best trial in plain TRL", "", "```bash", page.replay, "```", ""]
    lines += [f"- {_escape(text)}" for text in page.replay_notes]
    if page.next_commands:
        lines += ["", "## Next", "", "```bash", *page.next_commands, "```"]
    return "\n".join(lines) + "\n"


def to_html(page: Page, figures: Mapping[str, go.Figure]) -> str:
    """report.html, with plotly.js in it once."""
    drawings = [
        figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
        for figure in figures.values()
    ]
    template = Environment(autoescape=True).from_string(_TEMPLATE)
    return template.render(page=page, drawings=drawings, plotlyjs=get_plotlyjs())


def _markdown_table(table: Table, bold_row: int | None = None) -> list[str]:
    lines = [_markdown_row(table.header), _markdown_row(["---"] * len(table.header))]
    for number, row in enumerate(table.rows):
        cells = [f"**{cell}**" if number == bold_row and cell else cell for cell in row]
        lines.append(_markdown_row(cells))
    return lines


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _escape(text: str) -> str:
    return text.replace("*", "\\*").replace("<", "&lt;")


_TEMPLATE = """\
{% macro drawn(table, best) %}<div class="card table"><table>
<thead><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows -%}
<tr{% if loop.index0 == best %} class="best"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor -%}
</tbody></table></div>{% endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<link rel="icon" href="data:,">
<style>
  body { font: 16px/1.55 Inter, Helvetica, Arial, sans-serif; color: #222; background: #fafaf8;
         max-width: 1180px; margin: 0 auto; padding: 24px 20px 64px; }
  h1 { margin: 0 0 4px; font-size: 30px; } h2 { margin: 36px 0 10px; font-size: 21px; }
  .subtitle { color: #666; margin: 0; }
  .card { background: #fff; border: 1px solid #e6e4de; border-radius: 10px; padding: 8px 18px; }
  .table { overflow-x: auto; padding: 0; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { padding: 8px 9px; font-size: 15px; text-align: right; white-space: nowrap;
           border-bottom: 1px solid #eeece6; }
  th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
  th { color: #666; font-weight: 600; font-size: 14px; }
  tr:last-child td { border-bottom: 0; }
  tr.best td { background: #e8f4ee; font-weight: 600; }
  li { margin: 5px 0; } .caveats { background: #fdf8ec; border-color: #efe3c2; }
  pre { background: #23272e; color: #eee; padding: 14px 16px; border-radius: 8px;
        overflow-x: auto; font-size: 14px; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 18px; } dd { margin: 0; }
  dt { color: #666; } h3 { margin: 8px 0 2px; font-size: 14px; color: #666; }
  .answers { margin: 10px 0; display: grid; grid-template-columns: 1fr 1fr; gap: 0 24px; }
  .answers p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 8px; }
  .answers > p { grid-column: 1 / -1; font-weight: 600; }
  @media (max-width: 640px) { dl, .answers { grid-template-columns: 1fr; } }
  .drawing { margin: 14px 0; padding: 6px; }
</style>
<script>{{ plotlyjs | safe }}</script>
</head>
<body>
<h1>{{ page.title }}</h1>
<p class="subtitle">{{ page.subtitle }}</p>
<h2>Findings</h2>
<ul class="card">{% for text in page.findings %}<li>{{ text }}</li>{% endfor %}</ul>
<h2>Trials</h2>
{{ drawn(page.trials, page.best_row) }}
{% if page.seeds %}<h2>Over seeds</h2>
{{ drawn(page.seeds, -1) }}
{% endif %}
{%- if page.seed_runs %}<h2>Each seed</h2>
{{ drawn(page.seed_runs, -1) }}
{% endif %}
{% for drawing in drawings %}<div class="card drawing">{{ drawing | safe }}</div>{% endfor %}
<h2>What this does not show</h2>
<ul class="card caveats">{% for text in page.caveats %}<li>{{ text }}</li>{% endfor %}</ul>
<h2>Cost</h2>
<dl class="card">{% for what, amount in page.cost %}<dt>{{ what }}</dt><dd>{{ amount }}</dd>{% endfor %}</dl>
{% if page.answers %}<h2>Answers before and after</h2>
{% for answer in page.answers %}<div class="card answers"><p>{{ answer.prompt }}</p>
<div><h3>Base model</h3><p>{{ answer.before }}</p></div>
<div><h3>Best trial</h3><p>{{ answer.after }}</p></div></div>
{% endfor %}{% endif %}
<h2>The best trial in plain TRL</h2>
<pre>{{ page.replay }}</pre>
<ul>{% for text in page.replay_notes %}<li>{{ text }}</li>{% endfor %}</ul>
{% if page.next_commands %}<h2>Next</h2>
<pre>{% for command in page.next_commands %}{{ command }}
{% endfor %}</pre>{% endif %}
</body>
</html>
"""
