"""The files of one promoted version: merge -> f16 GGUF -> quantise -> verify -> card, Modelfile, manifest.

`build_version` fills a directory and prints what it measured; `promote.py` decides what is built and
publishes it.
"""

import contextlib
import dataclasses
import gc
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoConfig

from deploy.adapter_gguf import export_adapter, verify_adapter
from deploy.card import (
    CardFacts,
    fallback_note,
    files_table,
    losses_table,
    measured_table,
    write_card,
)
from deploy.export_gguf import export_gguf
from deploy.gates import Gates, beats_base
from deploy.gguf_types import UNQUANTIZED, Quantization
from deploy.imatrix import Importance, for_gguf, importance
from deploy.manifest import provenance, write_manifest
from deploy.measure import (
    CONFIDENCE,
    MARGIN,
    Distances,
    Limits,
    MeasuredTypes,
    Measurement,
    Reference,
    make_reference,
    measure,
    measure_speed,
    recommend,
)
from deploy.measure_figure import write_picture
from deploy.memory import count_parameters, full_precision_device
from deploy.merge import Merge, full_precision_losses, load_merged, merge_adapter
from deploy.modelfile import write_modelfile
from deploy.quantize import quantize_best
from deploy.score import Comparison, TestScore, compare
from deploy.shards import cast_model
from deploy.verify import (
    ADAPTER,
    ADAPTER_4BIT,
    BASE,
    BASE_4BIT,
    MERGED,
    MERGED_TOLERANCE,
    check_losses,
    verify_gguf,
)
from sweeps.ledger import SweepRecord, TrialRecord
from training.config import DEMO, TrialConfig
from training.evaluate import example_losses, mean_loss
from training.exceptions import GateError
from training.model import DEMO_MODEL_ID, end_token_ids, find_device
from training.paths import PromotionPaths, write_json, write_text

FLOAT32 = "float32"
NUM_CHOICE_EXAMPLES = 48
"""Validation examples that choose between a file with importance matrix and one without."""


@dataclass(frozen=True)
class Plan:
    """One promotion, decided and checked."""

    sweep: SweepRecord
    trial: TrialRecord
    name: str
    quantizations: Sequence[Quantization]
    num_verify_examples: int
    limits: Limits = field(default_factory=Limits)
    recommended_first: bool = False
    """The recommended type is the one for chat, whatever the order of `quantizations`."""
    adapter_gguf: bool = True
    merged_dtype: str = FLOAT32
    """In which merged/ is published; everything else is made of it in float32."""


@dataclass(frozen=True)
class Evidence:
    """What the gate let through."""

    tokenizer: Any
    train: Dataset
    validation: Dataset
    test: Dataset
    counts: Mapping[str, int]
    """Examples in each split."""
    score: TestScore
    gate: Comparison
    """Adapter and base on the test split, as they were trained."""
    gates: Gates


@dataclass
class StageTimes:
    """Seconds by stage, printed as each ends."""

    times_s: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"  {name:<18}", end="", flush=True)
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            print("failed", flush=True)
            raise
        self.times_s[name] = round(time.perf_counter() - start, 2)
        print(f"{self.times_s[name]:8.1f} s", flush=True)


