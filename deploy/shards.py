"""A LoRA adapter added to the files of its base model, one tensor at a time.

`plan_merge` reads the headers of the base's safetensors and the adapter, and refuses what does not fit.
`write_merged` then reads each tensor, adds `scaling * B @ A` in float32 where the adapter has a layer, and
writes it into a file of the same name. Memory holds the adapter and what the allocator keeps of tensors that
were read (measured: less than one file), not the model.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils.hub import cached_file

from deploy.lora_delta import Delta, read_adapter
from deploy.memory import load_skeleton
from training.config import TrialConfig
from training.exceptions import ModelError
from training.model import load_tokenizer, resolve_model
from training.paths import read_json, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Tensors of these types are cast; any other stays as it is."""


@dataclass(frozen=True)
class Checkpoint:
    """The base model's files, by their headers."""

    files: tuple[Path, ...]
    index: Path | None
    tensors: Mapping[str, tuple[Path, str, list[int]]]
    """File, safetensors' name of the type, and shape, by the tensor's name."""
    config: TrialConfig

    @property
    def where(self) -> str:
        """How an error about it begins."""
        return f"model_name_or_path is {self.config.model_name_or_path}"

    def find(self, modules: Iterable[str]) -> dict[str, str | None]:
        """Tensor that holds each module's weight; its name may be one that Transformers changes."""
        found = {module: f"{module}.weight" for module in modules}
        if not set(found.values()) <= self.tensors.keys():
            loaded_as = _loaded_as(self.config, self.tensors)
            return {module: loaded_as.get(name) for module, name in found.items()}
        return {**found}


@dataclass(frozen=True)
class MergePlan:
    """An adapter that fits its base."""

    checkpoint: Checkpoint
    deltas: Mapping[str, Delta]
    """By the name of the tensor."""


def plan_merge(config: TrialConfig, adapter: Path) -> MergePlan:
    """Finds the tensor of every layer that the adapter has.

    Raises:
        ModelError: the base has no safetensors, is quantised, or the adapter is not one for it.
    """
    checkpoint = read_checkpoint(config)
    misfit = f"{adapter} is not an adapter for {config.model_name_or_path}"
    by_module = read_adapter(adapter, misfit)
    deltas = {}
    names = checkpoint.find(by_module)
    for module, delta in by_module.items():
        name = names[module]
        if name is None:
            raise ModelError(f"{misfit}: the base's files hold no weight of its layer {module}")
        shape = checkpoint.tensors[name][2]
        if shape != delta.shape:
            raise ModelError(
                f"{misfit}: the shape of {name} is {shape}, but the adapter's layer is {delta.shape}"
            )
        deltas[name] = delta
    return MergePlan(checkpoint, deltas)


def read_checkpoint(config: TrialConfig) -> Checkpoint:
    """Headers of the base's safetensors: a directory's, or the hub's, downloaded where need be."""
    where = f"model_name_or_path is {config.model_name_or_path}"
    try:
        architecture = find_file(config, "config.json")
        if architecture and "quantization_config" in read_json(architecture):
            raise ModelError(
                f"{where}: its files are quantised, but must be in full precision to merge into"
            )
        index = None
        files = [find_file(config, WEIGHTS)]
        if files == [None]:
            index = find_file(config, INDEX)
            names = sorted(set(read_json(index)["weight_map"].values())) if index else []
            files = [find_file(config, name) for name in names]
        found = tuple(file for file in files if file)
        if not found or len(found) < len(files):
            raise ModelError(f"{where}, but its weights ({WEIGHTS}) are not there or not complete")
        tensors = {}
        for file in found:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    part = opened.get_slice(name)
                    tensors[name] = (file, part.get_dtype(), list(part.get_shape()))
    except SafetensorError as error:
        raise ModelError(f"{where}, but its weights are damaged: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{where}: {cause}") from error
    return Checkpoint(found, index, tensors, config)


def find_file(config: TrialConfig, name: str) -> Path | None:
    """A file of the base model, downloaded where need be; None where it has none of that name."""
    found = cached_file(
        resolve_model(config),
        name,
        revision=config.model_revision,
        _raise_exceptions_for_missing_entries=False,
    )
    return Path(found) if found else None


