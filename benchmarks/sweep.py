"""A whole sweep four ways: 36 trials of steps x learning rate x rank, by hand and by `sweeps.run`.

    python -m benchmarks.sweep                          three seeds, all ways: hours on 2 cores
    python -m benchmarks.sweep --seeds 3407 --ways a b  some of it; what is in the results is left out
    python -m benchmarks.sweep --scale gpu              the study that this began with, at full size
    python -m benchmarks.sweep --scale gpu_demo --side_by_side 8 --ways a d --seeds 3407   minutes on a GPU

(a) all 36 in turn, a script and so a process each, in plain TRL and PEFT; (b) packed; (c) with the stage
tree; (d) with pruning besides, by rank confirmed by a test, and by rank alone (strict). (b) to (d) are whole
commands: start, imports, model, evaluations and files are in their time. Model, examples, labels, seed,
schedule and the steps of evaluations are the same in all. (a) finds its examples tokenised already, for
nothing, and what this comparison alone needs, the last adapter's loss of each example, is not in its time.

With `--side_by_side` one trial of each length is timed alone and stands for all of that length, which are
then trained several at a time, for their losses.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.sweep_table import (
    SPLIT,
    VARIED,
    WAYS,
    Result,
    compare,
    describe,
    point_key,
    points,
    table,
    winner_file,
)

RESULTS = Path(__file__).with_name("results")
WORK = Path("runs") / "benchmark_sweep"
SEEDS = [3407, 1, 2]
STUDY = {
    "max_steps": [4, 8, 16, 32],
    "learning_rate": [2e-4, 5e-4, 1e-3],
    "lora_r": [8, 16, 32],
    "lr_scheduler_type": "warmup_stable_decay",
    "eval_steps": 4,
    "model_name_or_path": "demo",
    "dataset_name": "demo",
    "max_length": 128,
    "per_device_train_batch_size": 2,
    "max_eval_samples": 32,
}
SCALES: dict[str, dict[str, Any]] = {
    "cpu": STUDY,
    "small": {**STUDY, "max_steps": [4, 8, 16]},
    "gpu": {
        **STUDY,
        "max_steps": [60, 300, 500, 1000],
        "learning_rate": [1e-4, 2e-4, 5e-4],
        "warmup_steps": 5,
        "eval_steps": 20,
        "model_name_or_path": "meta-llama/Llama-3.2-1B-Instruct",
        "dataset_name": "mlabonne/FineTome-100k",
        "max_length": 2048,
        "gradient_accumulation_steps": 4,
        "weight_decay": 0.01,
        "max_eval_samples": 256,
    },
    "gpu_demo": {
        **STUDY,
        "max_steps": [50, 100, 200],
        "warmup_steps": 5,
        "eval_steps": 25,
        "max_length": 256,
        "per_device_train_batch_size": 4,
        "max_eval_samples": 128,
    },
    "smoke": {**STUDY, "max_steps": [2, 4], "lora_r": [8], "eval_steps": 2, "max_eval_samples": 8},
}
HYPERBAND = {"type": "hyperband", "min_iter": 2, "eta": 3}
EARLY_TERMINATE = {"d": HYPERBAND, "d_strict": {**HYPERBAND, "strict": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="what the trials are")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--side_by_side", type=int, default=1, help="trials of (a) that train at once"
    )
    parser.add_argument("--fresh", action="store_true", help="measure these seeds and ways again")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(*options.child)
        return
    ways = [way for way in WAYS if way in options.ways]
    name = "sweep" if options.scale == "cpu" else f"sweep_{options.scale}"
    work = WORK / options.scale
    file = (work if options.scale == "smoke" else RESULTS) / f"{name}.json"
    scale = SCALES[options.scale]
    text = run(scale, options.seeds, ways, file, work, options.side_by_side, fresh=options.fresh)
    print(f"\n{text}\n{file}")


def run(
    scale: dict[str, Any],
    seeds: list[int],
    ways: list[str],
    file: Path,
    work: Path,
    side_by_side: int = 1,
    *,
    fresh: bool = False,
) -> str:
    """Measures what `file` lacks, writes it after each way, and its table beside it.

    Args:
        scale: settings of the trials; those in VARIED are lists.
        seeds: of the trials.
        ways: keys of WAYS.
        file: results, JSON.
        work: directory for the trials' files.
        side_by_side: trials of (a) that train at once, after one of each length has been timed alone.
        fresh: measure what is there, too.

    Returns:
        The table.
    """
    results = json.loads(file.read_text()) if file.is_file() else {}
    if results.get("settings", scale) != scale:
        if not fresh:
            sys.exit(f"{file} has results of other settings: move it away, or give --fresh")
        results = {}
    results = {"settings": scale, "seeds": results.get("seeds", {})}
    file.parent.mkdir(parents=True, exist_ok=True)
    for seed, way in itertools.product(seeds, ways):
        measured, directory = results["seeds"].setdefault(str(seed), {}), work / str(seed)
        if way in measured and not fresh:
            print(f"seed {seed} {way}: is there already", flush=True)
            continue
        if fresh or way != "a":  # the trials of (a) are timed one by one: it can go on
            shutil.rmtree(directory / way, ignore_errors=True)
        prepare_examples(scale, seed, directory)
        print(f"seed {seed} {way}: {WAYS[way]}", flush=True)
        measured[way] = (
            measure_scripts(way, scale, seed, directory, side_by_side)
            if way == "a"
            else measure_sweep(way, scale, seed, directory)
        )
        compare(measured, directory)
        file.write_text(json.dumps(results, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(results))
        for trial in (directory / way).glob("[0-9]*.json"):
            trial.unlink()  # another start, if one is wanted, measures again
        print(f"seed {seed} {way}: {describe(measured[way])}", flush=True)
    return table(results)


def run_child(name: str, *arguments: str) -> None:
    """What has a process of its own."""
    if name == "prepare":
        save_examples(Path(arguments[0]))
    elif name == "train":
        train_alone(Path(arguments[0]), started=float(arguments[1]))
    elif name == "sweep_without_stages":
        sweep_without_stages(*arguments)


def in_process(*child: object, log: Path) -> None:
    """Runs a child; what it prints goes to `log`."""
    command = [sys.executable, "-m", "benchmarks.sweep", "--child", *map(str, child)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        done = subprocess.run(command, stdout=output, stderr=output, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-4000:]}")


def prepare_examples(scale: dict[str, Any], seed: int, directory: Path) -> None:
    """Tokenised examples and the demo model, once for all ways: nobody's time."""
    settings = {**scale, "seed": seed}
    if (directory / "validation.parquet").is_file() and _settings(directory) == settings:
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(settings))
    in_process("prepare", directory, log=directory / "log.txt")


