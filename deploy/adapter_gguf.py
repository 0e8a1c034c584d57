"""A PEFT adapter -> `adapter.gguf`, for `llama.cpp --lora` over a base model that many adapters share.

llama.cpp's own converter writes it; the file is verified by taking the adapter off the merged model: the
merged f16 GGUF with the adapter at scale -1 must score as the base model does. That needs no GGUF of the
base, and fails for a lost, a wrongly scaled and a misplaced adapter.
"""

import contextlib
import ctypes
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deploy.decoder import Decoder
from deploy.export_gguf import run_converter
from deploy.gguf_model import GgufModel, last_error, open_gguf
from deploy.gguf_types import QUANTIZATIONS, UNQUANTIZED
from deploy.llama_cpp_source import CONVERT_ADAPTER
from deploy.verify import LOST_SHARE
from training.evaluate import mean_loss
from training.exceptions import GateError, ModelError
from training.paths import read_json, write_atomic


def export_adapter(adapter: Path, model_dir: Path, outfile: Path) -> None:
    """Writes the PEFT adapter of `adapter` to `outfile` in f16.

    Args:
        adapter: directory with adapter_config.json and adapter_model.safetensors.
        model_dir: of the base model or of the merged one; its config.json is read, not its weights.
        outfile: the file to write.

    Raises:
        ModelError: the converter failed; the end of its log is shown on stderr first.
    """
    with tempfile.TemporaryDirectory(prefix="loraloom-adapter-") as folder:
        source = Path(folder) / adapter.resolve().name
        # Of PEFT's own card the converter copies the base's path into the file.
        shutil.copytree(adapter, source, ignore=shutil.ignore_patterns("*.md"))
        config = read_json(adapter / "adapter_config.json")
        base = Path(config.get("base_model_name_or_path") or "")
        if base.is_absolute():  # the file names its base, and is published
            config["base_model_name_or_path"] = base.name
        if config.get("use_rslora"):
            # llama.cpp scales by alpha / rank alone.
            config["lora_alpha"] = config["lora_alpha"] * math.sqrt(config["r"])
        (source / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        arguments = [str(source), "--base", str(model_dir), "--outtype", "f16"]
        write_atomic(
            outfile, lambda path: run_converter(CONVERT_ADAPTER, arguments, path, of=adapter)
        )


def verify_adapter(
    path: Path,
    merged_gguf: Path,
    examples: Sequence[Mapping[str, Any]],
    merged: pd.DataFrame,
    base: pd.DataFrame,
) -> dict[str, Any]:
    """Takes the adapter off the merged f16 GGUF and compares what is left with the base model.

    Args:
        path: the adapter's GGUF.
        merged_gguf: the merged model's, in f16.
        examples: test examples with `example_id`, `input_ids`, `labels`.
        merged: per-example losses of the merged model on these.
        base: those of the base that it was merged onto.

    Returns:
        What was measured, and what it may be at most.

    Raises:
        GateError: what is left is not the base model, so the file is not the adapter.
        ModelError: llama.cpp cannot load or run it.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    with open_adapted(merged_gguf, path, num_ctx=longest + 8, scale=-1.0) as gguf:
        removed = gguf.example_losses(examples)
    frames = [
        frame.set_index("example_id").sort_index()["loss_sum"].to_numpy()
        for frame in (base, merged, removed)
    ]
    base_N, merged_N, removed_N = frames
    changed = np.abs(base_N - merged_N).sum()
    share = float(np.abs(removed_N - base_N).sum() / changed) if changed else math.inf
    found, expected = mean_loss(removed), mean_loss(base)
    tolerance = QUANTIZATIONS[UNQUANTIZED].tolerance
    if not (abs(found - expected) <= tolerance and share <= LOST_SHARE):
        raise GateError(
            f"{path.name}: the merged model less this adapter has test loss {found:.4f}, but must be "
            f"within {tolerance} of the base model's {expected:.4f}, and differ from it by at most "
            f"{LOST_SHARE:.0%} of what the adapter changed ({share:.0%}): the file is not the adapter"
        )
    return {
        "size_bytes": path.stat().st_size,
        "num_examples": len(removed),
        "merged_loss": mean_loss(merged),
        "merged_less_adapter_loss": found,
        "base_loss": expected,
        "tolerance": tolerance,
        "difference_share": share,
        "difference_share_allowed": LOST_SHARE,
    }


@contextlib.contextmanager
def open_adapted(
    path: Path, adapter: Path, num_ctx: int, scale: float = 1.0
) -> Iterator["AdaptedGguf"]:
    """Loads a GGUF with an adapter on it, as `llama-cli --lora-scaled` does.

    Raises:
        ModelError: llama.cpp cannot load one of them, or the adapter is of another model.
    """
    with open_gguf(path, num_ctx) as gguf:
        loaded = gguf.llama_cpp.llama_adapter_lora_init(gguf.model, os.fsencode(adapter))
        if not loaded:
            raise ModelError(f"{adapter}: llama.cpp cannot load it over {path.name}{last_error()}")
        # llama.cpp frees it with the model.
        own = {field.name: getattr(gguf, field.name) for field in fields(gguf)}
        adapted = AdaptedGguf(**own, adapter=loaded, scale=scale)
        adapted.attach(gguf.decoder)
        yield adapted


@dataclass(frozen=True)
class AdaptedGguf(GgufModel):
    """A loaded GGUF whose every context has the adapter on it."""

    adapter: Any
    scale: float

    def attach(self, decoder: Decoder) -> None:
        adapters = (self.llama_cpp.llama_adapter_lora_p_ctypes * 1)(self.adapter)
        scales = (ctypes.c_float * 1)(self.scale)
        status = self.llama_cpp.llama_set_adapters_lora(decoder.context, adapters, 1, scales)
        if status:
            raise ModelError(f"{self.path}: llama.cpp cannot use the adapter ({status})")

    def _scorers(self, stack: contextlib.ExitStack, num_rows: int) -> list[Decoder]:
        decoders = super()._scorers(stack, num_rows)
        for decoder in decoders:
            self.attach(decoder)
        return decoders
