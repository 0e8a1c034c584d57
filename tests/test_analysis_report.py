"""The report command, as a user runs it: on the nine runs of the original study, and on a sweep."""

import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.findings import compare, find
from analysis.load import load_source
from analysis.replay import replay_command
from training.config import TrialConfig
from training.paths import SweepPaths, read_json, write_atomic, write_json, write_text

ROOT = Path(__file__).parent.parent
NINE_RUNS = ROOT / "tests" / "data" / "nine_runs.csv"
HEADER = "name,steps,lr,rank,loss,minutes\n"


def run_report(*args, cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, "-m", "analysis.report", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def paths(tmp_path):
    sweep = SweepPaths(tmp_path / "runs" / "steps")
    write_text(sweep.definition, "method: grid\nparameters: {max_steps: {values: [4, 8]}}\n")
    return sweep


def add_trial(
    sweep,
    number,
    name,
    loss,
    end=None,
    state="complete",
    result=None,
    train=(),
    spread=0.02,
    **params,
):
    """A trial whose examples all have about `loss` at its last step but one, and `end` at its last."""
    trial = sweep.trial(number)
    config = TrialConfig.from_dict(params)
    record = {"settings": config.to_dict(), "number": number, "name": name, "params": params}
    write_json(trial.config, record)
    best_step = config.max_steps - 1 if end else config.max_steps
    for step, mean in ((0, 2.0), (best_step, loss), (config.max_steps, end or loss)):
        noise = np.random.default_rng(17 * number + step).normal(0, spread, 60)
        difficulty = np.random.default_rng(0).normal(0, 0.5, 60)
        difficulty -= difficulty.mean()
        frame = pd.DataFrame({"example_id": [f"e{n}" for n in range(60)], "num_tokens": 10})
        frame["loss_sum"] = 10 * (mean + difficulty + (noise - noise.mean() if step else 0))
        write_atomic(trial.eval_losses(step), frame.to_parquet)
    steps = enumerate(train, 1)
    lines = [{"step": step, "train/loss": train_loss} for step, train_loss in steps]
    write_text(trial.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    if state != "running":
        known = {"eval/loss": loss, "base_eval/loss": 2.0, "best_step": best_step}
        known |= {"state": state, "num_steps": config.max_steps, "train_time_s": 60.0}
        write_json(trial.result, known | (result or {}))


def summary(sweep):
    return "\n".join(find(load_source(sweep.root)).summary)


def caveats(sweep):
    return "\n".join(find(load_source(sweep.root)).caveats)


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """What the command printed about the nine runs, and where it wrote."""
    directory = tmp_path_factory.mktemp("nine")
    return run_report(NINE_RUNS, "--output_dir", directory), directory


def test_the_nine_runs_improve_on_the_baseline_as_the_study_says(nine):
    done, _ = nine
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s+\d\s+exp", line)]
    assert [row[-2] for row in rows] == (
        ["baseline", "17.3", "20.0", "23.0", "17.8", "21.7", "18.8", "21.1", "24.3"]
    )
    assert rows[8] == [
        "8",
        "exp9_optimal_combination",
        "1,000",
        "5e-4",
        "32",
        "0.8916",
        "24.3",
        "52.1",
    ]


def test_the_nine_runs_find_the_best_settings_and_the_dominant_one(nine):
    text = nine[0].stdout
    assert "Best: exp9_optimal_combination (max_steps 1,000, learning_rate 5e-4, lora_r 32)" in text
    assert "24.3 % below the baseline's 1.1774" in text
    assert "Dominant setting: max_steps moves the loss by 0.2706" in text
    assert (
        "lora_r moves the loss by 0.0275 (8: 0.9561, 16: 0.9414, 32: 0.9286 at max_steps 500"
        in text
    )
    assert "The best max_steps, 1,000, is the largest that was tried" in text


def test_train_losses_of_one_seed_are_said_to_carry_no_error_bars(nine):
    text = " ".join(nine[0].stdout.split())
    assert "One seed and no per-example losses: these differences carry no error bars" in text
    assert "final train loss: there is no held-out data" in text
    assert "real difference" not in text


def test_a_csv_is_replayed_with_what_it_tells_and_no_more(nine):
    command = nine[0].stdout.split("trl sft", 1)[1].split("\n\n", 1)[0]
    assert "--model_name_or_path MODEL" in command
    assert "--max_steps 1000" in command
    assert "--seed" not in command
    assert "deploy.promote" not in nine[0].stdout


def test_the_files_of_a_report_say_the_same(nine):
    directory = nine[1]
    markdown = (directory / "EXPERIMENT_REPORT.md").read_text()
    assert "| **8** | **exp9_optimal_combination** | **1,000** | **5e-4** | **32** |" in markdown
    assert "these differences carry no error bars" in markdown
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown):
        assert (directory / image).is_file()
    table = pd.read_csv(directory / "trials.csv")
    assert table["improvement_percent"].round(1).tolist()[1:4] == [17.3, 20.0, 23.0]
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


def test_the_page_needs_no_network_and_carries_plotly_once(nine):
    asked, scripts = [], []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            scripts.append(tag) if tag == "script" else None
            asked.extend(
                value for name, value in attrs if name in ("src", "href", "srcset", "action")
            )

    page = (nine[1] / "report.html").read_text()
    Links().feed(page)
    assert asked == ["data:,"]
    assert scripts
    assert len(page) < 8e6
    assert page.count("plotly.js v") == 1
    assert "@import" not in page.split("</style>")[0]


def test_a_difference_is_called_real_only_where_its_interval_says_so(paths):
    add_trial(paths, 0, "baseline", 1.8, max_steps=4)
    add_trial(paths, 1, "steps", 1.5, max_steps=8)
    add_trial(paths, 2, "near", 1.501, max_steps=6)
    text = summary(paths)
    assert re.search(
        r"16.7 % below the baseline's 1.8000: -0.3000 \[-0.3\d+, -0.2\d+\], a real", text
    )
    assert "Not to be told from the best on these examples: near (1.5010)." in text
    assert "The one of fewest steps is near." in text
    assert "The base model without an adapter has 2.0000: the best trial is 25.0 % below it" in text


def test_a_runner_up_that_is_worse_is_named_with_its_interval(paths):
    add_trial(paths, 0, "baseline", 1.8, max_steps=4)
    add_trial(paths, 1, "steps", 1.5, max_steps=8)
    assert re.search(r"runner-up, baseline, is worse by \+0.3000 \[\+0.2", summary(paths))


def test_a_copy_is_neither_a_tie_nor_a_runner_up(paths):
    add_trial(paths, 0, "baseline", 1.8, max_steps=4)
    add_trial(paths, 1, "steps", 1.5, max_steps=8)
    add_trial(paths, 2, "combination", 1.5, max_steps=8, result={"same_as": 1})
    text = summary(paths)
    assert "Best: steps" in text
    assert "The runner-up, baseline" in text


def test_loss_that_rises_again_is_overfitting_if_train_loss_falls_and_noise_is_neither(paths):
    falling, rising = [1.9, 1.8, 1.7, 1.5], [1.9, 1.8, 1.7, 3.1]
    add_trial(paths, 0, "baseline", 1.8, end=1.801, train=falling, max_steps=4)
    add_trial(paths, 1, "rate", 1.5, end=1.7, train=falling, max_steps=4, learning_rate=1e-3)
    add_trial(paths, 2, "wild", 1.5, end=2.7, train=rising, max_steps=4, learning_rate=1e-2)
    add_trial(paths, 3, "torn", 1.5, end=1.7, max_steps=4, learning_rate=2e-3)
    assert [line for line in summary(paths).splitlines() if "rises again" in line] == [
        "Held-out loss rises again before the end in rate (best at step 3 of 4), "
        "while train loss went on falling: overfitting.",
        "Held-out loss rises again before the end in wild (best at step 3 of 4), "
        "and train loss did not go on falling: unstable.",
        "Held-out loss rises again before the end in torn (best at step 3 of 4), "
        "where no train losses tell whether that is overfitting.",
    ]


def test_an_extreme_of_many_trials_is_not_called_real_as_one_of_two_would_be(paths):
    """Twelve trials that differ by chance alone: the best one is not better than the baseline."""
    pattern = np.random.default_rng(3).normal(0, 1, 60)
    for number in range(12):
        rank = 2 * number + 2
        add_trial(
            paths, number, f"r{rank}" if number else "baseline", 1.8, max_steps=4, lora_r=rank
        )
    # The last one is better by 2.4 standard errors, one of the eleven that it may have been.
    better = paths.trial(11)
    sums = 10 * (pattern - pattern.mean()) / pattern.std(ddof=1)
    losses = pd.read_parquet(paths.trial(0).eval_losses(4))
    losses["loss_sum"] += 0.1 * sums - 2.4 / 60**0.5
    losses.to_parquet(better.eval_losses(4))
    write_json(better.result, read_json(better.result) | {"eval/loss": 1.8 - 0.24 / 60**0.5})

    best = next(line for line in summary(paths).splitlines() if line.startswith("Best: r24"))
    assert best.endswith("which may be chance.")
    results = load_source(paths.root)
    alone = compare(results.best, results.baseline)
    assert alone is not None and alone.excludes_zero
    assert "Bonferroni" in caveats(paths)


def test_fewer_than_eight_examples_show_nothing_and_are_said_to(paths):
    for number, (name, loss) in enumerate([("baseline", 1.8), ("steps", 1.5)]):
        add_trial(paths, number, name, loss, max_steps=4 * (number + 1))
        for file in (paths.trial(number).root / "eval").iterdir():
            pd.read_parquet(file).head(7).to_parquet(file)
    text = summary(paths)
    assert re.search(r"-0\.\d+ \[fewer than 8 examples\], which may be chance", text)
    assert "real difference" not in text
    assert run_report(paths.root, BROWSER_PATH="/bin/false").returncode == 0


def test_the_base_model_is_beaten_only_where_the_interval_says_so(paths):
    add_trial(paths, 0, "baseline", 1.99, spread=0.4, max_steps=4)
    add_trial(paths, 1, "steps", 1.5, max_steps=8)
    assert re.search(
        r"the best trial is 25.0 % below it: -0.5000 \[-0.5\d+, -0.4\d+\], a real difference. "
        r"Not to be told from the base model: baseline\.",
        summary(paths),
    )


def test_what_the_seed_does_is_the_noise_level_and_no_effect(paths):
    for number, (seed, steps, loss) in enumerate(
        [(1, 4, 1.80), (2, 4, 1.82), (1, 8, 1.50), (2, 8, 1.56)]
    ):
        add_trial(paths, number, f"t{number}", loss, max_steps=steps, seed=seed)
    text = summary(paths)
    assert "seed moves" not in text and "seed alone, so its effect" not in text
    assert "max_steps moves the loss by 0.2800" in text
    # Pooled: (2 * 0.01**2 + 2 * 0.03**2) / 2 degrees of freedom.
    assert (
        "Noise level: trials that differ in the seed alone (4 of 2 settings) have a standard "
        "deviation of 0.0316 and differ by up to 0.0600" in text
    )
    assert "An interval does not hold what the seed does: another seed may move" in caveats(paths)


def test_trials_scored_on_other_examples_are_not_ranked(paths):
    add_trial(paths, 0, "baseline", 1.8, max_length=64)
    add_trial(paths, 1, "rank", 1.7, max_length=64, lora_r=8)
    add_trial(paths, 2, "long", 0.9, result={"validation_hash": "other"}, max_length=128)
    text = summary(paths)
    assert text.startswith("Best: rank")
    assert "max_length moves" not in text
    assert "No two trials that were scored on the same examples differ in max_length alone" in text
    assert "not comparable: long." in caveats(paths)
    done = run_report(paths.root, BROWSER_PATH="/bin/false")
    table = pd.read_csv(paths.report / "trials.csv")
    assert table["improvement_percent"].isna().tolist() == [False, False, True]
    assert f"next: python -m deploy.promote {paths.root} --trial 1" in done.stdout


def test_only_scored_trials_have_an_improvement(paths):
    add_trial(paths, 0, "baseline", 1.8, max_steps=4)
    add_trial(paths, 1, "pruned", 1.7, state="pruned", max_steps=8)
    run_report(paths.root, BROWSER_PATH="/bin/false")
    table = pd.read_csv(paths.report / "trials.csv")
    assert table["improvement_percent"].tolist() == [0, pytest.approx(np.nan, nan_ok=True)]


def test_what_stands_in_for_a_baseline_without_a_score_is_named(paths):
    add_trial(paths, 0, "baseline", 1.8, state="failed", max_steps=4)
    add_trial(paths, 1, "steps", 1.7, max_steps=8)
    add_trial(paths, 2, "more", 1.5, max_steps=16)
    assert "The baseline, baseline, is failed: steps stands in for it." in caveats(paths)
    assert "below that of steps, 1.7000" in summary(paths)


def test_trials_no_better_than_the_base_model_are_named(paths):
    add_trial(paths, 0, "baseline", 2.4, max_steps=4)
    add_trial(paths, 1, "steps", 2.2, max_steps=8)
    text = summary(paths)
    assert "the best trial is 10.0 % ABOVE it" in text
    assert "No better than the base model: baseline, steps." in text


def test_a_best_value_between_others_is_not_at_the_edge(paths):
    for number, (steps, loss) in enumerate([(4, 1.8), (6, 1.5), (8, 1.7)]):
        add_trial(paths, number, f"s{steps}", loss, max_steps=steps)
    assert "that was tried" not in summary(paths)


def test_settings_that_always_move_together_are_not_told_apart(paths):
    add_trial(paths, 0, "baseline", 1.8, max_steps=4, lora_r=8)
    add_trial(paths, 1, "both", 1.5, max_steps=8, lora_r=16)
    text = summary(paths)
    assert (
        "No two trials differ in max_steps or lora_r alone, so its effect cannot be told." in text
    )
    assert "Dominant" not in text


def test_one_seed_unfinished_trials_and_other_examples_are_caveats(paths):
    add_trial(paths, 0, "baseline", 1.8, max_steps=4)
    add_trial(paths, 1, "steps", 1.5, max_steps=8)
    add_trial(paths, 2, "broken", 0.1, state="failed", max_steps=6)
    add_trial(paths, 3, "cut", 1.9, max_steps=5, result={"validation_hash": "other"})
    text = caveats(paths)
    assert "Every trial has the same seed (42): another seed may move a loss further" in text
    assert "Not compared: broken (failed)." in text
    assert "Scored on other validation examples" in text
    assert "not comparable: cut." in text


def test_a_sweep_is_reported_into_its_own_directory_with_the_next_command(paths):
    add_trial(paths, 0, "baseline", 1.8, max_steps=4)
    add_trial(paths, 1, "<b>steps</b>", 1.5, max_steps=8)
    add_trial(paths, 2, "later", 1.0, state="running", max_steps=6)
    done = run_report("runs/steps", cwd=paths.root.parent.parent, BROWSER_PATH="/bin/false")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 trials finished, 2.0 minutes in all" in done.stdout
    assert "next: python -m deploy.promote runs/steps" in done.stdout
    page = (paths.report / "report.html").read_text()
    assert "<td>&lt;b&gt;steps&lt;/b&gt;</td>" in page


@pytest.mark.parametrize("browser", ["/bin/false", "/nowhere/chrome"])
def test_without_a_chrome_everything_but_the_pngs_is_there(paths, browser):
    add_trial(paths, 0, "baseline", 1.8, max_steps=4)
    add_trial(paths, 1, "steps", 1.5, max_steps=8)
    done = run_report(paths.root, BROWSER_PATH=browser)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if "no PNGs" in line]
    assert "plotly_get_chrome" in line
    assert {path.name for path in paths.report.iterdir()} == (
        {"EXPERIMENT_REPORT.md", "report.html", "trials.csv", "next_sweep.yaml"}
    )
    assert "![" not in (paths.report / "EXPERIMENT_REPORT.md").read_text()


