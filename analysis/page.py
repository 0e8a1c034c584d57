"""The report as Markdown and as one HTML file that needs nothing else: no network, no other file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from jinja2 import Environment
from plotly.offline import get_plotlyjs

Row = Sequence[str]


@dataclass(frozen=True)
class Page:
    """Everything a report says, as text."""

    title: str
    subtitle: str
    header: Row
    rows: list[Row]
    best_row: int
    """Index of the best trial in `rows`."""
    findings: list[str]
    caveats: list[str]
    replay: str
    replay_notes: list[str]
    next_commands: list[str]


def to_markdown(page: Page, images: Sequence[str]) -> str:
    """EXPERIMENT_REPORT.md; `images` are the file names of pictures beside it."""
    lines = [f"# {page.title}", "", page.subtitle, "", "## Findings", ""]
    lines += [f"- {_escape(text)}" for text in page.findings]
    lines += [
        "",
        "## Trials",
        "",
        _markdown_row(page.header),
        _markdown_row(["---"] * len(page.header)),
    ]
    for number, row in enumerate(page.rows):
        cells = [f"**{cell}**" if number == page.best_row and cell else cell for cell in row]
        lines.append(_markdown_row(cells))
    for name in images:
        lines += ["", f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"]
    lines += ["", "## What this does not show", ""]
    lines += [f"- {_escape(text)}" for text in page.caveats]
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


def _markdown_row(cells: Row) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _escape(text: str) -> str:
    return text.replace("*", "\\*").replace("<", "&lt;")


_TEMPLATE = """\
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
<div class="card table"><table>
<thead><tr>{% for cell in page.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in page.rows -%}
<tr{% if loop.index0 == page.best_row %} class="best"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor -%}
</tbody></table></div>
{% for drawing in drawings %}<div class="card drawing">{{ drawing | safe }}</div>{% endfor %}
<h2>What this does not show</h2>
<ul class="card caveats">{% for text in page.caveats %}<li>{{ text }}</li>{% endfor %}</ul>
<h2>The best trial in plain TRL</h2>
<pre>{{ page.replay }}</pre>
<ul>{% for text in page.replay_notes %}<li>{{ text }}</li>{% endfor %}</ul>
{% if page.next_commands %}<h2>Next</h2>
<pre>{% for command in page.next_commands %}{{ command }}
{% endfor %}</pre>{% endif %}
</body>
</html>
"""
