"""Slices have intervals, and nothing is drawn over two settings where no trials are."""

from typing import Any

import pytest
from test_analysis_report import add_trial

from analysis.choice import loss_intervals
from analysis.figures import make_figures
from analysis.findings import find
from analysis.load import Results, load_source
from analysis.slice_figures import _get_contour_info, _get_slices_info
from analysis.stats import loss_interval
from training.paths import SweepPaths, write_text

PAIR = ("learning_rate", "lora_r")


def grid_of(root: Any, points: list[tuple[float, int]]) -> Results:
    paths = SweepPaths(root / "grid")
    write_text(paths.definition, "method: grid\n")
    for number, (rate, rank) in enumerate(points):
        loss = 1.5 + 100 * rate + rank / 100
        add_trial(paths, number, f"t{number}", loss, max_steps=4, learning_rate=rate, lora_r=rank)
    return load_source(paths.root)


@pytest.fixture
def grid(tmp_path: Any) -> Results:
    return grid_of(
        tmp_path, [(rate, rank) for rate in (1e-4, 4e-4, 1.6e-3) for rank in (8, 16, 32)]
    )


def test_the_surface_has_the_trials_losses_at_the_trials(grid):
    info = _get_contour_info(grid, PAIR)
    assert info is not None and info.is_log == (True, True)
    assert info.losses[info.best] == pytest.approx(1.59)
    assert info.places[info.best] == (1e-4, 8)
    assert info.surface[0][0] == pytest.approx(1.59)
    assert info.surface[-1][-1] == pytest.approx(1.98)
    assert info.surface[30][30] == pytest.approx(1.70)


def test_nothing_is_drawn_beyond_the_trials(tmp_path):
    corner = [(1e-4, 8), (1e-4, 16), (1e-4, 32), (4e-4, 8), (4e-4, 16), (1.6e-3, 8)]
    info = _get_contour_info(grid_of(tmp_path, corner), PAIR)
    assert info is not None
    assert info.surface[-1][-1] is None
    assert info.surface[0][0] is not None


@pytest.mark.parametrize(
    "points",
    [
        [(1e-4, 8), (1e-4, 16), (1e-4, 32), (4e-4, 8), (1.6e-3, 8)],
        [(1e-4 * 2**n, 8 + 8 * (n % 2)) for n in range(6)],
    ],
)
def test_too_few_places_or_values_draw_no_surface(tmp_path, points):
    assert _get_contour_info(grid_of(tmp_path, points), PAIR) is None


def test_slices_have_each_trials_loss_with_its_interval(grid):
    findings = find(grid)
    infos = _get_slices_info(grid, ["lora_r"], findings.table)
    assert infos[0].values == [8, 8, 8, 16, 16, 16, 32, 32, 32]
    assert infos[0].losses[0] == pytest.approx(1.59)
    assert infos[0].best == 0
    losses = grid.best.example_losses()
    assert losses is not None and findings.table is not None
    alone, together = loss_interval(losses), loss_intervals(findings.table)[0]
    assert together.low == pytest.approx(alone.low, abs=0.02)
    assert together.high == pytest.approx(alone.high, abs=0.02)
    assert infos[0].errors_low[0] == pytest.approx(together.estimate - together.low)


def test_the_drawings_show_trials_as_points_and_the_best_as_a_star(grid):
    figures: dict[str, Any] = {**make_figures(grid, find(grid))}
    surface, points = figures["contour"].data
    assert surface.connectgaps is False
    assert sorted(points.marker.symbol) == ["circle"] * 8 + ["star"]
    assert [trace.error_y.array is not None for trace in figures["slices"].data] == [True, True]
