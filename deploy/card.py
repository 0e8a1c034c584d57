"""The model card: README.md of a promoted version, with everything a reader needs to judge and use it.

`write_card(facts)` is text in, text out; `promote.py` gathers the facts. The front matter is Hugging Face's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pandas as pd
import yaml

from analysis.stats import Interval
from deploy.gguf_types import QUANTIZATIONS, UNQUANTIZED
from deploy.measure import CONFIDENCE, MARGIN, MeasuredTypes, Measurement
from deploy.publication import MERGED_USE
from deploy.score import Comparison
from deploy.verify import ADAPTER_4BIT, BASE, BASE_4BIT, MERGED
from sweeps.ledger import SweepRecord, TrialRecord

SUPER_BLOCK = 256
"""Row length that K-quants and i-quants need to divide by."""
DATA_SETTINGS = ("dataset_name", "max_length", "validation_fraction", "test_fraction")


@dataclass(frozen=True)
class CardFacts:
    """What the card tells."""

    name: str
    base_model: str
    """Hub id, or the local directory's name."""
    base_is_hub_id: bool
    sweep: SweepRecord
    trial: TrialRecord
    scored: Comparison
    """The trial on the test split, as it was trained."""
    shipped: Comparison | None
    """The merged model and the full-precision base on it, of a trial over a 4-bit base."""
    hidden_size: int
    merged_size_bytes: int
    merged_dtype: str
    """In which merged/ is; it was merged, and all else was made, in float32."""
    gguf_files: Mapping[str, tuple[str, int]]
    """File name and size in bytes by quantisation, the preferred one first."""
    losses: Mapping[str, Any]
    """What `check_losses` returned."""
    measured: MeasuredTypes
    counts: Mapping[str, int]
    """Examples in each split."""
    merged_onto: str
    """Which base's weights the merged model has, of a trial over a 4-bit one."""
    adapter_gguf: tuple[str, int] | None = None
    """File name and size in bytes of the adapter alone."""
    failed_gates: Sequence[str] = ()
    """What the model was promoted in spite of."""


