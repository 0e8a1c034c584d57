"""From a finished sweep to a released version, and what is refused on the way."""

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from deploy_sweep import promoted, tiny_config, trained_sweep
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy import build as build_module
from deploy import promote as promote_module
from deploy.gates import Gates, beats_base
from deploy.gguf_types import check_quantizations
from deploy.memory import count_parameters, full_precision_device
from deploy.merge import Merge
from deploy.preflight import check_ready
from deploy.promote import PromoteOptions, choose_trial, promote
from deploy.score import compare
from sweeps.ledger import read_sweep
from training.exceptions import ConfigError, GateError, ModelError, SweepError
from training.paths import PromotionPaths, SweepPaths, read_json, write_json

ROOT = Path(__file__).parent.parent


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


def _losses(loss_sums: list[float]) -> pd.DataFrame:
    ids = [str(n) for n in range(len(loss_sums))]
    return pd.DataFrame({"example_id": ids, "loss_sum": loss_sums, "num_tokens": 2})


def check_gate(tuned: pd.DataFrame, base: pd.DataFrame, base_name: str = "its base model") -> None:
    gate = beats_base("beats_base", compare(tuned, base), "the adapter", base_name)
    Gates().check(gate)


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

    options = PromoteOptions(quantization=["Q8_0"], merged_dtype="bfloat16")
    second = promote(sweep.root, options)

    assert second.root.name == "0002"
    assert sweep.current_promotion.read_text().strip() == "0002"
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sorted(path.name for path in second.root.glob("*.gguf")) == [
        "adapter.gguf",
        "tiny-llama-tiny-Q8_0.gguf",
    ]
    assert {path.name for path in sweep.promoted.iterdir()} <= {"0001", "0002", "current", ".lock"}
    weights = load_file(second.merged / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    rounded = read_json(second.verification)["merge"]["saved_as"]
    assert rounded["loss"] == pytest.approx(rounded["float32_loss"], abs=0.02)
    assert rounded["loss"] != rounded["float32_loss"]
    assert "| merged/ (bfloat16)" in second.card.read_text("utf-8")
    printed = capsys.readouterr().out
    assert "as scored before" in printed
    assert f"python -m deploy.chat {sweep.root}" in printed


def test_an_adapter_that_does_not_beat_its_base_is_refused(sweep: SweepPaths) -> None:
    losses = _losses([4.0, 2.0, 3.0, 5.0] * 2)
    worse = _losses([4.5, 1.5, 3.5, 5.0] * 2)

    with pytest.raises(
        GateError,
        match=r"its base model \(4-bit\) on 8 test examples: test loss differs by \+0\.0625",
    ):
        check_gate(worse, losses, base_name="its base model (4-bit)")


def test_a_gate_of_few_examples_is_as_strict_as_one_of_many() -> None:
    """The bootstrap's percentiles alone would let these pass."""
    base = _losses([4.0] * 8)
    better = _losses([4.05, 3.0, 4.1, 3.1, 4.05, 3.2, 3.7, 4.15])

    with pytest.raises(GateError, match="does not beat its base model on 8 test examples"):
        check_gate(better, base)


def test_too_few_examples_for_a_gate_are_said_to_be() -> None:
    with pytest.raises(GateError, match=r"has 7 examples, but must have at least 8 to tell"):
        check_gate(_losses([1.0] * 7), _losses([4.0] * 7))


def test_a_refused_promotion_leaves_no_version(sweep: SweepPaths) -> None:
    step = read_json(sweep.trial(0).result)["best_step"]
    weights = sweep.trial(0).adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(t) for name, t in load_file(weights).items()}, weights)

    with pytest.raises(GateError, match="does not beat its base model"):
        promote(sweep.root, PromoteOptions())

    assert [path.name for path in sweep.promoted.iterdir() if path.name != ".lock"] == []
    assert sweep.trial(0).test_losses(step).is_file()


def test_threads_are_told_not_to_spin_before_a_library_could_start_them() -> None:
    code = "import os, sys, deploy; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, expected in ({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"):
        done = subprocess.check_output(
            [sys.executable, "-c", code], cwd=ROOT, env={**clean, **given}, text=True
        )
        assert done.split() == [expected, "False"]


