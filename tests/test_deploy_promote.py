"""From a finished sweep to a released version, and what is refused on the way."""

import hashlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from deploy_sweep import promoted, tiny_config, trained_sweep
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy import promote as promote_module
from deploy.promote import PromoteOptions, check_gate, choose_trial, promote
from deploy.score import TestScore
from sweeps.ledger import read_sweep
from training.exceptions import ConfigError, GateError, ModelError, SweepError
from training.paths import PromotionPaths, SweepPaths, read_json, write_json


@pytest.fixture
def version(tmp_path_factory: pytest.TempPathFactory) -> PromotionPaths:
    """The promoted version, shared: not to be changed."""
    return promoted(tmp_path_factory.getbasetemp())


@pytest.fixture
def sweep(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> SweepPaths:
    """A copy of the trained sweep, not scored on the test split and without promotions."""
    paths = SweepPaths(tmp_path / "tiny")
    source = trained_sweep(tmp_path_factory.getbasetemp())
    shutil.copytree(source, paths.root, ignore=shutil.ignore_patterns("promoted", "test"))
    result = read_json(paths.trial(0).result)
    scores = ("test/loss", "base_test/loss")
    write_json(paths.trial(0).result, {name: result[name] for name in result if name not in scores})
    return paths


def _change_result(sweep: SweepPaths, **values: Any) -> None:
    result = {**read_json(sweep.trial(0).result), **values}
    write_json(sweep.trial(0).result, result)


def test_a_promotion_holds_every_file_and_its_hash(version: PromotionPaths) -> None:
    manifest = read_json(version.manifest)

    expected = {"Modelfile", "README.md", "verification.json", "merged/model.safetensors"}
    expected |= {"adapter/adapter_model.safetensors", "tiny-Q4_K_M.gguf", "tiny-F16.gguf"}
    assert expected <= manifest["files"].keys()
    for name, described in manifest["files"].items():
        content = (version.root / name).read_bytes()
        assert described["sha256"] == hashlib.sha256(content).hexdigest(), name
        assert described["size_bytes"] == len(content)
    written = {path.name for path in version.root.iterdir()}
    assert written == {name.split("/")[0] for name in manifest["files"]} | {"manifest.json"}
    assert manifest["trial"] == 0


def test_the_test_score_joins_the_trials_result_with_its_examples(version: PromotionPaths) -> None:
    trial = SweepPaths(version.root.parent.parent).trial(0)
    result = read_json(trial.result)

    for step, name in ((result["best_step"], "test/loss"), (0, "base_test/loss")):
        losses = pd.read_parquet(trial.test_losses(step))
        assert list(losses.columns) == ["example_id", "loss_sum", "num_tokens"]
        mean = losses["loss_sum"].sum() / losses["num_tokens"].sum()
        assert result[name] == pytest.approx(mean)
    assert result["test/loss"] < 1 < result["base_test/loss"]


def test_the_verification_puts_all_five_models_side_by_side(version: PromotionPaths) -> None:
    record = read_json(version.verification)

    loss = record["losses"]["loss"]
    assert list(loss) == ["base", "adapter", "merged", "F16", "Q4_K_M"]
    assert loss["adapter"] == pytest.approx(loss["merged"], abs=1e-4)
    assert loss["F16"] == pytest.approx(loss["merged"], abs=1e-3)
    assert loss["Q4_K_M"] == pytest.approx(loss["merged"], abs=0.1)
    assert loss["base"] > 10
    assert record["merge"]["kl_divergence"] < 1e-6
    for gguf in record["ggufs"].values():
        assert gguf["answers"]["num_ended"] == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT 0.21 with Transformers 5.23.
def test_the_promoted_adapter_and_merged_model_load_in_plain_libraries(
    version: PromotionPaths, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tiny_config(tmp_path_factory.getbasetemp()).model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(version.merged)
    ids = torch.tensor([tokenizer("Is 7 even?")["input_ids"]])
    merged = AutoModelForCausalLM.from_pretrained(version.merged)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(version.adapter)
    )

    with torch.inference_mode():
        difference = (merged(ids).logits - adapted(input_ids=ids).logits).abs().max()

    assert merged.dtype == torch.float32
    assert difference < 1e-3


def test_real_k_quants_are_used_where_the_hidden_size_allows(version: PromotionPaths) -> None:
    sizes = {path.name: path.stat().st_size for path in version.root.glob("*.gguf")}

    assert sizes["tiny-Q4_K_M.gguf"] < 0.5 * sizes["tiny-F16.gguf"]


def test_promoting_again_makes_the_next_version_without_scoring_again(
    version: PromotionPaths,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = SweepPaths(tmp_path / "tiny")
    shutil.copytree(version.root.parent.parent, sweep.root)
    first = sweep.promotion(1)
    before = {path: path.read_bytes() for path in first.root.rglob("*") if path.is_file()}
    monkeypatch.setattr("deploy.score._score", None)  # A second scoring would fail.

    second = promote(sweep.root, PromoteOptions(quantization=["Q8_0"]))

    assert second.root.name == "0002"
    assert sweep.current_promotion.read_text().strip() == "0002"
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [path.name for path in second.root.glob("*.gguf")] == ["tiny-llama-tiny-Q8_0.gguf"]
    assert {path.name for path in sweep.promoted.iterdir()} <= {"0001", "0002", "current", ".lock"}
    printed = capsys.readouterr().out
    assert "as scored before" in printed
    assert f"python -m deploy.chat {sweep.root}" in printed


def test_an_adapter_that_does_not_beat_its_base_is_refused(sweep: SweepPaths) -> None:
    losses = pd.DataFrame(
        {"example_id": list("abcd"), "loss_sum": [4.0, 2.0, 3.0, 5.0], "num_tokens": [2, 2, 2, 2]}
    )
    worse = losses.assign(loss_sum=[4.5, 1.5, 3.5, 5.0])

    with pytest.raises(GateError, match=r"4 test examples: test loss differs by \+0\.0625"):
        check_gate(TestScore(worse, losses, False))


def test_a_refused_promotion_leaves_no_version(sweep: SweepPaths) -> None:
    step = read_json(sweep.trial(0).result)["best_step"]
    weights = sweep.trial(0).adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(t) for name, t in load_file(weights).items()}, weights)

    with pytest.raises(GateError, match="does not beat its base model"):
        promote(sweep.root, PromoteOptions())

    assert [path.name for path in sweep.promoted.iterdir() if path.name != ".lock"] == []
    assert sweep.trial(0).test_losses(step).is_file()