def build_version(plan: Plan, evidence: Evidence, draft: PromotionPaths, times: StageTimes) -> None:
    """Writes every file of the version into the draft.

    Raises:
        GateError: the merged model does not beat its base, or a verification failed.
        ModelError: llama.cpp's converter, quantiser or runtime failed.
    """
    config = plan.trial.config
    examples = evidence.test.select(range(min(plan.num_verify_examples, len(evidence.test))))
    # The whole split where it decides whether what ships is better than its base.
    scored = evidence.test if config.load_in_4bit else examples
    with times.stage("merge"):
        device = full_precision_device(count_parameters(config), config.load_in_4bit)
        shutil.copytree(plan.trial.paths.adapter, draft.adapter)
        merge = merge_adapter(
            config,
            draft.adapter,
            draft.merged,
            examples["input_ids"],
            scored,
            device,
            evidence.validation,
        )
    with times.stage("merged score"):
        if device.type == "cpu" and find_device().type != "cpu":
            print("(on the CPU: too large for the GPU in float32)", end="", flush=True)
        model = load_merged(draft.merged, device, config.trust_remote_code)
        merged = example_losses(model, scored, config.per_device_eval_batch_size)
    with times.stage("reference"):
        reference = make_reference(model, examples.to_list())
    found: Importance = {}
    if any(item.gains_from_imatrix for item in plan.quantizations):
        with times.stage("importance matrix"):
            calibration = evidence.train.select(range(min(2000, len(evidence.train))))
            found = importance(model, calibration.to_list())
    del model
    gc.collect()  # it is in reference cycles, and llama.cpp needs its room
    if device.type == "cuda":
        torch.cuda.empty_cache()
    shipped = None
    if merge.base is not None:
        shipped = compare(merged, merge.base)
        names = ("the merged model", "its full-precision base")
        evidence.gates.check(beats_base("merged_beats_base", shipped, *names))
        print(f"    merged {shipped.tuned:.4f}, base {shipped.base:.4f}: {shipped}")
    f16 = draft.gguf(plan.name, UNQUANTIZED)
    with times.stage("GGUF (f16)"):
        export_gguf(draft.merged, f16, plan.name)
    weights = for_gguf(found, f16) if found else None
    choices = {}
    for item in plan.quantizations:
        if item.name != UNQUANTIZED:
            with times.stage(f"quantise {item.name}"):
                outfile = draft.gguf(plan.name, item.name)
                choices[item.name] = quantize_best(
                    f16, outfile, item, weights, evidence.validation.to_list()[:NUM_CHOICE_EXAMPLES]
                )
    with times.stage("verify"):
        losses = _transformers_losses(evidence, merge, merged, examples["example_id"])
        verified, distances = _verify(plan, evidence, draft, examples, losses, reference)
    if plan.adapter_gguf:
        with times.stage("adapter GGUF"):
            export_adapter(draft.adapter, draft.merged, draft.adapter_gguf)
            own_base = losses[BASE]
            if merge.dequantised_base is not None:
                own_base = _select(merge.dequantised_base, examples["example_id"])
            elif device.type != "cpu" and merge.base is None:
                # What trained on a GPU was scored in bfloat16, whose noise is that of a small gain.
                own_base = full_precision_losses(config, examples, device)
            verified["adapter_gguf"] = verify_adapter(
                draft.adapter_gguf, f16, examples.to_list(), losses[MERGED], own_base
            )
    if plan.merged_dtype != FLOAT32:
        with times.stage(f"merged {plan.merged_dtype}"):
            merge.record["saved_as"] = _round_merged(plan, draft, examples, losses[MERGED], device)
    measured = _measure(plan, draft, examples, distances, times)
    verification = {
        **evidence.gates.record(),
        "merge": merge.record,
        "importance_matrix": choices,
        **verified,
        "quantization": _quantization_record(plan, distances, measured),
    }
    write_json(draft.verification, verification)
    names = [item.name for item in plan.quantizations]
    if plan.recommended_first and measured.recommendation.quantization is not None:
        names = list(dict.fromkeys([measured.recommendation.quantization, *names]))
    kept = {name: draft.gguf(plan.name, name) for name in names}
    if UNQUANTIZED not in kept:
        f16.unlink()
    ends = sorted(end_token_ids(evidence.tokenizer, str(draft.merged)))
    stop = evidence.tokenizer.convert_ids_to_tokens(ends)
    first = next(iter(kept.values())).name
    write_text(draft.modelfile, write_modelfile(first, evidence.tokenizer, stop))
    facts = _card_facts(
        plan, evidence, draft, kept, verification["losses"], shipped, measured, merge.record
    )
    write_text(draft.card, write_card(facts))
    write_manifest(draft, _manifest_facts(plan, evidence, kept, times))
    _print_tables(facts)


def base_name(config: TrialConfig) -> tuple[str, bool]:
    """The base model's hub id (True) or its directory's name (False)."""
    if config.model_name_or_path == DEMO:
        return DEMO_MODEL_ID, True
    path = Path(config.model_name_or_path).expanduser()
    return (path.resolve().name, False) if path.is_dir() else (config.model_name_or_path, True)


def _transformers_losses(
    evidence: Evidence, merge: Merge, merged: pd.DataFrame, example_ids: Sequence[str]
) -> dict[str, pd.DataFrame]:
    if merge.base is None:
        losses = {BASE: evidence.score.base, ADAPTER: evidence.score.adapter}
    else:
        losses = {
            BASE: merge.base,
            BASE_4BIT: evidence.score.base,
            ADAPTER_4BIT: evidence.score.adapter,
        }
    losses[MERGED] = merged
    return {name: _select(frame, example_ids) for name, frame in losses.items()}


def _round_merged(
    plan: Plan, draft: PromotionPaths, examples: Dataset, exact: pd.DataFrame, device: torch.device
) -> dict[str, Any]:
    """Rounds merged/ to the type asked for, and compares its test loss with that of before.

    Raises:
        GateError: it lost more than rounding may.
    """
    config = plan.trial.config
    cast_model(draft.merged, getattr(torch, plan.merged_dtype))
    model = load_merged(draft.merged, device, config.trust_remote_code)
    loss = mean_loss(example_losses(model, examples, config.per_device_eval_batch_size))
    expected = mean_loss(exact)
    if not abs(loss - expected) <= MERGED_TOLERANCE:
        raise GateError(
            f"merged/ in {plan.merged_dtype}: test loss is {loss:.4f}, but must be within "
            f"{MERGED_TOLERANCE} of the float32 model's {expected:.4f}"
        )
    record = {"dtype": plan.merged_dtype, "loss": loss, "float32_loss": expected}
    return {**record, "tolerance": MERGED_TOLERANCE}


