"""A Transformers directory -> an f16 GGUF, by llama.cpp's own converter in a process of its own.

The converter brings its own `gguf` library, newer than PyPI's, hence the separate process. It reads a
directory as models are published, and Transformers 5 saves some of it no longer: the tokenizer's files
are completed in a directory of links beside the model. The file appears whole or not at all.
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from deploy.llama_cpp_source import CONVERT_MODEL, converter_dir
from deploy.sentencepiece_model import is_sentencepiece, write_sentencepiece
from training.config import TrialConfig
from training.exceptions import ModelError
from training.model import resolve_model
from training.paths import read_json, write_atomic

LOG_LINES = 30
PHI3 = "phi3"
"""`model_type` of Phi-3, 3.5 and 4."""


def export_gguf(model_dir: Path, outfile: Path, name: str) -> None:
    """Writes the model of `model_dir` to `outfile` in f16; `name` goes into its metadata.

    Raises:
        ModelError: the converter failed; the end of its log is shown on stderr first.
    """
    with tempfile.TemporaryDirectory(prefix="loraloom-gguf-") as folder:
        source = complete_model_dir(model_dir, Path(folder))
        arguments = [str(source), "--outtype", "f16", "--model-name", gguf_name(model_dir, name)]
        write_atomic(
            outfile, lambda path: run_converter(CONVERT_MODEL, arguments, path, of=model_dir)
        )


def check_architecture(config: TrialConfig) -> None:
    """Raises ModelError if llama.cpp's converter does not know the trial's base model."""
    loaded = AutoConfig.from_pretrained(
        resolve_model(config),
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    text = loaded.get_text_config()
    names = text.architectures or loaded.architectures or [type(loaded).__name__]
    if names[0] not in known_architectures():
        raise ModelError(
            f"model_name_or_path is {config.model_name_or_path}: its architecture is {names[0]}, "
            "but must be one that llama.cpp's converter knows, for there to be a GGUF"
        )


def known_architectures() -> set[str]:
    """Architectures of text models that the converter's table lists, as config.json names them."""
    table = converter_dir() / "conversion" / "__init__.py"
    for node in ast.parse(table.read_text("utf-8")).body:
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "TEXT_MODEL_MAP"
            and node.value is not None
        ):
            return set(ast.literal_eval(node.value))
    raise ModelError(f"{table} has no table TEXT_MODEL_MAP; `make setup` puts the file there")


def gguf_name(model_dir: Path, name: str) -> str:
    """The name that stands in the file: of a Phi-3 model it must say so.

    The file cannot say that special tokens swallow the white space after them; llama.cpp takes it from a
    name with "phi-3" in it.
    """
    is_phi3 = read_json(model_dir / "config.json").get("model_type") == PHI3
    known = any(word in name.lower() for word in ("phi-3", PHI3))
    return (
        f"{name} (Phi-3)" if is_phi3 and not known and _is_from_sentencepiece(model_dir) else name
    )


def complete_model_dir(model_dir: Path, folder: Path) -> Path:
    """`folder`/NAME with links to the model's files, and what the converter misses among them.

    Those are `added_tokens_decoder` in tokenizer_config.json, by which it tells special tokens from text,
    and tokenizer.model of a SentencePiece tokenizer: without it the Gemma and Phi-3 families do not
    convert, and those of Llama 2 and Mistral get tokens without scores, so other token ids. Phi-4 is a
    Phi-3 of a byte-level tokenizer, which the converter takes from the name of its class.
    """
    source = folder / model_dir.resolve().name  # the converter reads names out of the directory's
    source.mkdir()
    for path in model_dir.resolve().iterdir():
        (source / path.name).symlink_to(path)
    if not (source / "tokenizer.json").is_file():
        return source
    tokenizer = read_json(source / "tokenizer.json")
    config_file = source / "tokenizer_config.json"
    settings = read_json(config_file) if config_file.is_file() else {}
    settings.setdefault("added_tokens_decoder", _added_tokens(tokenizer))
    if is_sentencepiece(tokenizer):
        if not (source / "tokenizer.model").exists():
            write_sentencepiece(tokenizer, source / "tokenizer.model")
        settings["add_prefix_space"] = _adds_prefix_space(tokenizer)
    elif read_json(source / "config.json").get("model_type") == PHI3:
        settings["tokenizer_class"] = "GPT2Tokenizer"
    config_file.unlink(missing_ok=True)
    config_file.write_text(json.dumps(settings), "utf-8")
    return source


def run_converter(script: str, arguments: Sequence[str], outfile: Path, of: Path) -> None:
    """Runs one of llama.cpp's converters to write `outfile`; `of` is what a failure names.

    Raises:
        ModelError: it failed; the end of its log is shown on stderr first.
    """
    converter = converter_dir()
    command = [sys.executable, str(converter / script), *arguments, "--outfile", str(outfile)]
    environment = {**os.environ, "PYTHONPATH": str(converter / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not outfile.is_file():
        log = done.stdout.strip().splitlines() or ["no output"]
        print("\n".join(log[-LOG_LINES:]), file=sys.stderr)
        raise ModelError(
            f"{of}: llama.cpp's converter failed with status {done.returncode}: {log[-1]}"
        )


def _is_from_sentencepiece(model_dir: Path) -> bool:
    path = model_dir / "tokenizer.json"
    return path.is_file() and is_sentencepiece(read_json(path))


def _added_tokens(tokenizer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokenizer["added_tokens"]
    }


def _adds_prefix_space(tokenizer: dict[str, Any]) -> bool:
    """Whether text is read as if a space stood before it, also after a special token.

    llama.cpp knows no space at the very start alone (`prepend_scheme` "first"): without any, a chat that
    starts with a special token has the right tokens, and plain text lacks its first space.
    """
    normalizer, pre_tokenizer = tokenizer["normalizer"] or {}, tokenizer["pre_tokenizer"] or {}
    steps = [*normalizer.get("normalizers", [normalizer])]
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or pre_tokenizer.get("prepend_scheme") == "always"
