"""From adapter to Q4_K_M: the steps of a promotion beside what a user does by hand.

    python -m benchmarks.export            demo model and a larger one, about 6 minutes on 2 cores
    python -m benchmarks.export --smoke    one round of the demo model

By hand, a script and so a process a step: PEFT's `merge_and_unload`, `save_pretrained`, llama.cpp's converter
to f16, its quantiser. Ours, one process as `deploy.promote` is: the merge that streams from file to file,
then the same converter (in its own process) and quantiser. Both take turns in one run, and medians are kept.
What promotion adds, reading the merged model back and comparing it with base + adapter, is timed apart.
Memory is measured in a round of its own: the most that all processes of a step hold together, what they share
counted once (PSS, pages of mapped files included, every 30 ms).
"""

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).with_name("results")
STEPS = ("merge", "convert", "quantise")
SIZES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS")
QUANTIZED = "Q4_K_M"
SAMPLED_S = 0.03
LOG = "log.txt"
LARGE = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 20,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
"""A Llama of 0.6 billion parameters with the demo model's tokenizer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="repeats, of which medians are kept")
    parser.add_argument("--smoke", action="store_true", help="one round, demo model, two types")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    num_rounds, sizes = (1, ("Q8_0", "Q4_K_M")) if options.smoke else (options.rounds, SIZES)
    with tempfile.TemporaryDirectory(prefix="loraloom-benchmark-") as name:
        folder = Path(name)
        demo = folder / "demo"
        models = {"demo": both_ways(demo, num_rounds)}
        results: dict[str, Any] = {
            "models": models,
            "verification": verification(demo),
            "sizes": file_sizes(demo, sizes),
        }
        if not options.smoke:
            models["large"] = both_ways(folder / "large", 1)
            results["large_plan_mb"] = sampled("plan", "ours", folder / "large")["peak_mb"]
    if not options.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "export.json").write_text(json.dumps(results, indent=2) + "\n")
        (RESULTS / "export.md").write_text(table(results))
    print("\n" + table(results))


def both_ways(folder: Path, num_rounds: int) -> dict[str, Any]:
    """Seconds, peaks and ratios of each step, and of all, of the model that the folder is named after."""
    folder.mkdir()
    size_mb = in_process("base", folder.name, folder)["size_mb"]
    in_process("adapter", "ours", folder)
    rounds: dict[str, list[dict[str, float]]] = {"by hand": [], "ours": []}
    for number in range(num_rounds):
        # The one that begins is another every round: it finds less in the page cache.
        for way in list(rounds)[:: 1 if number % 2 == 0 else -1]:
            rounds[way].append(step_times(way, folder))
            print(f"{folder.name}, {way}, round {number + 1}, s: {rounds[way][-1]}", flush=True)
    found: dict[str, Any] = {"size_mb": size_mb}
    for way, times in rounds.items():
        peaks = step_peaks(way, folder)
        print(f"{folder.name}, {way}, MB: {peaks}", flush=True)
        steps: dict[str, dict[str, float]] = {
            step: {
                "time_s": round(statistics.median(one[step] for one in times), 2),
                "peak_mb": peaks[step],
            }
            for step in STEPS
        }
        total_s = sum(steps[step]["time_s"] for step in STEPS)
        steps["all"] = {"time_s": round(total_s, 2), "peak_mb": max(peaks.values())}
        found[way] = steps
    found["ratio"] = {
        step: {key: round(value / found["by hand"][step][key], 3) for key, value in numbers.items()}
        for step, numbers in found["ours"].items()
    }
    return found


def verification(folder: Path) -> dict[str, float]:
    found = sampled("verify", "ours", folder)
    return {key: value for key, value in found.items() if key != "samples"}


def step_times(way: str, folder: Path) -> dict[str, float]:
    """Seconds of each step; that of ours which begins has the process's start in it."""
    if way == "by hand":
        return {step: in_process(step, way, folder)["time_s"] for step in STEPS}
    done = in_process("all", way, folder)
    times = {step: done["ended_s"][step] - done["began_s"][step] for step in STEPS}
    times[STEPS[0]] = done["time_s"] - sum(times[step] for step in STEPS[1:])
    return {step: round(time_s, 2) for step, time_s in times.items()}