def _verify(
    plan: Plan,
    evidence: Evidence,
    draft: PromotionPaths,
    examples: Dataset,
    losses: dict[str, pd.DataFrame],
    reference: Reference,
) -> tuple[dict[str, Any], dict[str, Measurement]]:
    records, measured = {}, {}
    rest = [item.name for item in plan.quantizations if item.name != UNQUANTIZED]
    for name in (UNQUANTIZED, *rest):
        path = draft.gguf(plan.name, name)
        distances = Distances(reference)
        records[name], losses[name] = verify_gguf(
            path, evidence.tokenizer, examples.to_list(), distances.look
        )
        measured[name] = measure(
            path,
            name,
            records[name]["num_params"],
            distances,
            losses[name],
            losses[MERGED],
            len(plan.quantizations),
        )
    forced = bool(evidence.gates.failed)
    return {"losses": check_losses(losses, forced=forced), "ggufs": records}, measured


def _measure(
    plan: Plan,
    draft: PromotionPaths,
    examples: Dataset,
    distances: Mapping[str, Measurement],
    times: StageTimes,
) -> MeasuredTypes:
    """The kept types with their speed, what to take of them, and a picture of more than one."""
    longest = max(examples.to_list(), key=lambda example: len(example["input_ids"]))
    with times.stage("speed"):
        items = [
            dataclasses.replace(
                distances[item.name],
                speed=measure_speed(draft.gguf(plan.name, item.name), longest),
            )
            for item in plan.quantizations
        ]
    measured = MeasuredTypes(items, recommend(items, plan.limits), items[0].num_positions)
    if len(items) == 1:
        return measured
    problem = None
    with times.stage("picture"):
        problem = write_picture(items, measured.recommendation, draft.quantization_picture)
    if problem is not None:
        print(f"    {problem}")
        return measured
    return dataclasses.replace(measured, picture=draft.quantization_picture.name)


def _quantization_record(
    plan: Plan, distances: Mapping[str, Measurement], measured: MeasuredTypes
) -> dict[str, Any]:
    # The f16 file is compared even where it is not kept: all others are made from it.
    types = dict(distances) | {item.quantization: item for item in measured.items}
    return {
        "num_positions": measured.num_positions,
        "confidence": CONFIDENCE,
        "loss_margin": MARGIN,
        **dataclasses.asdict(plan.limits),
        "types": {name: item.to_dict() for name, item in types.items()},
        "recommended": measured.recommendation.quantization,
        "reason": measured.recommendation.reason,
    }


def _select(losses: pd.DataFrame, example_ids: Sequence[str]) -> pd.DataFrame:
    return losses.set_index("example_id").loc[list(example_ids)].reset_index()


def _card_facts(
    plan: Plan,
    evidence: Evidence,
    draft: PromotionPaths,
    kept: Mapping[str, Path],
    losses: Mapping[str, Any],
    shipped: Comparison | None,
    measured: MeasuredTypes,
    merge_record: Mapping[str, Any],
) -> CardFacts:
    base_model, is_hub_id = base_name(plan.trial.config)
    adapter = draft.adapter_gguf
    architecture = AutoConfig.from_pretrained(
        draft.merged, trust_remote_code=plan.trial.config.trust_remote_code
    )
    alone = (adapter.name, adapter.stat().st_size) if plan.adapter_gguf else None
    return CardFacts(
        name=plan.name,
        base_model=base_model,
        base_is_hub_id=is_hub_id,
        sweep=plan.sweep,
        trial=plan.trial,
        scored=evidence.gate,
        shipped=shipped,
        hidden_size=architecture.get_text_config().hidden_size,
        merged_dtype=plan.merged_dtype,
        merged_size_bytes=sum(path.stat().st_size for path in draft.merged.glob("*.safetensors")),
        gguf_files={name: (path.name, path.stat().st_size) for name, path in kept.items()},
        losses=losses,
        measured=measured,
        counts=evidence.counts,
        merged_onto=str(merge_record["base"]).split(",")[0],
        adapter_gguf=alone,
        failed_gates=evidence.gates.failed,
    )


def _manifest_facts(
    plan: Plan, evidence: Evidence, kept: Mapping[str, Path], times: StageTimes
) -> dict[str, Any]:
    return {
        "name": plan.name,
        "sweep": plan.sweep.name,
        "trial": plan.trial.number,
        "step": plan.trial.result["best_step"],
        "test_loss": evidence.gate.tuned,
        "forced": bool(evidence.gates.failed),
        "failed_gates": evidence.gates.failed,
        "base_model": base_name(plan.trial.config)[0],
        "base_is_hub_id": base_name(plan.trial.config)[1],
        **provenance(plan.sweep, plan.trial),
        "settings": plan.trial.settings,
        "ggufs": {name: path.name for name, path in kept.items()},
        "stage_times_s": times.times_s,
    }


def _print_tables(facts: CardFacts) -> None:
    for table in (
        files_table(
            facts.gguf_files, facts.merged_size_bytes, facts.merged_dtype, facts.adapter_gguf
        ),
        losses_table(facts.losses),
        measured_table(facts.measured.items),
    ):
        print("\n" + table.to_string(index=False))
    note = fallback_note(facts.hidden_size, facts.gguf_files)
    if note:
        print(f"\n{note}")
    print(f"\n{facts.measured.recommendation}")