def test_the_replayed_settings_are_those_that_trl_reads():
    from trl.scripts.sft import make_parser

    config = TrialConfig(
        model_name_or_path="org/model", dataset_name="org/data", lora_r=32, lora_alpha=64.0,
        learning_rate=5e-4, max_steps=7, dtype="float32", use_rslora=True,
        lora_target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    words = shlex.split(replay_command(config).replace("\\\n", " "))
    assert words[:2] == ["trl", "sft"]
    script, training, model, _ = make_parser().parse_args_and_config(
        words[2:], fail_with_unknown_args=True
    )
    assert (script.dataset_name, model.model_name_or_path) == ("org/data", "org/model")
    assert model.use_peft and model.use_rslora and not training.bf16
    assert (model.lora_r, model.lora_alpha, model.lora_target_modules) == (
        32,
        64,
        ["q_proj", "v_proj"],
    )
    assert (training.learning_rate, training.max_steps, training.seed) == (5e-4, 7, 42)
    assert training.assistant_only_loss and training.activation_checkpointing is False


def test_a_schedule_of_its_own_is_replayed_by_the_arguments_that_trl_knows():
    from trl.scripts.sft import make_parser

    config = TrialConfig(
        max_steps=100, lr_scheduler_type="warmup_stable_decay", decay_fraction=0.3, dtype="float32"
    )
    words = shlex.split(replay_command(config).replace("\\\n", " "))
    _, training, _, _ = make_parser().parse_args_and_config(words[2:], fail_with_unknown_args=True)
    assert training.lr_scheduler_kwargs == {"num_decay_steps": 30, "decay_type": "1-sqrt"}
    assert "decay_fraction" not in replay_command(config)
    assert "lr_scheduler_kwargs" not in replay_command(TrialConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "a,60,2e-4,16,oops,7\n", "line 2: loss is 'oops', but must be a number > 0"),
        (None, "is not there, but must be a sweep's directory or a CSV file"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line_and_status_2(tmp_path, text, message):
    path = tmp_path / "runs.csv"
    if text is not None:
        path.write_text(text)
    done = run_report(path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_an_output_directory_that_cannot_be_is_one_line_and_status_2():
    done = run_report(NINE_RUNS, "--output_dir", NINE_RUNS / "below")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "must be a directory to write to" in line
