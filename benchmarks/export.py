"""From adapter to Q4_K_M: the steps of a promotion beside what a user does by hand.

    python -m benchmarks.export            the demo model, 3 rounds, about 3 minutes on 2 cores
    python -m benchmarks.export --smoke    one round and a small model of many files

By hand, a script and so a process a step: PEFT's `merge_and_unload`, `save_pretrained`, llama.cpp's converter
to f16, its quantiser. Ours, one process as `deploy.promote` is: the merge that streams from file to file,
then the same converter (in its own process) and quantiser. Both take turns in one run, and medians are kept.
What promotion adds, reading the merged model back and comparing it with base + adapter, is timed apart.
Memory is a process's peak (resident, pages of mapped files included), the larger one where two run at a time.
"""

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
STEPS = ("merge", "convert", "quantise")
SIZES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS")
QUANTIZED = "Q4_K_M"
HIDDEN = 2048
SHARD_MB = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="repeats, of which medians are kept")
    parser.add_argument("--num_shards", type=int, default=8, help="files of the made-up model")
    parser.add_argument("--smoke", action="store_true", help="one round, two files, two types")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    num_rounds, num_shards, sizes = options.rounds, options.num_shards, SIZES
    if options.smoke:
        num_rounds, num_shards, sizes = 1, 2, ("Q8_0", "Q4_K_M")
    with tempfile.TemporaryDirectory(prefix="loraloom-benchmark-") as name:
        folder = Path(name)
        in_process("adapter", "ours", folder)
        rounds: dict[str, list[dict[str, Any]]] = {"by hand": [], "ours": []}
        for number in range(num_rounds):
            # The one that begins is another every round: it finds less in the page cache.
            for way in list(rounds)[:: 1 if number % 2 == 0 else -1]:
                rounds[way].append(one_round(way, folder))
                print(f"{way}, round {number + 1}: {rounds[way][-1]}", flush=True)
        verification = in_process("verify", "ours", folder)
        results = {
            "ways": {way: medians(measured) for way, measured in rounds.items()},
            "verification": verification,
            "many_files": many_files(folder, num_shards),
            "sizes": file_sizes(folder, sizes),
        }
    results["ratio"] = ratios(results["ways"])
    if not options.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "export.json").write_text(json.dumps(results, indent=2) + "\n")
        (RESULTS / "export.md").write_text(table(results))
    print("\n" + table(results))


def one_round(way: str, folder: Path) -> dict[str, Any]:
    """Seconds and peak of each step; that of ours which begins has the process's start in it."""
    if way == "by hand":
        return {step: in_process(step, way, folder) for step in STEPS}
    done = in_process("all", way, folder)
    steps = done["steps"]
    rest = sum(steps[step]["time_s"] for step in STEPS[1:])
    steps[STEPS[0]]["time_s"] = round(done["time_s"] - rest, 2)
    return steps


