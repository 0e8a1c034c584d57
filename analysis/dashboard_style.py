"""The dashboard in the browser: the page around what Dash draws, its colours by day and night, scripts.

Figures are drawn for a light page, since a downloaded PNG keeps what plotly drew; the rules for `.dash-graph`
recolour their text, grid and background on the screen alone.
"""

INDEX = """\
<!doctype html>
<html lang="en">
<head>
{%metas%}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{%title%}</title>
<link rel="icon" href="data:,">
{%css%}
<style>
CSS
</style>
</head>
<body>
{%app_entry%}
<footer>{%config%}{%scripts%}{%renderer%}</footer>
</body>
</html>
"""

CSS = """\
:root {
  --page: #fafaf8; --card: #fff; --line: #e3e1da; --text: #222; --faint: #5f5f5f; --link: #1d5fa8;
  --accent: #1a7f5a; --best: #e8f4ee; --grid: #e6e4de; --warn: #fdf8ec; --ring: #3066be; --stopped: #6b4a9c;
  --complete: #12684a; --running: #2253a3; --pruned: #7d5605; --failed: #a82438; --damaged: #5a5a5a;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #16181c; --card: #1f2227; --line: #353a42; --text: #e6e6e3; --faint: #a9adb4; --link: #8cbcf5;
  --accent: #5cc79b; --best: #1d3a30; --grid: #353a42; --warn: #2d281b; --ring: #8cbcf5; --stopped: #c9b0f0;
  --complete: #6bd3a8; --running: #93bbff; --pruned: #e6bd67; --failed: #ff96a4; --damaged: #b5b5b5;
} }
:root, body {
  --Dash-Text-Primary: var(--text); --Dash-Text-Strong: var(--text); --Dash-Text-Weak: var(--faint);
  --Dash-Text-Disabled: var(--faint); --Dash-Fill-Inverse-Strong: var(--card);
  --Dash-Stroke-Strong: var(--faint); --Dash-Stroke-Weak: var(--line);
  --Dash-Fill-Interactive-Strong: var(--accent); --Dash-Fill-Interactive-Weak: var(--best);
  --Dash-Fill-Primary-Hover: var(--best); --Dash-Fill-Primary-Active: var(--best);
  --Dash-Fill-Disabled: var(--line); --Dash-Shading-Strong: #0005; --Dash-Shading-Weak: #0003;
}
body { margin: 0; background: var(--page); color: var(--text);
       font: 16px/1.5 Inter, Helvetica, Arial, sans-serif; }
body > footer { display: none; }
main { max-width: 1280px; margin: 0 auto; padding: 18px 20px 60px; }
a { color: var(--link); text-underline-offset: 2px; }
:focus-visible { outline: 2px solid var(--ring); outline-offset: 2px; border-radius: 3px; }
nav { font-size: 15px; color: var(--faint); overflow-wrap: anywhere; }
h1 { font-size: 27px; line-height: 1.25; margin: 4px 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 28px 0 8px; }
.line { color: var(--faint); margin: 0 0 4px; display: flex; flex-wrap: wrap; gap: 4px 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.text { padding: 8px 18px; margin: 0; overflow-wrap: anywhere; }
.text.list { padding-left: 34px; } .text li { margin: 5px 0; }
.caveats { background: var(--warn); margin-top: 10px; color: var(--text); }
summary { cursor: pointer; padding: 8px 18px; }
.table { overflow: auto; max-height: 560px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 11px; font-size: 15px; text-align: right; white-space: nowrap; max-width: 340px;
         overflow: hidden; text-overflow: ellipsis; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { position: sticky; top: 0; background: var(--card); color: var(--faint); font-size: 14px;
           font-weight: 600; z-index: 1; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 400; }
tr.best > * { background: var(--best); }
tr.chosen > :first-child { box-shadow: inset 4px 0 0 var(--accent); }
.facts th, .facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; max-width: none; }
.facts th { color: var(--faint); width: 40%; }
td.left { text-align: left; }
td.long { white-space: normal; min-width: 300px; max-width: 560px; }
.state { font-weight: 600; }
.complete { color: var(--complete); } .running { color: var(--running); } .pruned { color: var(--pruned); }
.stopped { color: var(--stopped); } .failed { color: var(--failed); } .damaged { color: var(--damaged); }
.drawing { padding: 6px; min-height: 440px; } .drawing .dash-graph { height: 440px; }
.drawing.low, .drawing.low .dash-graph { height: 340px; min-height: 0; }
.drawing.tall, .drawing.tall .dash-graph { height: 620px; }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 0 20px; }
.columns > * { min-width: 0; }
pre { margin: 0; padding: 12px 16px; overflow: auto; max-height: 420px; font-size: 13px; }
.below { margin-top: 12px; }
details.card, .controls details { border: 1px solid var(--line); border-radius: 10px; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: center; margin-bottom: 8px; }
.controls details { flex: 1 1 100%; min-width: 0; }
.choices { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 2px 14px;
           max-height: 220px; overflow: auto; padding: 4px 18px 12px; }
.controls label { color: var(--text); min-width: 0; overflow-wrap: anywhere; }
.controls input { accent-color: var(--accent); }
.buttons { display: flex; flex-wrap: wrap; gap: 8px; margin: 8px 0; } .buttons:empty { display: none; }
button.act, .buttons button { font: inherit; font-size: 15px; padding: 6px 14px; border-radius: 8px;
  border: 1px solid var(--faint); background: var(--card); color: var(--text); cursor: pointer; }
.buttons button.go { background: var(--link); border-color: var(--link); color: var(--page); }
.buttons button:disabled { opacity: .5; cursor: default; }
dialog { color: var(--text); padding: 14px 20px; width: min(520px, calc(100vw - 64px)); }
dialog::backdrop { background: #0007; }
dialog h2 { margin: 4px 0; } #ask-error { color: var(--failed); margin: 6px 0; overflow-wrap: anywhere; }
#ask-error:empty, #outcome:empty { display: none; }
#outcome { max-width: 1280px; margin: 12px auto 0; padding: 0 20px; color: var(--complete); }
.field { display: grid; grid-template-columns: 1fr 1fr; gap: 4px 12px; align-items: center; margin: 8px 0;
         overflow-wrap: anywhere; }
.field select, .field input { font: inherit; font-size: 15px; padding: 5px 8px; min-width: 0; width: 100%;
  box-sizing: border-box; background: var(--card); color: var(--text); border: 1px solid var(--faint);
  border-radius: 6px; }
.sample { padding: 8px 18px; margin-bottom: 10px; } .prompt { font-weight: 600; }
.prompt, .said { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0; }
.answers { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(240px, 1fr); gap: 0 18px;
           overflow-x: auto; padding-bottom: 4px; }
.dash-graph .main-svg { background: transparent !important; }
.dash-graph rect.bg { fill: transparent !important; }
.dash-graph .xtick text, .dash-graph .ytick text, .dash-graph .y2tick text, .dash-graph .y3tick text,
.dash-graph .legendtext, .dash-graph .g-xtitle text, .dash-graph .g-ytitle text,
.dash-graph .g-y2title text, .dash-graph .g-y3title text, .dash-graph .shape-label text
  { fill: var(--text) !important; }
.dash-graph .gridlayer path { stroke: var(--grid) !important; }
.dash-graph .modebar-group { background: transparent !important; }
.dash-graph .modebar-btn path { fill: var(--faint) !important; }
@media (max-width: 700px) {
  main { padding: 12px 12px 40px; } h1 { font-size: 22px; }
  .columns { grid-template-columns: minmax(0, 1fr); }
  th, td { padding: 6px 8px; font-size: 14px; }
  .board td:first-child, .board th:first-child { position: sticky; left: 0; background: var(--card);
    max-width: 150px; z-index: 1; }
  .board thead th:first-child { z-index: 2; }
  .board tr.best > :first-child { background: var(--best); }
  .drawing, .drawing .dash-graph { height: 400px; min-height: 0; }
  .choices { max-height: 180px; }
}
"""