def _settings(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def save_examples(directory: Path) -> None:
    from training.config import TrialConfig
    from training.data import load_splits
    from training.model import load_tokenizer

    settings = _settings(directory)
    config = TrialConfig.from_dict({**settings, **points(settings)[0]})
    splits = load_splits(config, load_tokenizer(config))
    for name in ("train", "validation"):
        getattr(splits, name).to_parquet(directory / f"{name}.parquet")


# (a): a user's scripts


def measure_scripts(
    way: str, scale: dict[str, Any], seed: int, directory: Path, side_by_side: int
) -> Result:
    """All trials in turn, a process each; those that an earlier start has finished are kept."""
    every = points(scale)
    first = {point["max_steps"]: number for number, point in reversed(list(enumerate(every)))}
    alone = [n for n in range(len(every)) if side_by_side == 1 or n in first.values()]
    measured: dict[int, Result] = {}

    def train(number: int) -> None:
        settings = {**scale, **every[number], "seed": seed}
        measured[number] = train_trial(directory / way / f"{number:02d}", settings)
        left = [point for n, point in enumerate(every) if n not in measured]
        trial = measured[number]
        print(
            f"  {len(measured)} of {len(every)}: {point_key(every[number])}: loss "
            f"{trial['loss']:.4f}, {trial['wall_clock_s']:.1f} s, about "
            f"{_seconds_left(list(measured.values()), left) / side_by_side / 60:.0f} min left",
            flush=True,
        )

    for number in alone:
        train(number)
    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(train, [n for n in range(len(every)) if n not in alone]))
    times = ["wall_clock_s", "end_s", "start_s", "load_s", "steps_s", "evaluations_s"]
    trials = [measured[number] for number in range(len(every))]
    for point, trial in zip(every, trials, strict=True):
        if side_by_side > 1:
            trial.update({name: measured[first[point["max_steps"]]][name] for name in times})
    losses = {point_key(p): t["loss"] for p, t in zip(every, trials, strict=True)}
    winner = min(losses, key=losses.__getitem__)
    number = list(losses).index(winner)
    shutil.copy(directory / way / f"{number:02d}" / "losses.parquet", winner_file(directory, way))
    wall_clock_s = sum(trial["wall_clock_s"] for trial in trials)
    split = {name: sum(trial.get(name, 0) for trial in trials) for name in SPLIT}
    split["work_s"] = wall_clock_s - sum(split.values())
    beginnings = split["start_s"] + split["load_s"]
    return {
        "wall_clock_s": round(wall_clock_s, 1),
        "one_process_s": round(wall_clock_s - beginnings + beginnings / len(trials), 1),
        "split_s": {name: round(value, 1) for name, value in split.items()},
        "trial_steps": sum(trial["steps"] for trial in trials),
        "tokens": sum(trial["tokens"] for trial in trials),
        "num_pruned": 0,
        "num_timed": len(alone),
        "winner": winner,
        "winner_loss": losses[winner],
        "losses": losses,
        "seconds": {
            key: round(t["wall_clock_s"], 1) for key, t in zip(losses, trials, strict=True)
        },
    }