def all_ours(folder: Path) -> dict[str, Any]:
    """The three steps in this process."""
    steps: dict[str, dict[str, float]] = {}
    for step, run in zip(STEPS, (merge_ours, convert_ours, quantize_ours), strict=True):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        started = time.perf_counter()
        run(folder)
        elapsed = time.perf_counter() - started
        status = Path("/proc/self/status").read_text("ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        peaks = [int(line.split()[1])]
        if step == "convert":
            peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
        steps[step] = {"time_s": round(elapsed, 2), "peak_mb": round(max(peaks) * 1024 / 1e6)}
    return {"steps": steps}


def in_process(step: str, way: str, folder: Path) -> dict[str, Any]:
    """Runs one step in a process of its own: seconds from start to end, and what it measured."""
    command = [sys.executable, "-m", "benchmarks.export", "--one", step, way, str(folder)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return {"time_s": round(elapsed, 2), **json.loads(done.stdout.splitlines()[-1])}


def measure(step: str, way: str, folder_name: str) -> dict[str, Any]:
    """One step in this process; its peak is the larger one of its own and of a process it started."""
    folder = Path(folder_name)
    if step == "make many":
        found = {"model_mb": make_many(folder, int(way))}
    else:
        ways: dict[Any, Any] = WAYS
        found = ways[step, way](folder) or {}
    peaks = [
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return {"peak_mb": round(max(peaks) * 1024 / 1e6), **found}


def make_adapter(folder: Path) -> None:
    """A random adapter of rank 16 on all linear layers of the demo model, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from training.model import prepare_demo_model

    base = AutoModelForCausalLM.from_pretrained(prepare_demo_model(), dtype=torch.float32)
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

    from training.model import prepare_demo_model

    source = prepare_demo_model()
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(folder / "adapter"))
    model.merge_and_unload().save_pretrained(str(folder / "by hand"))
    AutoTokenizer.from_pretrained(source).save_pretrained(str(folder / "by hand"))


def merge_ours(folder: Path) -> None:
    from deploy.shards import plan_merge, write_model
    from training.config import TrialConfig

    write_model(plan_merge(TrialConfig(), folder / "adapter"), folder / "ours")


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
    from deploy.quantize import QUANTIZATIONS, quantize

    quantize(folder / "ours.gguf", folder / f"ours-{QUANTIZED}.gguf", QUANTIZATIONS[QUANTIZED])


def verify_merge(folder: Path) -> dict[str, Any]:
    """What `merge_adapter` does over and above writing: its time less that of the writing."""
    import torch
    from datasets import Dataset

    from deploy.merge import merge_adapter
    from deploy.shards import plan_merge, write_model
    from training.config import TrialConfig

    config, adapter = TrialConfig(), folder / "adapter"
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
    ("verify", "ours"): verify_merge,
    ("many", "ours"): lambda folder: merge_many(folder, True),
    ("many", "start"): lambda folder: merge_many(folder, False),
}


def many_files(folder: Path, num_shards: int) -> dict[str, float]:
    """Peak memory of the merge of a made-up model over what the process has before it writes."""
    # Never in this process: a child's peak begins with that of the process that starts it.
    model_mb = in_process("make many", str(num_shards), folder)["model_mb"]
    start = in_process("many", "start", folder)["peak_mb"]
    done = in_process("many", "ours", folder)
    return {
        "num_files": num_shards,
        "model_mb": model_mb,
        "file_mb": round(model_mb / num_shards),
        "start_mb": start,
        "peak_mb": done["peak_mb"],
        "merge_mb": done["peak_mb"] - start,
        "time_s": done["time_s"],
    }


def make_many(folder: Path, num_shards: int) -> int:
    """Random float32 weights named as a Llama's, in files of about 200 MB, and an adapter; MB in all."""
    import torch
    from safetensors.torch import save_file

    size_mb = HIDDEN * HIDDEN * 4 / 1e6
    base, adapter = folder / "many", folder / "many-adapter"
    base.mkdir()
    adapter.mkdir()
    weight_map: dict[str, str] = {}
    matrices: dict[str, torch.Tensor] = {}
    total = 0.0
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        modules = [f"model.layers.{number}.w{n}" for n in range(round(SHARD_MB / size_mb))]
        tensors = {f"{module}.weight": torch.randn(HIDDEN, HIDDEN) for module in modules}
        save_file(tensors, base / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += len(tensors) * size_mb
        for module in modules:
            start = f"base_model.model.{module}"
            matrices[f"{start}.lora_A.weight"] = torch.randn(16, HIDDEN)
            matrices[f"{start}.lora_B.weight"] = torch.randn(HIDDEN, 16)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text("{}")
    save_file(matrices, adapter / "adapter_model.safetensors", {"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 16}))
    return round(total)


def merge_many(folder: Path, is_written: bool) -> None:
    from deploy.shards import plan_merge, write_merged
    from training.config import TrialConfig

    config = TrialConfig(model_name_or_path=str(folder / "many"))
    plan = plan_merge(config, folder / "many-adapter")
    if is_written:
        write_merged(plan, folder / "many-merged")


def file_sizes(folder: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Size of each type of the demo model, and how much smaller than f16 it is."""
    from deploy.quantize import QUANTIZATIONS, quantize

    f16 = (folder / "ours.gguf").stat().st_size
    sizes = {"F16": {"size_mb": round(f16 / 1e6, 1), "smaller": 0.0}}
    for name in names:
        outfile = folder / f"size-{name}.gguf"
        quantize(folder / "ours.gguf", outfile, QUANTIZATIONS[name])
        size = outfile.stat().st_size
        sizes[name] = {"size_mb": round(size / 1e6, 1), "smaller": round(1 - size / f16, 3)}
        outfile.unlink()
    return sizes


def medians(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each step, and `all`: its times added, the largest of its peaks."""
    found: dict[str, dict[str, float]] = {
        step: {
            key: round(statistics.median(one[step][key] for one in rounds), 2)
            for key in ("time_s", "peak_mb")
        }
        for step in STEPS
    }
    found["all"] = {
        "time_s": round(sum(found[step]["time_s"] for step in STEPS), 2),
        "peak_mb": max(found[step]["peak_mb"] for step in STEPS),
    }
    return found


def ratios(ways: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        step: {key: round(found[key] / ways["by hand"][step][key], 3) for key in found}
        for step, found in ways["ours"].items()
    }


def table(results: Mapping[str, Any]) -> str:
    """Markdown of everything."""
    by_hand, ours, ratio = results["ways"]["by hand"], results["ways"]["ours"], results["ratio"]
    lines = [
        "| step | by hand, s | ours, s | time | by hand, MB | ours, MB | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for step in (*STEPS, "all"):
        a, b, c = by_hand[step], ours[step], ratio[step]
        lines.append(
            f"| {step} | {a['time_s']:.1f} | {b['time_s']:.1f} | {c['time_s']:.2f}× | "
            f"{a['peak_mb']:.0f} | {b['peak_mb']:.0f} | {c['peak_mb']:.2f}× |"
        )
    verification, many = results["verification"], results["many_files"]
    lines += [
        "",
        f"Verification of the merge, apart: {verification['verification_s']:.1f} s, peak "
        f"{verification['peak_mb']:.0f} MB.",
        "",
        f"Merge of a made-up model of {many['num_files']} files of {many['file_mb']} MB "
        f"({many['model_mb']} MB): {many['merge_mb']} MB over the {many['start_mb']} MB that the process "
        f"has with libraries and adapter; {many['time_s']:.1f} s.",
        "",
        "| type | MB | smaller than F16 |",
        "| --- | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {found['size_mb']:.1f} | {found['smaller']:.0%} |"
        for name, found in results["sizes"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