def step_peaks(way: str, folder: Path) -> dict[str, int]:
    """MB of each step, at most."""
    if way == "by hand":
        return {step: sampled(step, way, folder)["peak_mb"] for step in STEPS}
    done = sampled("all", way, folder)
    return {
        step: max(
            mb
            for at_s, mb in done["samples"]
            if at_s <= done["ended_s"][step] and (step == STEPS[0] or at_s >= done["began_s"][step])
        )
        for step in STEPS
    }


def all_ours(folder: Path) -> dict[str, Any]:
    """The three steps in this process."""
    began_s, ended_s = {}, {}
    for step, run in zip(STEPS, (merge_ours, convert_ours, quantize_ours), strict=True):
        began_s[step] = time.time()
        run(folder)
        ended_s[step] = time.time()
    return {"began_s": began_s, "ended_s": ended_s}


def in_process(step: str, way: str, folder: Path) -> dict[str, Any]:
    """Runs one step in a process of its own: seconds from start to end, and what it measured."""
    started = time.perf_counter()
    with _start(step, way, folder) as process:
        printed, _ = process.communicate()
    elapsed = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{step} {way} failed:\n{(folder / LOG).read_text()[-3000:]}")
    return {"time_s": round(elapsed, 2), **json.loads(printed.splitlines()[-1])}


def sampled(step: str, way: str, folder: Path) -> dict[str, Any]:
    """The same, with what its processes hold together, by time and at most."""
    samples: list[tuple[float, int]] = []
    with _start(step, way, folder) as process:
        while process.poll() is None:
            samples.append((time.time(), round(held_bytes(process.pid) / 1e6)))
            time.sleep(SAMPLED_S)
        printed, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{step} {way} failed:\n{(folder / LOG).read_text()[-3000:]}")
    found = json.loads(printed.splitlines()[-1])
    return {"peak_mb": max(mb for _, mb in samples), "samples": samples, **found}


def held_bytes(pid: int) -> int:
    """Memory of a process and all that it started, what they share counted once."""
    total = 0
    with contextlib.suppress(psutil.Error):  # one that has just ended
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def _start(step: str, way: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.export", "--one", step, way, str(folder)]
    with open(folder / LOG, "w") as log:  # llama.cpp's quantiser by hand says a line a tensor
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)


def measure(step: str, way: str, folder_name: str) -> dict[str, Any]:
    """One step in this process."""
    folder = Path(folder_name)
    if step == "base":
        return {"size_mb": make_base(folder)}
    ways: dict[Any, Any] = WAYS
    return ways[step, way](folder) or {}


def make_base(folder: Path) -> int:
    """`folder`/base: the demo model, or random weights in bfloat16 and files of 200 MB; MB in float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from training.model import prepare_demo_model

    base, source = folder / "base", Path(prepare_demo_model())
    if folder.name == "demo":
        base.symlink_to(source)
        weights = load_file(base / "model.safetensors")
        return round(sum(weight.numel() for weight in weights.values()) * 4 / 1e6)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **LARGE, **ends)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.save_pretrained(base, max_shard_size="200MB")
    tokenizer.save_pretrained(base)
    return round(model.num_parameters() * 4 / 1e6)


def make_adapter(folder: Path) -> None:
    """A random adapter of rank 16 on all linear layers, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.01)
    model.save_pretrained(str(folder / "adapter"))


def merge_by_hand(folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folder / "base"
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(folder / "adapter"))
    model.merge_and_unload().save_pretrained(str(folder / "by hand"))
    AutoTokenizer.from_pretrained(source).save_pretrained(str(folder / "by hand"))


def merge_ours(folder: Path) -> None:
    from deploy.shards import write_model

    write_model(plan_ours(folder), folder / "ours")


def plan_ours(folder: Path) -> Any:
    from deploy.shards import plan_merge
    from training.config import TrialConfig

    return plan_merge(TrialConfig(model_name_or_path=str(folder / "base")), folder / "adapter")


def convert_by_hand(folder: Path) -> None:
    from deploy.llama_cpp_source import CONVERT_MODEL, converter_dir

    converter = converter_dir()
    command = [sys.executable, str(converter / CONVERT_MODEL), str(folder / "by hand")]
    command += ["--outfile", str(folder / "by hand.gguf"), "--outtype", "f16"]
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(converter / "gguf-py")},
    )


def convert_ours(folder: Path) -> None:
    from deploy.export_gguf import export_gguf

    export_gguf(folder / "ours", folder / "ours.gguf", "ours")


