"""What a type loses, against torch's own numbers; which type is recommended, on constructed cases."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from deploy_sweep import promoted, tiny_config, trained_sweep
from torch.nn import functional

from analysis.stats import Interval
from deploy.gguf_model import open_gguf
from deploy.gguf_types import QUANTIZATIONS, check_quantizations
from deploy.measure import (
    Distances,
    Limits,
    Measurement,
    Reference,
    make_limits,
    make_reference,
    measure,
    measure_speed,
    recommend,
)
from deploy.measure_figure import _get_points_info, write_picture
from deploy.merge import load_merged
from deploy.promote import PromoteOptions, make_plan
from deploy.quantize import quantize
from sweeps.ledger import read_sweep
from training.data import load_splits
from training.evaluate import example_losses, mean_loss
from training.exceptions import ConfigError, GateError
from training.model import load_tokenizer
from training.paths import PromotionPaths, read_json

CPU = torch.device("cpu")


@pytest.fixture
def version(tmp_path_factory: pytest.TempPathFactory) -> PromotionPaths:
    """The promoted version, shared: not to be changed."""
    return promoted(tmp_path_factory.getbasetemp())


@pytest.fixture
def examples(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = tiny_config(tmp_path_factory.getbasetemp())
    return load_splits(config, load_tokenizer(config)).test


@pytest.fixture
def merged(version: PromotionPaths) -> Any:
    return load_merged(version.merged, CPU)


def _reference(logits: dict[str, torch.Tensor]) -> Reference:
    rows, start = {}, 0
    for name, logits_nV in logits.items():
        rows[name] = (start, np.arange(len(logits_nV)))
        start += len(logits_nV)
    all_NV = torch.cat(list(logits.values()))
    return Reference(
        all_NV.log_softmax(1).numpy().astype(np.float16), all_NV.argmax(1).numpy(), rows
    )


def test_divergence_and_top_1_are_torchs_own_of_two_known_logits() -> None:
    torch.manual_seed(0)
    expected = {"a": 4 * torch.randn(40, 300), "b": 4 * torch.randn(7, 300)}
    found = {name: logits + 0.7 * torch.randn_like(logits) for name, logits in expected.items()}
    distances = Distances(_reference(expected))

    for name, logits in found.items():
        for start in range(0, len(logits), 25):  # as the decoder's batches come
            distances.look(name, start, logits[start : start + 25].numpy())

    all_expected, all_found = torch.cat([*expected.values()]), torch.cat([*found.values()])
    kl_N = functional.kl_div(
        all_found.log_softmax(1), all_expected.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    assert kl_N.mean() > 0.1
    assert distances.divergences_N == pytest.approx(kl_N.numpy(), rel=2e-3)
    same = (all_found.argmax(1) == all_expected.argmax(1)).double().mean().item()
    assert 0.5 < same < 1
    assert distances.top_1 == same
    sums = distances.by_example().set_index("example_id")
    assert sums.loc["b", "loss_sum"] == pytest.approx(kl_N[40:].sum().item(), rel=2e-3)
    assert sums["num_tokens"].to_dict() == {"a": 40, "b": 7}


def test_a_models_own_logits_are_at_no_distance_from_it(merged: Any, examples: Any) -> None:
    """Evenly spaced positions, fewer than there are, are the ones that are looked at."""
    rows = examples.to_list()
    reference = make_reference(merged, rows, max_positions=50)
    distances = Distances(reference)
    num_seen = 0

    for row in rows:
        supervised = torch.tensor(row["labels"])[1:] != -100
        with torch.no_grad():
            logits_TV = merged(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        distances.look(row["example_id"], 0, logits_TV[:-1][supervised].numpy())
        num_seen += int(supervised.sum())

    assert len(reference.best_N) == 50 < num_seen
    assert np.abs(distances.divergences_N).max() < 1e-5
    assert distances.top_1 == 1


def test_f16_is_at_no_distance_and_q4_at_some_and_perplexity_is_transformers_own(
    version: PromotionPaths, merged: Any, examples: Any
) -> None:
    rows = examples.to_list()
    expected = example_losses(merged, examples, 4)
    reference = make_reference(merged, rows)
    found = {}
    for name in ("F16", "Q4_K_M"):
        distances, path = Distances(reference), version.gguf("tiny", name)
        with open_gguf(path, num_ctx=128) as model:
            losses = model.example_losses(rows, distances.look)
            found[name] = measure(path, name, model.num_params, distances, losses, expected, 2)

    f16, q4 = found["F16"], found["Q4_K_M"]
    assert abs(f16.kl.estimate) < 1e-5
    assert f16.top_1 == 1
    assert q4.kl.estimate > 100 * abs(f16.kl.estimate)
    assert q4.kl_99 > q4.kl.estimate
    assert f16.perplexity.estimate == pytest.approx(math.exp(mean_loss(expected)), rel=1e-3)
    assert f16.perplexity.low < f16.perplexity.estimate < f16.perplexity.high
    num_params = sum(weight.numel() for weight in merged.parameters())
    assert q4.bits_per_weight == pytest.approx(8 * q4.size_bytes / num_params)
    assert 16 < f16.bits_per_weight < 18


def test_positions_that_were_not_computed_do_not_pass(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"x")
    distances = Distances(_reference({"a": torch.zeros(2, 5)}))
    distances.look("a", 0, np.zeros((1, 5), np.float32))
    losses = pd.DataFrame({"example_id": ["a"], "loss_sum": [1.0], "num_tokens": [2]})

    with pytest.raises(GateError, match=r"x\.gguf: its logits are not finite"):
        measure(tmp_path / "x.gguf", "F16", 1, distances, losses, losses, 1)


def test_the_speed_of_a_file_is_measured(version: PromotionPaths) -> None:
    speed = measure_speed(version.gguf("tiny", "F16"), {"input_ids": [100, 200, 300]})

    assert 1 < speed.generation < 1e5
    assert 1 < speed.prompt < 1e6


def test_a_promotion_records_every_types_numbers_and_what_it_recommends(
    version: PromotionPaths,
) -> None:
    record = read_json(version.verification)
    found = record["quantization"]

    assert list(found["types"]) == ["F16", "Q4_K_M"]
    for name, numbers in found["types"].items():
        size = version.gguf("tiny", name).stat().st_size
        assert numbers["size_bytes"] == size
        loss = record["losses"]["loss"][name]
        assert numbers["perplexity"]["estimate"] == pytest.approx(math.exp(loss))
        difference = loss - record["losses"]["loss"]["merged"]
        assert numbers["loss_minus_merged"]["estimate"] == pytest.approx(difference, abs=1e-9)
        assert numbers["tokens_per_s"]["generation"] > 1
    smallest = found["types"]["Q4_K_M"]["loss_minus_merged"]["high"]
    assert found["recommended"] == ("Q4_K_M" if smallest < found["loss_margin"] else "F16")
    assert version.quantization_picture.read_bytes().startswith(b"\x89PNG")
    assert "quantization.png" in read_json(version.manifest)["files"]


def _item(
    name: str, size_mb: float, kl: float, difference: float, half: float = 0.001
) -> Measurement:
    interval = Interval(difference - half, difference + half, difference)
    loss = Interval(1.9, 2.1, 2.0)
    divergence = Interval(kl * 0.9, kl * 1.1, kl)
    size_bytes = round(size_mb * 1e6)
    return Measurement(name, size_bytes, 8.0, 100, divergence, 3 * kl, 0.9, loss, interval)


ITEMS = [
    _item("Q8_0", 145, 0.005, 0.003),
    _item("Q6_K", 138, 0.01, 0.0085),
    _item("Q5_K_M", 112, 0.08, 0.03),
    _item("Q4_K_M", 105, 0.04, 0.02),
]


@pytest.mark.parametrize(
    ("limits", "expected", "reason"),
    [
        (Limits(), "Q6_K", r"\+0\.0085, interval \[\+0\.0075, \+0\.0095\], allowed 0\.01"),
        (Limits(max_kl=0.05), "Q4_K_M", "smallest within --max_kl 0.05"),
        (Limits(max_kl=0.007), "Q8_0", "smallest within --max_kl 0.007"),
        (Limits(max_kl=0.001), None, "nearest is Q8_0 with 0.005"),
        (Limits(max_size_bytes=120_000_000), "Q4_K_M", r"within --max_size 120\.0 MB"),
        (Limits(max_size_bytes=140_000_000), "Q6_K", r"least KL divergence \(0\.01\)"),
        (Limits(max_size_bytes=90_000_000), None, r"nearest is Q4_K_M with 105\.0 MB"),
        (Limits(0.05, 110_000_000), "Q4_K_M", "105.0 MB"),
        (Limits(0.02, 110_000_000), None, r"nearest is Q6_K with 138\.0 MB"),
    ],
)
def test_the_recommendation_goes_by_margin_or_by_limits(
    limits: Limits, expected: str | None, reason: str
) -> None:
    found = recommend(ITEMS, limits)

    assert found.quantization == expected
    assert re.search(reason, found.reason)
    assert "\n" not in str(found)


def test_a_wide_interval_around_0_does_not_show_that_nothing_is_lost() -> None:
    unsure = [_item("Q4_K_M", 105, 0.04, 0.001, half=0.05), _item("F16", 270, 1e-6, 0.0, 1e-5)]

    assert recommend(unsure, Limits()).quantization == "F16"
    alone = recommend(unsure[:1], Limits())
    assert alone.quantization is None
    assert "nearest is Q4_K_M (+0.0010, interval [-0.0490, +0.0510])" in alone.reason


def test_too_few_examples_recommend_nothing_and_are_still_json() -> None:
    no_ends = Interval(-math.inf, math.inf, 0.0)
    few = dataclasses.replace(ITEMS[0], kl=no_ends, loss=no_ends, difference=no_ends)

    assert "of too few examples for an interval" in recommend([few], Limits()).reason
    assert few.to_dict()["perplexity"] == {"estimate": 1.0, "low": None, "high": None}


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("100MB", 10**8), ("1.5GiB", 1_610_612_736), ("700 kib", 716_800), ("12", 12), ("2G", 2e9)],
)
def test_a_size_is_read_with_its_suffix(text: str, size_bytes: int) -> None:
    assert make_limits(None, text) == Limits(None, int(size_bytes))


@pytest.mark.parametrize(
    ("max_kl", "max_size", "message"),
    [
        (0.0, "", r"--max_kl is 0, but must be > 0"),
        (float("nan"), "", r"--max_kl is nan, but must be > 0"),
        (None, "small", r"--max_size is 'small', but must be a size such as 100MB"),
        (None, "-5MB", r"--max_size is '-5MB'"),
        (None, "0", r"--max_size is '0'"),
        (None, "5 TB", r"--max_size is '5 TB'"),
    ],
)
def test_a_limit_that_is_none_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, max_kl: float | None, max_size: str, message: str
) -> None:
    sweep = read_sweep(trained_sweep(tmp_path_factory.getbasetemp()))

    with pytest.raises(ConfigError, match=message):
        make_plan(sweep, PromoteOptions(max_kl=max_kl, max_size=max_size))


def test_all_is_every_type_and_lets_the_recommended_one_be_first(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    sweep = read_sweep(trained_sweep(tmp_path_factory.getbasetemp()))
    plan = make_plan(sweep, PromoteOptions(quantization=["all"]))

    assert [item.name for item in plan.quantizations] == list(QUANTIZATIONS)
    assert plan.recommended_first
    named = make_plan(sweep, PromoteOptions(quantization=["Q8_0", "all"]))
    assert named.quantizations[0].name == "Q8_0"
    assert len(named.quantizations) == len(QUANTIZATIONS)
    assert not named.recommended_first


def test_bf16_is_as_large_as_f16_and_nearly_as_good(
    version: PromotionPaths, merged: Any, examples: Any, tmp_path: Path
) -> None:
    f16, bf16 = version.gguf("tiny", "F16"), tmp_path / "bf16.gguf"
    [item] = check_quantizations(["BF16"])
    quantize(f16, bf16, item)
    rows = examples.to_list()
    distances = Distances(make_reference(merged, rows))

    with open_gguf(bf16, num_ctx=128) as model:
        losses = model.example_losses(rows, distances.look)

    assert bf16.stat().st_size == pytest.approx(f16.stat().st_size, rel=1e-3)
    assert 0 < distances.divergences_N.mean() < 1e-2
    assert mean_loss(losses) == pytest.approx(
        mean_loss(example_losses(merged, examples, 4)), abs=item.tolerance
    )


def test_the_picture_has_a_point_for_each_type_and_marks_the_recommended_one(
    tmp_path: Path,
) -> None:
    recommendation = recommend(ITEMS, Limits())
    info = _get_points_info(ITEMS, recommendation)

    assert info.names == ["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
    assert info.divergences == [0.04, 0.08, 0.01, 0.005]
    assert info.recommended == [False, False, True, False]
    assert info.above == pytest.approx([0.004, 0.008, 0.001, 0.0005])
    assert write_picture(ITEMS, recommendation, tmp_path / "x.png") is None
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_no_browser_draws_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from choreographer.errors import ChromeNotFoundError

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ChromeNotFoundError

    monkeypatch.setattr("kaleido.write_fig_from_object_sync", refuse)

    problem = write_picture(ITEMS, recommend(ITEMS, Limits()), tmp_path / "x.png")

    assert problem is not None
    assert "needs a Chrome" in problem
    assert list(tmp_path.iterdir()) == []