def test_a_changed_dataset_is_refused(sweep: SweepPaths) -> None:
    _change_result(sweep, test_hash="another")

    with pytest.raises(SweepError, match="the dataset has changed since the trial ran"):
        promote(sweep.root, PromoteOptions())


def test_a_trial_over_4_bit_ships_what_was_compared_with_its_own_base(
    sweep: SweepPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = read_json(sweep.trial(0).config)
    config["settings"]["load_in_4bit"] = True
    write_json(sweep.trial(0).config, config)
    # The tiny random base loses more to 4 bits than a trained one does.
    monkeypatch.setattr("deploy.verify.MERGED_TOLERANCE_4BIT", 5.0)

    paths = promote(sweep.root, PromoteOptions(quantization=["F16"]))

    loss = read_json(paths.verification)["losses"]["loss"]
    assert list(loss) == ["base", "base (4-bit)", "adapter (4-bit)", "merged", "F16"]
    assert abs(loss["base"] - loss["base (4-bit)"]) > 1e-3
    card, printed = paths.card.read_text("utf-8"), capsys.readouterr().out
    assert f"| test, base in 4 bits | {loss['base (4-bit)']:.4f} |" in card
    assert f"| test, as shipped | {loss['base']:.4f} | {loss['merged']:.4f} |" in card
    assert f"base (4-bit) {loss['base (4-bit)']:.4f}: " in printed
    assert re.search(rf"merged {loss['merged']:.4f}, base {loss['base']:.4f}: -\d+", printed)


def test_a_merge_onto_full_precision_that_does_not_beat_that_is_refused(
    sweep: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_json(sweep.trial(0).config)
    config["settings"]["load_in_4bit"] = True
    write_json(sweep.trial(0).config, config)
    merge = build_module.merge_adapter

    def merge_onto_a_good_base(*args: Any) -> Merge:
        done = merge(*args)
        assert done.base is not None
        return dataclasses.replace(done, base=done.base.assign(loss_sum=0.0))

    monkeypatch.setattr(build_module, "merge_adapter", merge_onto_a_good_base)

    with pytest.raises(GateError, match="the merged model does not beat its full-precision base"):
        promote(sweep.root, PromoteOptions(quantization=["F16"]))


def test_trials_of_different_validation_sets_are_not_ranked(sweep: SweepPaths) -> None:
    other = sweep.trial(1)
    shutil.copytree(sweep.trial(0).root, other.root)
    write_json(other.config, {**read_json(other.config), "number": 1})
    write_json(other.result, {**read_json(other.result), "validation_hash": "other"})

    with pytest.raises(SweepError, match=r"on 2 different validation sets, .* with --trial N"):
        choose_trial(read_sweep(sweep.root))

    assert choose_trial(read_sweep(sweep.root), 1).number == 1


def test_what_a_killed_promotion_left_counts_as_free(
    sweep: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free=50_000_000))
    config = read_sweep(sweep.root).trial(0).config
    left = sweep.promotion_draft / "merged" / "model.safetensors"
    left.parent.mkdir(parents=True)
    with open(left, "wb") as file:
        file.truncate(300_000_000)

    check_ready(config, check_quantizations(["Q4_K_M"]), sweep)
    left.unlink()
    with pytest.raises(SweepError, match="free space is"):
        check_ready(config, check_quantizations(["Q4_K_M"]), sweep)


def test_too_little_memory_is_found_before_anything_starts(
    sweep: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory(NamedTuple):
        available: int

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(available=500_000_000))

    with pytest.raises(ModelError, match=r"free memory is 0\.5 GB, but must be at least 1\.1 GB"):
        promote(sweep.root, PromoteOptions())

    assert not sweep.promoted.exists()


def test_the_cpu_merges_what_the_gpu_has_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.memory.find_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (10_000_000_000, 24_000_000_000))

    assert full_precision_device(1_000_000_000).type == "cuda"
    assert full_precision_device(3_000_000_000).type == "cpu"


def test_a_base_model_that_cannot_be_had_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path_factory.getbasetemp())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr("deploy.memory.AutoConfig.from_pretrained", refuse)

    with pytest.raises(ModelError, match=r"tiny-llama: You are trying to access a gated repo\.$"):
        count_parameters(config)


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
