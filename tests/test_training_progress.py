import functools
import io
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from training import progress
from training.progress import Display, duration


@pytest.fixture(autouse=True)
def terminal_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can go back a line, whatever runs the tests."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`clock.now` is the time, in seconds; it stands still."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def terminal(width: int = 100, height: int = 30, **options: Any) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, record=True, **options
    )


def text_file(**options: Any) -> Console:
    return Console(file=io.StringIO(), **options)


def drawn(display: Display) -> list[str]:
    """The lines that the table has at the moment."""
    with display.console.capture() as capture:
        display.console.print(display)
    return [line.rstrip() for line in Text.from_ansi(capture.get()).plain.splitlines()]


def _written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_shows_a_row_a_trial_and_the_footer_below(clock: SimpleNamespace) -> None:
    with Display(terminal()) as display:
        display.footer = lambda: "about 5 min left; 30 steps saved"
        first, second = display.add("trial 3", 60), display.add("trial 12", 240)
        clock.now += 48
        first.step(20, 2.31)
        first.evaluated(20, 2.74, is_best=True)
        second.step(120, 1.5)
        second.evaluated(100, 1.75, is_best=True)
        second.evaluated(120, 1.8125, is_best=False)

    shown = [line.split() for line in display.console.export_text().splitlines()[-4:]]
    assert shown[0] == "slot trial step done train eval rung s/step left".split()
    assert shown[1] == "1 trial 3 20/60 ==------ 2.3100 2.7400 best 1 2.4 1.6 min".split()
    assert shown[2] == "2 trial 12 120/240 ====---- 1.5000 1.8125 2 0.4 48 s".split()
    assert " ".join(shown[3]) == "about 5 min left; 30 steps saved"


def test_a_trial_takes_the_lowest_free_slot_and_its_row_stays_there() -> None:
    display = Display(terminal())
    trials = [display.add(f"trial {n}", 60) for n in range(3)]

    trials[1].close()
    display.add("trial 7", 60)
    trials[0].close()

    assert [line.split()[:3] for line in drawn(display)[1:]] == [
        ["2", "trial", "7"],
        ["3", "trial", "2"],
    ]


def test_a_step_draws_nothing_and_the_table_shows_the_last_one_when_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "Live", functools.partial(Live, auto_refresh=False))
    with Display(terminal()) as display:
        trial = display.add("trial 3", 60)
        before = _written(display.console)
        for step in range(1, 50):
            trial.step(step, 2.31)

        assert _written(display.console) == before
    assert "49/60" in _written(display.console)


def test_the_footer_is_asked_by_the_thread_that_trains_and_at_most_once_a_second(
    clock: SimpleNamespace,
) -> None:
    askers: list[threading.Thread] = []

    def footer() -> str:
        askers.append(threading.current_thread())
        return f"asked {len(askers)} times"

    with Display(terminal()) as display:
        display.footer = footer
        trial = display.add("trial 3", 60)
        for step in range(1, 11):
            trial.step(step, 2.31)
            clock.now += 0.25
        assert display.live is not None
        drawing = threading.Thread(target=display.live.refresh)
        drawing.start()
        drawing.join()

        assert drawn(display)[-1] == "asked 3 times"
    assert askers == [threading.current_thread()] * 3


@pytest.mark.parametrize("soft_wrap", [False, True])
def test_a_narrow_terminal_keeps_trial_step_and_eval_whole(soft_wrap: bool) -> None:
    display = Display(terminal(width=60, soft_wrap=soft_wrap))
    display._footer_text = "about 12.5 min left; 300 steps saved by stages and 120 by pruning"
    for n in range(10, 13):
        trial = display.add(f"trial {n}", 1000)
        trial.step(500, 2.31)
        trial.evaluated(500, 2.74, is_best=True)

    lines = drawn(display)
    display.console.width = 36
    narrower = drawn(display)

    assert max(map(len, lines)) <= 60
    assert lines[0].split() == "trial step train eval s/step left".split()
    assert lines[1].split()[:6] == "trial 10 500/1000 2.3100 2.7400 best".split()
    assert " ".join(lines[4:]) == display._footer_text
    assert narrower[1].split() == "trial 10 500/1000 2.7400 best".split()


def test_no_column_moves_when_the_first_losses_come(clock: SimpleNamespace) -> None:
    display = Display(terminal(width=70))
    trial = display.add("trial 3", 60)
    before = drawn(display)
    clock.now += 20
    trial.step(1, 2.31)
    trial.evaluated(1, 2.74, is_best=True)

    assert drawn(display)[0] == before[0]