def write_model(
    plan: MergePlan,
    target: Path,
    bases: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes the merged weights and every file that goes with them, without comparing anything.

    Args:
        plan: from `plan_merge`.
        target: directory to write into.
        bases: by a layer's name, what to take for the base's weight instead of its file's.
        dtype: of the weights.

    Raises:
        ModelError: the base's weights are damaged, or one to be replaced is not in its files.
    """
    write_merged(plan, target, dtype, bases)
    config = plan.checkpoint.config
    source, revision = resolve_model(config), config.model_revision
    architecture = AutoConfig.from_pretrained(
        source, revision=revision, trust_remote_code=config.trust_remote_code
    )
    architecture.dtype = dtype
    architecture.save_pretrained(target)
    generation = find_file(config, "generation_config.json")
    if generation:
        shutil.copyfile(generation, target / generation.name)
    else:
        GenerationConfig.from_model_config(architecture).save_pretrained(target)
    if config.trust_remote_code:
        # The architecture's own code, which the saved config names.
        for path in plan.checkpoint.files[0].parent.glob("*.py"):
            shutil.copyfile(path, target / path.name)
    load_tokenizer(config).save_pretrained(target)


def write_merged(
    plan: MergePlan,
    target: Path,
    dtype: torch.dtype = torch.float32,
    bases: Mapping[str, Callable[[], torch.Tensor]] | None = None,
) -> None:
    """Writes base + adapter, file by file, under the base's names.

    Args:
        plan: from `plan_merge`.
        target: directory to write into.
        dtype: float32, float16 or bfloat16, of every floating-point tensor.
        bases: by a layer's name, what to take for the base's weight instead of its file's.

    Raises:
        ModelError: the base's weights are damaged, or one to be replaced is not in its files.
    """
    checkpoint = plan.checkpoint
    replaced: dict[str, Callable[[], torch.Tensor]] = {}
    for module, name in checkpoint.find(bases or {}).items():
        if name is None:
            raise ModelError(f"{checkpoint.where}: its files hold no weight of its layer {module}")
        replaced[name] = (bases or {})[module]
    target.mkdir(parents=True, exist_ok=True)
    total = 0
    for file in checkpoint.files:
        types = {
            name: (DTYPE_NAMES[dtype] if kind in FLOATS else kind, shape)
            for name, (where, kind, shape) in checkpoint.tensors.items()
            if where == file
        }

        def load(name: str, file: Path = file) -> torch.Tensor:
            return _merged(name, file, dtype, plan.deltas.get(name), replaced.get(name))

        total += write_safetensors(target / file.name, types, load)
    if checkpoint.index:
        index = read_json(checkpoint.index)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        write_json(target / INDEX, index)


def cast_model(directory: Path, dtype: torch.dtype) -> None:
    """Rounds a saved model's weights, file by file and tensor by tensor; its config.json says so.

    Args:
        directory: of a model that `write_model` has written.
        dtype: float32, float16 or bfloat16.
    """
    total = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            kinds = {name: part.get_dtype() for name, part in parts.items()}
            types = {
                name: (
                    DTYPE_NAMES[dtype] if kinds[name] in FLOATS else kinds[name],
                    part.get_shape(),
                )
                for name, part in parts.items()
            }

        def load(name: str, path: Path = path) -> torch.Tensor:
            return _merged(name, path, dtype, None, None)

        rounded = path.with_name(f".{path.name}")
        total += write_safetensors(rounded, types, load)
        rounded.replace(path)
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX)
        index["metadata"]["total_size"] = total
        write_json(directory / INDEX, index)
    settings = read_json(directory / "config.json")
    write_json(directory / "config.json", {**settings, "dtype": str(dtype).removeprefix("torch.")})


def write_safetensors(
    path: Path, types: Mapping[str, tuple[str, list[int]]], load: Callable[[str], torch.Tensor]
) -> int:
    """Writes tensors one at a time: safetensors' own writer wants them all at once.

    The format is a length (8 bytes), a JSON header of types, shapes and places, and the bytes.

    Args:
        path: the file.
        types: safetensors' name of the type, and shape, by the tensor's name.
        load: called with one name after the other.

    Returns:
        Bytes of all tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(types, key=lambda name: (-_bits(types[name][0]), name))  # keeps them aligned
    end = 0
    for name in order:
        kind, shape = types[name]
        start, end = end, end + math.prod(shape) * _bits(kind) // 8
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            data = load(name).contiguous().reshape(-1).view(torch.uint8)
            if list(header[name]["data_offsets"])[1] != file.tell() - 8 - len(text) + data.numel():
                raise ModelError(f"{path}: {name} has another size than its type and shape say")
            file.write(data.numpy().data)
    return end


def _merged(
    name: str,
    file: Path,
    dtype: torch.dtype,
    delta: Delta | None,
    base: Callable[[], torch.Tensor] | None,
) -> torch.Tensor:
    if base is not None:
        weight = base().cpu()
    else:
        # Opened for each tensor: the pages of a file that stays open count as memory in use.
        with safe_open(file, "pt") as opened:
            weight = opened.get_tensor(name)
    if not weight.is_floating_point():
        return weight
    if delta is not None:
        weight = weight.float() + delta.weight()
    return weight.to(dtype)


def _loaded_as(config: TrialConfig, names: Iterable[str]) -> dict[str, str]:
    """Tensor's name in the files by the parameter's in the model, where loading changes nothing else."""
    model = load_skeleton(config)
    parameters = model.state_dict()
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    found = {}
    for name in names:
        renamed, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        if converter is None and renamed in parameters:
            found[renamed] = name
    return found


def _bits(kind: str) -> int:
    """Bits of safetensors' type of that name, e.g. BF16, I64, F8_E4M3, BOOL."""
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 8
