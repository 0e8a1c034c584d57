"""A Transformers directory -> an f16 GGUF, by llama.cpp's own converter in a process of its own.

The converter brings its own `gguf` library, newer than PyPI's, hence the separate process. The file
appears whole or not at all.
"""

import os
import subprocess
import sys
from pathlib import Path

from deploy.llama_cpp_source import CONVERT_MODEL, converter_dir
from training.exceptions import ModelError
from training.paths import write_atomic

LOG_LINES = 30


def export_gguf(model_dir: Path, outfile: Path, name: str) -> None:
    """Writes the model of `model_dir` to `outfile` in f16; `name` goes into its metadata.

    Raises:
        ModelError: the converter failed; the end of its log is shown on stderr first.
    """
    converter = converter_dir()
    write_atomic(outfile, lambda path: _convert(converter, model_dir, path, name))


def _convert(converter: Path, model_dir: Path, outfile: Path, name: str) -> None:
    command = [sys.executable, str(converter / CONVERT_MODEL), str(model_dir)]
    command += ["--outfile", str(outfile), "--outtype", "f16", "--model-name", name]
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
            f"{model_dir}: llama.cpp's converter failed with status {done.returncode}: {log[-1]}"
        )