def quantize_by_hand(folder: Path) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.nthread = len(os.sched_getaffinity(0))
    paths = [str(folder / f"by hand{end}.gguf").encode() for end in ("", f"-{QUANTIZED}")]
    quantize: Any = llama_cpp.llama_model_quantize
    if quantize(*paths, ctypes.byref(params)):
        sys.exit("llama.cpp's quantiser failed")


def quantize_ours(folder: Path) -> None:
    from deploy.gguf_types import QUANTIZATIONS
    from deploy.quantize import quantize

    quantize(folder / "ours.gguf", folder / f"ours-{QUANTIZED}.gguf", QUANTIZATIONS[QUANTIZED])


def verify_merge(folder: Path) -> dict[str, Any]:
    """What `merge_adapter` does over and above writing: its time less that of the writing."""
    import torch
    from datasets import Dataset

    from deploy.merge import merge_adapter
    from deploy.shards import plan_merge, write_model
    from training.config import TrialConfig

    config = TrialConfig(model_name_or_path=str(folder / "base"))
    adapter = folder / "adapter"
    started = time.perf_counter()
    write_model(plan_merge(config, adapter), folder / "verified")
    written = time.perf_counter()
    ids = [[*range(1000, 1000 + 256)] for _ in range(4)]
    cpu = torch.device("cpu")
    merge = merge_adapter(config, adapter, folder / "verified", ids, Dataset.from_list([]), cpu)
    both = time.perf_counter() - written
    kept = {name: merge.record[name] for name in ("max_abs_difference", "kl_divergence")}
    return {"verification_s": round(both - (written - started), 2), **kept}


WAYS = {
    ("adapter", "ours"): make_adapter,
    ("merge", "by hand"): merge_by_hand,
    ("convert", "by hand"): convert_by_hand,
    ("quantise", "by hand"): quantize_by_hand,
    ("all", "ours"): all_ours,
    ("plan", "ours"): lambda folder: {"num_layers": len(plan_ours(folder).deltas)},
    ("verify", "ours"): verify_merge,
}


def file_sizes(folder: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Size of each type of the demo model, and how much smaller than f16 it is."""
    from deploy.gguf_types import QUANTIZATIONS
    from deploy.quantize import quantize

    f16 = (folder / "ours.gguf").stat().st_size
    sizes = {"F16": {"size_mb": round(f16 / 1e6, 1), "smaller": 0.0}}
    for name in names:
        outfile = folder / f"size-{name}.gguf"
        quantize(folder / "ours.gguf", outfile, QUANTIZATIONS[name])
        size = outfile.stat().st_size
        sizes[name] = {"size_mb": round(size / 1e6, 1), "smaller": round(1 - size / f16, 3)}
        outfile.unlink()
    return sizes


def table(results: Mapping[str, Any]) -> str:
    """Markdown of everything."""
    lines = [
        "| model (float32) | step | by hand, s | ours, s | time | by hand, MB | ours, MB | peak memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in results["models"].items():
        for step in (*STEPS, "all"):
            a, b, c = found["by hand"][step], found["ours"][step], found["ratio"][step]
            lines.append(
                f"| {name}, {found['size_mb']} MB | {step} | {a['time_s']:.1f} | {b['time_s']:.1f} | "
                f"{c['time_s']:.2f}× | {a['peak_mb']:.0f} | {b['peak_mb']:.0f} | {c['peak_mb']:.2f}× |"
            )
    checked = results["verification"]
    lines += [
        "",
        f"Verification of the demo model's merge, apart: {checked['verification_s']:.1f} s, peak "
        f"{checked['peak_mb']:.0f} MB.",
        "",
        *_large(results),
        "| type | MB | smaller than F16 |",
        "| --- | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {found['size_mb']:.1f} | {found['smaller']:.0%} |"
        for name, found in results["sizes"].items()
    ]
    return "\n".join(lines) + "\n"


def _large(results: Mapping[str, Any]) -> list[str]:
    if "large" not in results["models"]:
        return []
    start_mb = results["large_plan_mb"]
    merge_mb = results["models"]["large"]["ours"]["merge"]["peak_mb"]
    return [
        f"The large model lies in files of 200 MB; its merge takes {merge_mb - start_mb:.0f} MB over the "
        f"{start_mb:.0f} MB of libraries and adapter.",
        "",
    ]


if __name__ == "__main__":
    main()