def train_trial(trial: Path, settings: dict[str, Any]) -> Result:
    """One of them, unless its file is there: its settings' loss, steps, tokens and times."""
    file = trial.with_suffix(".json")
    if not file.is_file():
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir(parents=True)
        (trial / "config.json").write_text(json.dumps(settings))
        started = time.time()
        in_process("train", trial, started, log=trial / "log.txt")
        ended = time.time()
        measured = json.loads((trial / "measured.json").read_text())
        measured["wall_clock_s"] = ended - started - measured.pop("scoring_s")
        measured["end_s"] = ended - measured.pop("ended")
        file.write_text(json.dumps(measured))
        shutil.rmtree(trial / "adapter")
    return json.loads(file.read_text())


def _seconds_left(done: list[Result], left: list[dict[str, Any]]) -> float:
    working = sum(trial["steps_s"] + trial["evaluations_s"] for trial in done)
    around = sum(trial["wall_clock_s"] for trial in done) - working
    steps = sum(point["max_steps"] for point in left)
    pace_s = working / sum(trial["steps"] for trial in done)
    return steps * pace_s + len(left) * around / len(done)


def train_alone(directory: Path, started: float) -> None:
    """The script of one trial, as its user would write it; then, for us, its times and losses."""
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from training.config import TrialConfig
    from training.model import load_model, load_tokenizer
    from training.schedules import scheduler_kwargs

    imported = time.time()
    config = TrialConfig.from_dict(_settings(directory))
    train, validation = (
        Dataset(pq.read_table(directory.parents[1] / f"{name}.parquet"))
        for name in ("train", "validation")
    )
    model, tokenizer = load_model(config), load_tokenizer(config)
    loaded = time.time()
    on_gpu = model.device.type == "cuda"
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(directory / "adapter"),
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            lr_scheduler_kwargs=scheduler_kwargs(config),
            warmup_steps=config.warmup_steps,
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            weight_decay=config.weight_decay,
            seed=config.seed,
            gradient_checkpointing=False,  # it fits, and the others have none either
            bf16=model.dtype == torch.bfloat16,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=on_gpu,
            max_length=None,  # the examples are cut already
            eval_strategy="steps",
            eval_steps=config.eval_steps,
            per_device_eval_batch_size=config.per_device_eval_batch_size,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train.select_columns(["input_ids", "labels"]),
        eval_dataset=validation.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType] - any number works
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    begun = time.time()
    trainer.train()
    trained = time.time()
    trainer.save_model()
    saved = time.time()

    from training.evaluate import example_losses, mean_loss

    adapted: Any = trainer.model
    losses = example_losses(adapted.get_base_model(), validation, config.per_device_eval_batch_size)
    losses.to_parquet(directory / "losses.parquet")
    logs = trainer.state.log_history
    evaluations_s = sum(log.get("eval_runtime", 0) for log in logs)
    measured = {
        "loss": mean_loss(losses),
        "steps": trainer.state.global_step,
        "tokens": max(int(log.get("eval_num_tokens", 0)) for log in logs),  # of training
        "start_s": imported - started,
        "load_s": loaded - imported,
        "steps_s": trained - begun - evaluations_s,
        "evaluations_s": evaluations_s,
        "scoring_s": time.time() - saved,
        "ended": time.time(),
    }
    (directory / "measured.json").write_text(json.dumps(measured))


# (b) to (d): the command