def write_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    sections = [
        _front_matter(facts),
        f"# {facts.name}",
        _warning(facts.failed_gates),
        _introduction(facts),
        "## Losses",
        _losses(facts),
        "## Files",
        _markdown(
            files_table(
                facts.gguf_files, facts.merged_size_bytes, facts.merged_dtype, facts.adapter_gguf
            )
        ),
        fallback_note(facts.hidden_size, facts.gguf_files),
        "## Quantisation",
        _quantization(facts.measured, facts.losses["num_examples"]),
        "## Use",
        _usage(facts),
        "## Data",
        _data(facts),
        "## Settings",
        _settings(facts.trial),
        f"## The sweep `{facts.sweep.name}`",
        _markdown(sweep_table(facts.sweep, facts.trial)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def files_table(
    gguf_files: Mapping[str, tuple[str, int]],
    merged_size_bytes: int,
    merged_dtype: str,
    adapter_gguf: tuple[str, int] | None = None,
) -> pd.DataFrame:
    """Sizes, with the reduction against the merged model."""
    rows = [(f"merged/ ({merged_dtype})", "", f"{merged_size_bytes / 1e6:,.1f}", "")]
    alone = {} if adapter_gguf is None else {"adapter": adapter_gguf}
    for quantization, (file_name, size_bytes) in {**gguf_files, **alone}.items():
        reduction = 1 - size_bytes / merged_size_bytes
        rows.append((file_name, quantization, f"{size_bytes / 1e6:,.1f}", f"−{reduction:.1%}"))
    return pd.DataFrame(rows, columns=["file", "type", "MB", "against merged"])


def losses_table(losses: Mapping[str, Any]) -> pd.DataFrame:
    """Test loss of base, adapter, merged and each GGUF on the same examples."""
    mean = losses["loss"]
    bases = (BASE, BASE_4BIT)
    own_base = {ADAPTER_4BIT: BASE_4BIT}
    rows = [
        (
            name,
            "llama.cpp" if name in QUANTIZATIONS else "Transformers",
            f"{loss:.4f}",
            "" if name in bases else f"{loss - mean[own_base.get(name, BASE)]:+.4f}",
            "" if name in (*bases, MERGED) else f"{loss - mean[MERGED]:+.4f}",
            f"{losses['tolerance'][name]:g}" if name in losses["tolerance"] else "",
        )
        for name, loss in mean.items()
    ]
    header = ["model", "scored by", "test loss", "against base", "against merged", "allowed (±)"]
    return pd.DataFrame(rows, columns=header)


def measured_table(measured: Sequence[Measurement]) -> pd.DataFrame:
    """What each type costs and loses, the smallest file first."""
    rows = [
        (
            item.quantization,
            f"{item.size_bytes / 1e6:,.1f}",
            f"{item.bits_per_weight:.1f}",
            f"{item.kl.estimate:.2g}",
            f"{item.kl_99:.2g}",
            f"{item.top_1:.1%}",
            f"{item.perplexity.estimate:.3f}{_ends(item.perplexity)}",
            *(
                (f"{item.speed.generation:.0f}", f"{item.speed.prompt:.0f}")
                if item.speed
                else ("", "")
            ),
        )
        for item in sorted(measured, key=lambda item: item.size_bytes)
    ]
    header = ["type", "MB", "bits/weight", "KL", "KL 99 %", "same top-1", "perplexity"]
    return pd.DataFrame(rows, columns=[*header, "tokens/s", "prompt tokens/s"])


def fallback_note(hidden_size: int, quantizations: Iterable[str]) -> str:
    """Says that rows which do not divide by 256 take more bits, where that is so."""
    names = [name for name in quantizations if name not in (UNQUANTIZED, "BF16", "Q8_0")]
    if hidden_size % SUPER_BLOCK == 0 or not names:
        return ""
    nominal = ", ".join(f"{name} {QUANTIZATIONS[name].bits_per_weight}" for name in names)
    return (
        f"The hidden size, {hidden_size}, does not divide by {SUPER_BLOCK}, which these types need: "
        "llama.cpp stores such matrices in a larger type (q4_K as q5_0, q6_K as q8_0, iq4_xs as "
        f"iq4_nl), so the files are larger than the type's nominal bits a weight ({nominal}) say."
    )


def sweep_table(sweep: SweepRecord, chosen: TrialRecord) -> pd.DataFrame:
    """One row a trial, with the settings that the sweep varies."""
    names = list(dict.fromkeys(name for trial in sweep.trials for name in trial.params))
    rows = []
    for trial in sweep.trials:
        loss = "" if trial.loss is None else f"{trial.loss:.4f}"
        best_step = trial.result.get("best_step", "")
        mark = " (this model)" if trial.number == chosen.number else ""
        values = [_value(_last_part(trial.params.get(name, ""))) for name in names]
        rows.append(
            (
                f"{trial.number}",
                f"{_without_paths(trial)}{mark}",
                *values,
                trial.state,
                best_step,
                loss,
            )
        )
    header = ["trial", "name", *names, "state", "best step", "validation loss"]
    return pd.DataFrame(rows, columns=header)


def _last_part(value: Any) -> Any:
    """The last part of a path of this machine; anything else as it is."""
    is_path = isinstance(value, str) and PurePath(value).is_absolute()
    return PurePath(value).name if is_path else value


def _without_paths(trial: TrialRecord) -> str:
    name = trial.name
    for value in trial.params.values():
        if isinstance(value, str):
            name = name.replace(value, _last_part(value))
    return name


def _front_matter(facts: CardFacts) -> str:
    fields: dict[str, Any] = {}
    if facts.base_is_hub_id:
        fields["base_model"] = facts.base_model
        fields["base_model_relation"] = "finetune"
    fields["library_name"] = "transformers"
    fields["pipeline_tag"] = "text-generation"
    fields["tags"] = ["lora", "gguf", "llama.cpp", "loraloom"]
    return "---\n" + yaml.safe_dump(fields, sort_keys=False).strip() + "\n---"


def _warning(failed_gates: Sequence[str]) -> str:
    if not failed_gates:
        return ""
    names = ", ".join(f"`{name}`" for name in failed_gates)
    return f"> **Warning: promoted with `--force`.** Gates not met: {names} (verification.json)."


def _introduction(facts: CardFacts) -> str:
    trial = facts.trial
    return (
        f"`{facts.base_model}`, fine-tuned with LoRA and merged: trial {trial.number} "
        f"({trial.name}) of the sweep `{facts.sweep.name}` at step {trial.result['best_step']}, "
        "where its validation loss was lowest."
    )


def _losses(facts: CardFacts) -> str:
    result = facts.trial.result
    base, tuned = result["base_eval/loss"], result["eval/loss"]
    of = "" if facts.shipped is None else ", base in 4 bits"
    rows = [
        (f"validation{of}", f"{base:.4f}", f"{tuned:.4f}", f"{tuned - base:+.4f}", ""),
        _split_row(f"test{of}", facts.scored),
    ]
    note = ""
    if facts.shipped is not None:
        rows.append(_split_row("test, as shipped", facts.shipped))
        note = (
            " The adapter was trained and chosen over a 4-bit base; shipped is its merge onto "
            f"the base in {facts.merged_onto}, compared with the base in full precision."
        )
    header = ["split", "base", "this model", "difference", "95 % interval"]
    return (
        "Nats a supervised token; lower is better. The validation split chose the trial and the step; "
        "the test split was scored once. The interval is paired, over "
        f"{facts.scored.num_examples} test examples.{note}\n\n"
        + _markdown(pd.DataFrame(rows, columns=header))
        + f"\n\nThe same model in each form, on the same {facts.losses['num_examples']} test "
        "examples:\n\n" + _markdown(losses_table(facts.losses))
    )


def _split_row(split: str, scored: Comparison) -> tuple[str, str, str, str, str]:
    interval = scored.interval
    return (
        split,
        f"{scored.base:.4f}",
        f"{scored.tuned:.4f}",
        f"{interval.estimate:+.4f}",
        f"[{interval.low:+.4f}, {interval.high:+.4f}]",
    )


def _quantization(measured: MeasuredTypes, num_examples: int) -> str:
    threads = next((item.speed.num_threads for item in measured.items if item.speed), None)
    speed = f" Speed is that of the machine that made the files, with {threads} threads."
    sections = [
        f"**{measured.recommendation}.**",
        _markdown(measured_table(measured.items)),
        f"Each file in llama.cpp against the float32 merged model on {num_examples} test examples: KL "
        "divergence in nats a token and the share of the same likeliest token at "
        f"{measured.num_positions:,} supervised positions; perplexity at all of them, with its "
        f"{CONFIDENCE:.0%} interval. A type is not measurably worse if the whole paired interval of its "
        f"loss minus the merged model's (together {CONFIDENCE:.0%} for all types here) is below "
        f"{MARGIN:g} nats a token.{speed if threads else ''}",
        f"![KL divergence against file size]({measured.picture})" if measured.picture else "",
    ]
    return "\n\n".join(section for section in sections if section)


def _ends(interval: Interval) -> str:
    return f" [{interval.low:.3f}, {interval.high:.3f}]" if math.isfinite(interval.high) else ""


def _usage(facts: CardFacts) -> str:
    file_name = next(iter(facts.gguf_files.values()))[0]
    alone = ""
    if facts.adapter_gguf is not None:
        alone = (
            f"# llama.cpp, over a GGUF of the base model: the adapter alone\n"
            f"llama-cli -m BASE.gguf --lora {facts.adapter_gguf[0]} -cnv\n"
        )
    return (
        "```\n"
        "# llama.cpp\n"
        f"llama-cli -m {file_name} -cnv\n"
        f"{alone}"
        "# Ollama\n"
        f"ollama create {facts.name.lower()} -f Modelfile && ollama run {facts.name.lower()}\n"
        "# Loraloom\n"
        f'python -m deploy.chat {file_name} --prompt "..."\n'
        "```\n\n" + MERGED_USE
    )


def _data(facts: CardFacts) -> str:
    settings, result = facts.trial.settings, facts.trial.result
    lines = [f"- `{name}`: {_value(settings[name])}" for name in DATA_SETTINGS]
    for split, count in facts.counts.items():
        digest = result.get(f"{split}_hash")
        lines.append(f"- {split}: {count:,} examples" + (f", hash `{digest}`" if digest else ""))
    return "\n".join(lines)


def _settings(trial: TrialRecord) -> str:
    rows = [(f"`{name}`", _value(value)) for name, value in trial.settings.items()]
    details = _markdown(pd.DataFrame(rows, columns=["setting", "value"]))
    return f"<details><summary>All settings of the trial</summary>\n\n{details}\n\n</details>"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _markdown(table: pd.DataFrame) -> str:
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
