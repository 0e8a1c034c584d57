"""The packed engine beside TRL's SFTTrainer: same model, data, settings and threads, a process each.

    python -m benchmarks.engine                 all cases, about 12 minutes on 2 cores
    python -m benchmarks.engine --cases main    one of: main, short_answers, mixed_lengths, 4bit, large
    python -m benchmarks.engine --profile 8     where the time of a pack of eight goes

Every engine of a case runs in turn, several rounds of it, and medians are kept: on a shared machine only
ratios within one run mean anything. The share of the peak counts useful work only: the base's products once
for every token that has to be computed, the head at supervised tokens, the adapters. On a GPU all is in
bfloat16, in more steps, and packs of a case share a process; its results stand apart (engine_gpu.json).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deploy.llama_cpp_wheel import has_gpu

RESULTS = Path(__file__).with_name("results")
WORK = Path("runs") / "benchmark_engine"
CASES = {
    "cpu": {
        "main": ["trl", "k1", "k2", "k4", "k8", "k16"],
        "short_answers": ["trl", "k1", "k8"],
        "mixed_lengths": ["trl", "k1", "k8"],
        "4bit": ["trl", "k1", "k8"],
    },
    "gpu": {
        "main": ["trl", "k1", "k2", "k4", "k8", "k16", "k32"],
        "mixed_lengths": ["trl", "k1", "k8", "k16"],
        "4bit": ["trl", "k1", "k8", "k16"],
        "large": ["trl", "k1", "k4", "k8", "k16"],
    },
}
TITLES = {
    "main": "Demo set, at most 256 tokens, batch 2, rank 16 on all linear layers",
    "short_answers": "Answers of 8 tokens: the head's work nearly vanishes",
    "mixed_lengths": "At most 512 tokens, batch 4: SFTTrainer pads to the longest",
    "4bit": "Main case over an NF4 base (bitsandbytes)",
    "large": "Main case over a model of Llama 3.2 1B's shape, with random weights",
}
ON_GPU = has_gpu()
DEVICE = "gpu" if ON_GPU else "cpu"
WARMUP_STEPS = 4 if ON_GPU else 1
STEPS = 20 if ON_GPU else 6
SEED = 3407


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cases = CASES[DEVICE]
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--rounds", type=int, default=3, help="repeats, of which medians are kept")
    parser.add_argument("--profile", type=int, metavar="K", help="trials of a pack to look into")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        case, engines = options.one
        print(json.dumps(measure(case, engines.split(","))))
        return
    if options.profile:
        print(profile(options.profile))
        return
    file = RESULTS / ("engine_gpu.json" if ON_GPU else "engine.json")
    results = json.loads(file.read_text()) if file.is_file() else {}
    RESULTS.mkdir(exist_ok=True)
    for case in options.cases:
        rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in cases[case]}
        for number in range(options.rounds):
            for engines in processes(cases[case]):
                for engine, numbers in in_process(case, engines).items():
                    rounds[engine].append(numbers)
                    print(f"{case} {engine} round {number + 1}: {numbers}", flush=True)
        results[case] = {
            engine: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
            for engine, measured in rounds.items()
        }
        file.write_text(json.dumps(results, indent=2) + "\n")
        file.with_suffix(".md").write_text(table(results))
    print(f"\n{table(results)}\n{file}")


def processes(engines: list[str]) -> list[list[str]]:
    """Which engines share a process: none where memory is the process's peak, packs where it is the GPU's."""
    return [engines[:1], engines[1:]] if ON_GPU else [[engine] for engine in engines]


def in_process(case: str, engines: list[str]) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.engine", "--one", case, ",".join(engines)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, engines: list[str]) -> dict[str, dict[str, float]]:
    """Seconds a trial-step and what goes with it, of engines in this process."""
    import torch

    from training.model import load_model, load_tokenizer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = settings(case)
    model, train = load_model(config), examples(case, config)
    peak = peak_gflops(model)
    measured = {}
    for engine in engines:
        before = peak_memory_gib(fresh=True)
        if engine == "trl":
            numbers = run_trl(config, model, train, load_tokenizer(config))
        else:
            numbers = run_packed(config, model, train, int(engine[1:]))
        numbers["memory_gib"] = round(peak_memory_gib() - before, 3)
        numbers["peak_gflop_per_s"] = round(peak, 1)
        if engine != "trl":
            numbers["share_of_peak"] = round(
                numbers.pop("gflop_per_trial_step") / numbers["s_per_trial_step"] / peak, 3
            )
        measured[engine] = numbers
    return measured


def large_model() -> str:
    """A directory with a model of Llama 3.2 1B's shape, made once."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from training.config import TrialConfig
    from training.model import load_tokenizer

    directory = WORK / "llama-1b"
    if not (directory / "config.json").is_file():
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
        )
        with torch.device("cuda" if ON_GPU else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        load_tokenizer(TrialConfig()).save_pretrained(directory)
        model.save_pretrained(directory)
    return str(directory)


def settings(case: str) -> Any:
    from training.config import TrialConfig

    values: dict[str, Any] = {
        "model_name_or_path": large_model() if case == "large" else "demo",
        "max_length": 512 if case == "mixed_lengths" else 256,
        "per_device_train_batch_size": 4 if case == "mixed_lengths" else 2,
        "lora_r": 16,
        "seed": SEED,
        "max_steps": WARMUP_STEPS + STEPS,
        "dtype": "auto",
        "load_in_4bit": case == "4bit",
    }
    return TrialConfig.from_dict(values)


def examples(case: str, config: Any) -> Any:
    """The demo set's train split, with the labels that the case has."""
    import numpy as np
    from datasets import Dataset

    from training.data import load_splits
    from training.model import load_tokenizer

    train = load_splits(config, load_tokenizer(config)).train
    if case != "short_answers":
        return train
    rows = []
    for row in train:
        tokens, labels = np.array(row["input_ids"]), np.array(row["labels"])  # pyright: ignore
        end = int(np.flatnonzero(labels != -100)[0]) + 8
        rows.append(
            {"example_id": row["example_id"], "input_ids": tokens[:end], "labels": labels[:end]}  # pyright: ignore
        )
    return Dataset.from_list(rows)


def run_trl(config: Any, model: Any, train: Any, tokenizer: Any) -> dict[str, float]:
    """SFTTrainer at its best here: no checkpointing; padding-free needs flash attention, so a GPU."""
    from transformers import PrinterCallback, TrainerCallback
    from trl.trainer.sft_trainer import SFTTrainer

    from training.engine import lora_config
    from training.paths import TrialPaths
    from training.trl_engine import sft_config

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            wait_for_device()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            model=model,
            args=sft_config(config, TrialPaths(Path(directory)), model),
            train_dataset=train.select_columns(["input_ids", "labels"]),
            processing_class=tokenizer,
            peft_config=lora_config(config),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return per_step(times[WARMUP_STEPS - 1 :], num_tokens_of(config, train))


def run_packed(config: Any, model: Any, train: Any, slots: int) -> dict[str, float]:
    """As many trials as slots, equal but for their learning rate: the work of a trial-step is the same."""
    from training import engine as engine_module
    from training.config import TrialConfig
    from training.examples import Examples

    rows: list[tuple[int, int]] = []
    build_row = engine_module.build_row

    def counting(*args: Any) -> Any:
        row = build_row(*args)
        rows.append((len(row), len(row.target_N)))
        return row

    with engine_module.PackedEngine(model) as engine:
        data = Examples(train)
        for number in range(slots):
            changed = {**config.to_dict(), "learning_rate": 1e-4 * (1 + number)}
            engine.admit(TrialConfig.from_dict(changed), data, f"t{number}")
        for _ in range(WARMUP_STEPS):
            engine.step()
        engine_module.build_row = counting
        wait_for_device()
        times = [time.perf_counter()]
        for _ in range(STEPS):
            engine.step()
        wait_for_device()
        times.append(time.perf_counter())
        engine_module.build_row = build_row
        adapter = engine.trials[0].adapter.weights.numel()
        linear = sum(
            layer.in_features * layer.out_features
            for group in engine.lora.groups
            for layer in group.layers
        )
    numbers = per_step(times, num_tokens_of(config, train), slots)
    text_config = model.config.get_text_config()
    head = text_config.vocab_size * text_config.hidden_size
    # Two operations a product; forward and the input's gradient for what is frozen, three for adapters.
    flop = sum(
        4 * (linear * tokens + head * targets) + 6 * adapter * tokens for tokens, targets in rows
    )
    numbers["gflop_per_trial_step"] = flop / STEPS / slots / 1e9
    numbers["computed_tokens"] = round(sum(tokens for tokens, _ in rows) / STEPS / slots, 1)
    numbers["supervised_tokens"] = round(sum(targets for _, targets in rows) / STEPS / slots, 1)
    return numbers


OPERATIONS = {
    "matrix products (mm, addmm, bmm, baddbmm)": ("aten::mm", "aten::addmm_", "aten::bmm", "aten::baddbmm"),
    "Python of the LoRA layers and of attention": (
        "_PackedLinear", "_PackedLinearBackward", "_Explicit", "_ExplicitBackward", "_WeightedLoss",
    ),
    "norms, rotary embedding, SwiGLU, residual sums": (
        "aten::mul", "aten::mul_", "aten::add", "aten::add_", "aten::pow", "aten::mean", "aten::rsqrt",
        "aten::silu", "aten::silu_backward", "aten::neg", "aten::div", "aten::sum",
    ),
    "softmax of attention and head": (
        "aten::_softmax", "aten::_softmax_backward_data", "aten::amax", "aten::log",
    ),
    "copies, concatenation, zeros": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
    "AdamW, clipping": ("aten::_fused_adamw_", "aten::linalg_vector_norm"),
}  # fmt: skip


def profile(slots: int) -> str:
    """Markdown: share of a step's time by kind of operation, of the main case."""
    import torch
    from torch.profiler import ProfilerActivity

    from training.config import TrialConfig
    from training.engine import PackedEngine
    from training.examples import Examples
    from training.model import load_model

    config = settings("main")
    data = Examples(examples("main", config))
    with PackedEngine(load_model(config)) as engine:
        for number in range(slots):
            changed = {**config.to_dict(), "learning_rate": 1e-4 * (1 + number)}
            engine.admit(TrialConfig.from_dict(changed), data, f"t{number}")
        engine.step()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(2):
                engine.step()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    rows = {
        name: sum(times.get(key, 0) for key in keys) / total for name, keys in OPERATIONS.items()
    }
    rows["everything else"] = 1 - sum(rows.values())
    lines = ["| kind of operation | share of the time |", "| --- | ---: |"]
    return "\n".join(lines + [f"| {name} | {share:.0%} |" for name, share in rows.items()])


def num_tokens_of(config: Any, train: Any) -> int:
    """Tokens of the timed steps of one trial."""
    from training.examples import BatchOrder, Examples

    data = Examples(train)
    order = BatchOrder(len(data), config.per_device_train_batch_size, 1, config.seed)
    steps = range(WARMUP_STEPS, WARMUP_STEPS + STEPS)
    return sum(int(data.lengths[batch].sum()) for s in steps for batch in order.micro_batches(s))


def per_step(times: list[float], num_tokens: int, slots: int = 1) -> dict[str, float]:
    elapsed = times[-1] - times[0]
    return {
        "s_per_trial_step": round(elapsed / STEPS / slots, 4),
        "trial_steps_per_s": round(STEPS * slots / elapsed, 4),
        "tokens_per_s": round(num_tokens * slots / elapsed, 1),
        "tokens": round(num_tokens / STEPS, 1),
    }


def peak_gflops(model: Any) -> float:
    """Sustained rate of a product as of this model's widest layer, in the same process."""
    import torch

    config = model.config.get_text_config()
    shape = {"dtype": model.dtype, "device": model.device}
    x = torch.randn(8192 if ON_GPU else 1024, config.hidden_size).to(**shape)
    weight = torch.randn(config.intermediate_size, config.hidden_size).to(**shape)
    torch.nn.functional.linear(x, weight)
    wait_for_device()
    number, started = 0, time.perf_counter()
    while time.perf_counter() - started < 1:
        for _ in range(200 if ON_GPU else 1):
            torch.nn.functional.linear(x, weight)
        wait_for_device()
        number += 200 if ON_GPU else 1
    return 2 * x.numel() * len(weight) * number / (time.perf_counter() - started) / 1e9


def wait_for_device() -> None:
    import torch

    if ON_GPU:
        torch.cuda.synchronize()


def peak_memory_gib(*, fresh: bool = False) -> float:
    """The process's peak so far, or on a GPU that of its tensors since the last `fresh` one."""
    import torch

    if not ON_GPU:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if fresh:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**30


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown of all cases; the ratio is to SFTTrainer's trial-steps a second."""
    lines = []
    for case, engines in results.items():
        lines += [
            f"**{TITLES[case]}**",
            "",
            "| engine | s / trial-step | trial-steps / s | against SFTTrainer | tokens / s | "
            "memory over the model, GiB | useful share of the peak |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, numbers in engines.items():
            ratio = numbers["trial_steps_per_s"] / engines["trl"]["trial_steps_per_s"]
            label = "SFTTrainer" if name == "trl" else f"packed, K = {name[1:]}"
            share = f"{numbers['share_of_peak']:.0%}" if "share_of_peak" in numbers else ""
            lines.append(
                f"| {label} | {numbers['s_per_trial_step']:.3f} | {numbers['trial_steps_per_s']:.2f} | "
                f"{ratio:.2f}× | {numbers['tokens_per_s']:.0f} | {numbers['memory_gib']:.2f} | {share} |"
            )
        one = engines["k1"]
        lines += [
            "",
            f"A trial-step has {one['tokens']:.0f} tokens; {one['computed_tokens']:.0f} are left when "
            f"common beginnings are computed once, and {one['supervised_tokens']:.0f} are supervised. "
            f"Peak: {one['peak_gflop_per_s']:.0f} GFLOP/s.",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