def test_a_changed_dataset_is_refused(sweep: SweepPaths) -> None:
    _change_result(sweep, test_hash="another")

    with pytest.raises(SweepError, match="the dataset has changed since the trial ran"):
        promote(sweep.root, PromoteOptions())


def test_a_full_disk_is_found_before_anything_starts(
    sweep: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free=50_000_000))

    with pytest.raises(SweepError, match=r"free space is 0\.1 GB, but must be at least 0\.2 GB"):
        promote(sweep.root, PromoteOptions())

    assert not sweep.promoted.exists()
    assert "test/loss" not in read_json(sweep.trial(0).result)


def test_a_missing_converter_is_found_before_anything_starts(
    sweep: SweepPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "empty"))

    with pytest.raises(ModelError, match="`make setup` puts it there"):
        promote(sweep.root, PromoteOptions())

    assert not sweep.promoted.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": ["Q4_K"]}, r"--quantization is Q4_K, .*did you mean 'Q4_K_M'\?"),
        ({"quantization": []}, "--quantization is empty"),
        ({"output_name": "../x"}, "--output_name is '../x'"),
        ({"trial": -2}, "--trial is -2"),
        ({"num_verify_examples": 0}, "--num_verify_examples is 0"),
    ],
)
def test_a_wrong_option_is_named(sweep: SweepPaths, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        promote(sweep.root, PromoteOptions(**options))


def test_a_trial_that_is_not_there_or_not_complete_is_named(sweep: SweepPaths) -> None:
    with pytest.raises(SweepError, match="trial 7 is not there"):
        choose_trial(read_sweep(sweep.root), 7)

    _change_result(sweep, state="pruned")
    with pytest.raises(SweepError, match="the trial is pruned, but must be complete"):
        choose_trial(read_sweep(sweep.root), 0)
    with pytest.raises(SweepError, match="no trial has finished"):
        choose_trial(read_sweep(sweep.root))


def test_a_trial_without_an_adapter_is_named(sweep: SweepPaths) -> None:
    shutil.rmtree(sweep.trial(0).adapter)

    with pytest.raises(SweepError, match="no adapter is there"):
        choose_trial(read_sweep(sweep.root))


def test_a_copied_trial_stands_for_the_one_that_was_trained(sweep: SweepPaths) -> None:
    copy = sweep.trial(1)
    write_json(copy.config, {**read_json(sweep.trial(0).config), "number": 1})
    write_json(copy.result, {**read_json(sweep.trial(0).result), "same_as": 0})

    assert choose_trial(read_sweep(sweep.root), 1).number == 0


def test_two_promotions_of_one_sweep_do_not_run_at_once(sweep: SweepPaths) -> None:
    with (
        promote_module._draft(sweep),
        pytest.raises(SweepError, match="another promotion is running"),
    ):
        promote(sweep.root, PromoteOptions())
