"""The best trial of a sweep -> a released model directory, `promoted/0001/`.

Checks (runtime, converter, disk) -> gates, with the test score -> merge -> f16 GGUF -> quantise -> verify ->
card, Modelfile, manifest. Everything is made in a draft directory and renamed at the end, so a version
is whole or not there, and is never changed afterwards (`deploy.registry`).
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deploy.gguf_types import ALL, DEFAULT_QUANTIZATION, QUANTIZATIONS, check_quantizations
from deploy.registry import current_number, publish, registry_lock
from sweeps.ledger import SweepRecord, TrialRecord, read_sweep
from training.cli import make_parser, parse, run_command
from training.exceptions import ConfigError, SweepError
from training.paths import PromotionPaths, SweepPaths

if TYPE_CHECKING:  # what loads PyTorch waits until the options and the sweep are known to be right
    from deploy.build import Evidence, Plan, StageTimes

BEST = -1
MAX_OVERFITTING = 0.5
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class PromoteOptions:
    """Options of `python -m deploy.promote`."""

    trial: int = field(
        default=BEST, metadata={"help": "Number of the trial; -1 is the best by eval/loss."}
    )
    quantization: list[str] = field(
        default_factory=lambda: [DEFAULT_QUANTIZATION],
        metadata={
            "help": f"GGUF types, the one for chat first: {', '.join(QUANTIZATIONS)}; or {ALL}, with "
            "the recommended one first."
        },
    )
    max_kl: float | None = field(
        default=None,
        metadata={
            "help": "Recommend the smallest type whose KL divergence from the merged model is at most "
            "this (nats a token), not the smallest that is not measurably worse."
        },
    )
    max_size: str = field(
        default="",
        metadata={"help": "Recommend a type of at most this size: 100MB, 1.5GiB, or bytes."},
    )
    output_name: str = field(
        default="", metadata={"help": "Name of the model and its files; empty is MODEL-SWEEP."}
    )
    num_verify_examples: int = field(
        default=64, metadata={"help": "Most test examples on which all forms are compared."}
    )
    adapter_gguf: bool = field(
        default=True,
        metadata={"help": "Also write the adapter alone, for llama.cpp's --lora over the base."},
    )
    merged_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Type of the weights in merged/; the GGUFs are made of float32 always."},
    )
    max_overfitting: float = field(
        default=MAX_OVERFITTING,
        metadata={
            "help": "Most of what was gained on training examples that may be missing on test examples, "
            "as a share."
        },
    )
    force: bool = field(
        default=False,
        metadata={"help": "Promote a trial that fails gates; manifest and card say which."},
    )


def main() -> None:
    parser = make_parser("deploy.promote", __doc__ or "", [PromoteOptions])
    parser.add_argument("sweep", help="the sweep's directory, runs/NAME")
    options, positional = parse(parser)
    promote(Path(positional.sweep), options)


def promote(sweep_dir: Path, options: PromoteOptions) -> PromotionPaths:
    """Promotes one trial and makes it the sweep's current version.

    Raises:
        SweepError: there is nothing to promote, or no room.
        ConfigError: an option is wrong.
        ModelError: the runtime or the converter is missing, or fails.
        GateError: a gate is not met, or a verification failed.
    """
    plan = make_plan(read_sweep(sweep_dir), options)
    from transformers.utils import logging

    from deploy.build import StageTimes, build_version
    from deploy.preflight import check_ready

    # Bars for files that are read in a second would tear the table of stages.
    logging.disable_progress_bar()
    trial, times = plan.trial, StageTimes()
    check_ready(trial.config, plan.quantizations, plan.sweep.paths)
    print(f"promoting trial {trial.number} ({trial.name}) at step {trial.result['best_step']}")
    with _draft(plan.sweep.paths) as draft:
        evidence = _pass_gates(plan, options, times)
        build_version(plan, evidence, draft, times)
        paths = publish(plan.sweep.paths, draft)
    print(f"\n{paths.root}")
    print(f'talk to it: python -m deploy.chat {plan.sweep.paths.root} --prompt "..."')
    return paths


def make_plan(sweep: SweepRecord, options: PromoteOptions) -> Plan:
    """Raises ConfigError or SweepError for what cannot be promoted as asked."""
    quantizations = check_quantizations(options.quantization)
    if options.num_verify_examples < 1:
        raise ConfigError(
            f"--num_verify_examples is {options.num_verify_examples}, but must be >= 1"
        )
    if not options.max_overfitting >= 0:
        raise ConfigError(f"--max_overfitting is {options.max_overfitting}, but must be >= 0")
    trial = choose_trial(sweep, options.trial, options.force)
    from deploy.build import Plan, base_name
    from deploy.measure import make_limits

    limits = make_limits(options.max_kl, options.max_size)
    name = options.output_name or f"{base_name(trial.config)[0].split('/')[-1]}-{sweep.name}"
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(f"--output_name is {name!r}, but must be letters, digits, '.', '_', '-'")
    return Plan(
        sweep,
        trial,
        name,
        quantizations,
        options.num_verify_examples,
        limits,
        recommended_first=options.quantization == [ALL],
        adapter_gguf=options.adapter_gguf,
        merged_dtype=options.merged_dtype,
    )


def choose_trial(sweep: SweepRecord, number: int = BEST, force: bool = False) -> TrialRecord:
    """The trial of that number, or the best one; a copy stands for the trial that was trained.

    Raises:
        SweepError: none has finished, they cannot be ranked, this one has not finished (forced: has no
            result), or it has no adapter.
    """
    if number < BEST:
        raise ConfigError(f"--trial is {number}, but must be a trial's number, or {BEST}")
    trial = _best_trial(sweep) if number == BEST else sweep.trial(number)
    trial = sweep.original(trial)
    if trial.state != "complete" and not (force and trial.result.get("best_step")):
        raise SweepError(f"{trial.paths.root}: the trial is {trial.state}, but must be complete")
    if not (trial.paths.adapter / "adapter_config.json").is_file():
        raise SweepError(f"{trial.paths.adapter}: no adapter is there, so nothing to promote")
    return trial


def _best_trial(sweep: SweepRecord) -> TrialRecord:
    scored = [trial for trial in sweep.finished if trial.loss is not None]
    num_sets = len({trial.result.get("validation_hash") for trial in scored})
    if num_sets > 1:
        raise SweepError(
            f"{sweep.paths.root}: the trials were scored on {num_sets} different validation sets, so "
            "none of them is the best one; choose one with --trial N --force"
        )
    return sweep.best()


def _pass_gates(plan: Plan, options: PromoteOptions, times: StageTimes) -> Evidence:
    from deploy.build import Evidence
    from deploy.gates import Gates, beats_base, not_overfitted, sweep_gates
    from deploy.score import compare, load_held_out, score_on_test
    from deploy.verify import BASE, BASE_4BIT
    from training.model import load_tokenizer

    trial, gates = plan.trial, Gates(options.force)
    for gate in sweep_gates(plan.sweep, trial):
        gates.check(gate)
    tokenizer = load_tokenizer(trial.config)
    with times.stage("test score"):
        splits = load_held_out(trial, tokenizer)
        score = score_on_test(trial, splits)
    is_4bit = trial.config.load_in_4bit
    scored = compare(score.adapter, score.base)
    name = "its base model" + (" (4-bit)" if is_4bit else "")
    gates.check(beats_base("beats_base", scored, "the adapter", name))
    overfitting = not_overfitted(score, options.max_overfitting)
    gates.check(overfitting)
    print(
        f"    test loss {scored.tuned:.4f}, {BASE_4BIT if is_4bit else BASE} {scored.base:.4f}: {scored} "
        f"over {scored.num_examples} examples, {overfitting.value['overfitting']:.0%} overfitting"
        + (", as scored before" if score.scored_before else "")
    )
    return Evidence(
        tokenizer,
        splits.train,
        splits.validation,
        splits.test,
        splits.counts,
        score,
        scored,
        gates,
    )


@contextlib.contextmanager
def _draft(paths: SweepPaths) -> Iterator[PromotionPaths]:
    """An empty directory to build in; gone afterwards. One promotion at a time."""
    with registry_lock(paths):
        current_number(paths)  # before the work: what it cannot be added to would lose it
        draft = PromotionPaths(paths.promotion_draft)
        # A killed promotion leaves its draft behind.
        shutil.rmtree(draft.root, ignore_errors=True)
        draft.root.mkdir()
        try:
            yield draft
        finally:
            shutil.rmtree(draft.root, ignore_errors=True)


if __name__ == "__main__":
    run_command(main)