# Keeps the address in step with the choice, without a new page and without an entry in the history.
KEEP_ADDRESS = """
function(chosen, everyone) {
    const address = new URL(window.location);
    address.searchParams.delete("token");
    const text = (everyone || []).length ? "all" : (chosen || []).join(",");
    if (text) { address.searchParams.set("trials", text); }
    else { address.searchParams.delete("trials"); }
    const shown = address.toString().replaceAll("%2C", ",");
    window.history.replaceState(window.history.state, "", shown);
    return window.dash_clientside.no_update;
}
"""
ON_ADDRESS = """
function(path) {
    const parts = path.split("/").filter(part => part).map(decodeURIComponent);
    document.title = [...parts.filter(part => part !== "sweep" && part !== "trial").reverse(), "Loraloom"]
        .join(" · ");
    const address = new URL(window.location);
    if (address.searchParams.has("token")) {
        address.searchParams.delete("token");
        window.history.replaceState(window.history.state, "", address);
    }
    if (!window.plainCheckboxes) {
        // Dash calls its lists of checkboxes listboxes, in which a screen reader expects no checkbox.
        const plain = list => {
            if (list.getAttribute("role")) { list.removeAttribute("role"); }
            for (const option of list.querySelectorAll("[role=option], [aria-selected]")) {
                option.removeAttribute("role");
                option.removeAttribute("aria-selected");
            }
        };
        window.plainCheckboxes = new MutationObserver(
            () => document.querySelectorAll(".dash-checklist").forEach(plain));
        window.plainCheckboxes.observe(document.body, {
            subtree: true, childList: true, attributeFilter: ["role", "aria-selected"],
        });
    }
    return window.dash_clientside.no_update;
}
"""


def index_page() -> str:
    """The page that Dash fills."""
    return INDEX.replace("CSS", CSS)