def test_a_long_label_is_cut_rather_than_the_numbers() -> None:
    display = Display(terminal(width=60))
    trial = display.add("a name that is far longer than there is room for", 1000)
    trial.step(500, 2.31)
    trial.evaluated(500, 2.74, is_best=True)

    line = drawn(display)[1]
    assert line.startswith("a name that") and "... " in line
    assert "500/1000" in line and "2.7400 best" in line


def test_wide_characters_and_line_breaks_of_a_label_leave_the_columns_straight() -> None:
    display = Display(terminal())
    for label in ("trial 1", "学习率", "two\nlines"):
        display.add(label, 60)

    ends = [cell_len(line[: line.index("/60")]) for line in drawn(display)[1:]]
    assert ends == ends[:1] * 3


def test_more_trials_than_lines_leave_the_footer_on_the_screen() -> None:
    display = Display(terminal(height=10))
    display._footer_text = "about 5 min left"
    for n in range(20):
        display.add(f"trial {n}", 60)

    lines = drawn(display)

    assert len(lines) < 10
    assert lines[-2:] == ["and 15 more", "about 5 min left"]


def test_a_file_gets_one_line_an_evaluation_and_nothing_else(clock: SimpleNamespace) -> None:
    console = text_file()
    with Display(console) as display:
        display.footer = lambda: "about 5 min left"
        trial, unnamed = display.add("trial 3", 60), display.add("", 10)
        clock.now += 72
        trial.step(30, 2.31)
        trial.evaluated(30, 2.74, is_best=True)
        clock.now += 48
        trial.step(60, 2.25)
        trial.evaluated(60, 2.8, is_best=False)
        trial.close()
        unnamed.step(1, 2.5)
        unnamed.evaluated(1, 2.625, is_best=True)

    assert _written(console) == (
        "  trial 3  step 30/60  train 2.3100  eval 2.7400 (best)  2.4 s/step, 72 s left\n"
        "  trial 3  step 60/60  train 2.2500  eval 2.8000  2 s/step\n"
        "  step 1/10  train 2.5000  eval 2.6250 (best)  120 s/step, 18.0 min left\n"
    )


def test_a_long_line_of_a_file_stays_one_line() -> None:
    console = text_file()
    Display(console).add("trial " + "3" * 200, 60).evaluated(0, 2.74, is_best=True)

    assert len(_written(console).splitlines()) == 1


def test_a_terminal_that_cannot_go_back_a_line_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Display(terminal()) as display:
        display.add("trial 3", 60).evaluated(30, 2.74, is_best=True)

    assert "eval 2.7400 (best)" in _written(display.console)


def test_the_table_stays_until_the_outermost_context_is_left_and_comes_back() -> None:
    display = Display(terminal())
    with display as outer:
        table = display.live
        with display as inner:
            assert outer is inner is display and display.live is table
        assert table is not None and display.live is table and table.is_started
    assert display.live is None and not table.is_started

    with display:
        assert display.live is not None and display.live.is_started
        display.add("trial 8", 60)
        before = len(_written(display.console))
    assert "trial 8" in _written(display.console)[before:]
    assert display.live is None


def test_the_table_is_taken_away_after_a_fault() -> None:
    display = Display(terminal())
    with pytest.raises(KeyboardInterrupt), display, display:
        raise KeyboardInterrupt

    assert display.live is None
    assert display.console._live_stack == []


@pytest.mark.parametrize("step", [0, 40])
def test_the_pace_is_that_of_the_steps_done_since_a_trial_was_resumed_or_forked(
    clock: SimpleNamespace, step: int
) -> None:
    display = Display(terminal())
    trial = display.add("trial 3", 60)
    trial.resumed(step, 1.0)
    assert drawn(display)[1].split()[3] == f"{step}/60"
    clock.now += 30
    for number in range(step + 1, step + 11):
        trial.step(number, 2.31)
    clock.now += 1000  # a step that is under way says nothing of its pace yet

    left = duration(3 * (50 - step))
    assert drawn(display)[1].endswith(f"  3  {left:>8}")
    assert display.num_steps == 10


@pytest.mark.parametrize("label", ["[bold]lr[/bold]", "[/]", ":smile: [red]"])
def test_brackets_and_colons_are_shown_as_they_are(label: str) -> None:
    with Display(terminal(markup=True, emoji=True)) as display:
        display.footer = lambda: f"footer {label}"
        trial = display.add(label, 60)
        trial.step(30, 2.31)
        trial.evaluated(30, 2.74, is_best=True)
    console = text_file(markup=True, emoji=True)
    Display(console).add(label, 60).evaluated(30, 2.74, is_best=True)

    *_, row, footer = display.console.export_text().splitlines()
    assert f" {label} " in row
    assert footer.strip() == f"footer {label}"
    assert f" {label} " in _written(console)