def measure_sweep(way: str, scale: dict[str, Any], seed: int, directory: Path) -> Result:
    """`python -m sweeps.run`, from before its start to after its end."""
    import yaml

    from sweeps.ledger import read_sweep

    config = directory / way / "sweep.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump(sweep_definition(way, scale, seed), sort_keys=False))
    program = (
        ["benchmarks.sweep", "--child", "sweep_without_stages"] if way == "b" else ["sweeps.run"]
    )
    arguments = [str(config), "--output_dir", str(config.parent), "--report_to", "none"]
    started = time.time()
    done = subprocess.run([sys.executable, "-m", *program, *arguments], check=False)
    ended = time.time()
    record = read_sweep(config.parent / "sweep")
    ends = {"complete", "pruned"}
    if done.returncode or [t.state for t in record.all_trials if t.state not in ends]:
        sys.exit(f"{record.paths.root}: the sweep failed, or one of its trials did")
    result = read_result(record, started, ended)
    winner = record.best()
    last = winner.eval_losses(winner.settings["max_steps"])
    last.to_parquet(winner_file(directory, way))
    for heavy in [record.paths.stages, *(trial.paths.adapter for trial in record.trials)]:
        shutil.rmtree(heavy, ignore_errors=True)
    return result


def sweep_definition(way: str, scale: dict[str, Any], seed: int) -> dict[str, Any]:
    settings = {**scale, "seed": seed}
    definition = {
        "name": "sweep",
        "method": "grid",
        "metric": {"name": "eval/loss", "goal": "minimize"},
        "parameters": {
            name: {"values" if name in VARIED else "value": value}
            for name, value in settings.items()
        },
    }
    if way in EARLY_TERMINATE:
        definition["early_terminate"] = EARLY_TERMINATE[way]
    return definition


def sweep_without_stages(*arguments: str) -> None:
    """`sweeps.run`, whose packed engine always shares stages, but for that."""
    import sweeps.run
    from sweeps.trial_queue import TrialQueue
    from training.cli import run_command

    def alone(**values: Any) -> TrialQueue:
        return TrialQueue(**{**values, "shares_stages": False})

    sweeps.run.TrialQueue = alone  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = ["sweeps.run", *arguments]
    run_command(sweeps.run.main)


def read_result(record: Any, started: float, ended: float) -> Result:
    """What the files of a sweep say; `started` and `ended` are the command's, in Unix seconds."""
    from training.paths import read_json
    from training.schedules import is_cooling_down

    trials = record.trials
    own = [_own_work(trial) for trial in trials]
    steps, tokens, last = map(list, zip(*own, strict=True))
    firsts = [line["time"] for trial in trials for line in trial.metrics()[:1]]
    split = {
        "start_s": min(trial.paths.config.stat().st_mtime for trial in trials) - started,
        "load_s": min(firsts) - min(trial.paths.config.stat().st_mtime for trial in trials),
        "end_s": ended - max(last),
    }
    split["work_s"] = ended - started - sum(split.values())
    longest = max(trial.settings["max_steps"] for trial in trials)
    rungs: dict[str, dict[str, float]] = {}
    for trial in trials:
        for line in trial.metrics() if trial.settings["max_steps"] == longest else []:
            is_trunk = not is_cooling_down(trial.config, line["step"])
            is_rung = is_trunk and 0 < line["step"] < longest
            if is_rung and "eval/loss" in line and trial.state == "complete":
                losses = rungs.setdefault(str(line["step"]), {})
                losses[point_key(trial.params)] = line["eval/loss"]
    winner = record.best()
    environment = read_json(record.paths.environment)
    git = environment["git"] or {}
    return {
        "wall_clock_s": round(ended - started, 1),
        "split_s": {name: round(split[name], 1) for name in SPLIT},
        "trial_steps": sum(steps),
        "tokens": sum(tokens),
        "num_pruned": sum(trial.state == "pruned" for trial in trials),
        "winner": point_key(winner.params),
        "winner_loss": winner.result["last_eval/loss"],
        "winner_best_step": winner.result["best_step"],
        "losses": {
            point_key(trial.params): trial.result["last_eval/loss"]
            for trial in trials
            if trial.state == "complete"
        },
        "rungs": rungs,
        "device": environment["device"],
        "commit": git.get("commit", "")[:7] + (" and changes" if git.get("dirty") else ""),
    }


def _own_work(trial: Any) -> tuple[int, int, float]:
    """Steps and tokens without its stage's, and the time of the last line."""
    from training.paths import SweepPaths, read_json

    result, tokens = trial.result, trial.result["tokens"]
    if result["forked_from"]:
        stage = SweepPaths(trial.paths.root.parents[1]).stages / result["forked_from"]["stage"]
        tokens -= read_json(stage / "state" / "state.json")["record"]["tokens"]
    num_steps = result["num_steps"] - result["steps_saved"]
    return num_steps, tokens, trial.metrics()[-1]["time"]


if __name__ == "__main__":
    main()
