"""Answers to fixed prompts: those of PEFT's own model, of leaders only, and at no cost to the training."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

import training.samples
from training.config import TrialConfig
from training.engine import PackedEngine, lora_config
from training.exceptions import ModelError
from training.job import Engine, Job, JobOptions, Outcome, Trials
from training.paths import TrialPaths, read_json
from training.prepared import prepare
from training.run import run_jobs
from training.samples import MAX_NEW_TOKENS, Prompt, generate, read_prompts

Make = Callable[..., TrialConfig]


class Queue(Trials):
    """Jobs of which only those in `leaders` lead."""

    def __init__(self, root: Path, configs: list[TrialConfig], leaders: tuple[int, ...]):
        self.jobs = [
            Job(config=config, paths=TrialPaths(root / f"{n:04d}"), label=f"trial {n}")
            for n, config in enumerate(configs)
        ]
        self.left, self.leaders = list(self.jobs), leaders
        self.asked: list[tuple[int, int, float]] = []
        self.outcomes: list[Outcome] = []

    def next_job(self) -> Job | None:
        return self.left.pop(0) if self.left else None

    def leads(self, job: Job, step: int, loss: float) -> bool:
        number = self.jobs.index(job)
        self.asked.append((number, step, loss))
        return number in self.leaders

    def done(self, job: Job, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def run(
    root: Path,
    configs: list[TrialConfig],
    num_samples: int,
    engine: Engine = "packed",
    leaders: tuple[int, ...] = (0,),
) -> Queue:
    queue = Queue(root, configs, leaders)
    options = JobOptions(slots=2, report_to="none", num_samples=num_samples)
    run_jobs(queue, engine=engine, options=options)
    for outcome in queue.outcomes:
        assert isinstance(outcome, dict), outcome
        assert outcome["state"] == "complete"
    return queue


@pytest.fixture(scope="module")
def make(tiny_settings: dict[str, Any]) -> Make:
    def make_config(**settings: Any) -> TrialConfig:
        return TrialConfig.from_dict({**tiny_settings, "lora_r": 4, "max_steps": 8, **settings})

    return make_config


@pytest.fixture(scope="module")
def configs(make: Make) -> list[TrialConfig]:
    return [make(lora_dropout=0.1), make(learning_rate=2e-3)]


@pytest.fixture(scope="module", params=["packed", "trl"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


@pytest.fixture(scope="module")
def sampled(
    configs: list[TrialConfig], engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Queue:
    return run(tmp_path_factory.mktemp(engine) / "sampled", configs, 3, engine)


def answer_alone(model: Any, tokenizer: Any, question: str) -> str:
    """PEFT's own greedy answer, one prompt at a time, from the chat template."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_leaders_answers_are_those_of_peft_with_its_adapter(
    sampled: Queue, configs: list[TrialConfig]
) -> None:
    paths = sampled.jobs[0].paths
    assert sorted(path.name for path in paths.samples.iterdir()) == ["0.json", "4.json", "8.json"]
    assert read_json(paths.result)["best_step"] == 8  # so the adapter is the one that was sampled
    name = configs[0].model_name_or_path
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    models = {0: model, 8: lambda: PeftModel.from_pretrained(model, paths.adapter)}
    answers = {}
    for step, made in models.items():
        asked = made() if step else made
        record = read_json(paths.sample(step))
        assert (record["step"], record["max_new_tokens"]) == (step, MAX_NEW_TOKENS)
        assert len(record["samples"]) == 3
        for sample in record["samples"]:
            assert sample["prompt"].endswith("even or odd?")
            assert sample["response"] == answer_alone(asked, tokenizer, sample["prompt"])
            assert sample["ended"] or sample["num_tokens"] == MAX_NEW_TOKENS
        answers[step] = [sample["response"] for sample in record["samples"]]
    assert answers[0] != answers[8]


def test_only_leaders_are_sampled_and_every_evaluation_is_asked_about(sampled: Queue) -> None:
    assert sorted(call[:2] for call in sampled.asked) == [(0, 4), (0, 8), (1, 4), (1, 8)]
    losses = [
        (line["step"], line["eval/loss"])
        for line in map(json.loads, sampled.jobs[0].paths.metrics.read_text().splitlines())
        if line.get("eval/loss") is not None and line["step"]
    ]
    assert losses == [call[1:] for call in sampled.asked if call[0] == 0]
    assert not sampled.jobs[1].paths.samples.exists()


def test_training_is_bit_for_bit_the_same_with_and_without_samples(
    sampled: Queue, configs: list[TrialConfig], engine: Engine, tmp_path: Path
) -> None:
    plain = run(tmp_path, configs, 0, engine)
    assert plain.asked == []
    for ours, theirs in zip(sampled.jobs, plain.jobs, strict=True):
        assert not theirs.paths.samples.exists()
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            adapters = [paths.adapter / name for paths in (ours.paths, theirs.paths)]
            assert adapters[0].read_bytes() == adapters[1].read_bytes()
        assert curve(ours.paths) == curve(theirs.paths)
        content = [read_json(paths.result) for paths in (ours.paths, theirs.paths)]
        for result in content:
            del result["train_time_s"]
        assert content[0] == content[1]
        assert read_json(ours.paths.config) == read_json(theirs.paths.config)


def curve(paths: TrialPaths) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("time", "tokens_per_second")}
        for line in lines
    ]


def test_a_trial_survives_a_fault_while_it_is_sampled(
    configs: list[TrialConfig],
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any) -> list[list[int]]:
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr(training.samples, "generate", fail)
    queue = run(tmp_path, configs[:1], 3, engine)
    assert not queue.jobs[0].paths.samples.exists()
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if "samples" in line]
    assert [line.strip() for line in lines] == [
        f"trial 0: no samples at step {step}: out of memory" for step in (4, 8)
    ]


def test_the_packed_model_is_given_back_whatever_happens(configs: list[TrialConfig]) -> None:
    prepared = prepare(configs[0])
    model = prepared.model
    with PackedEngine(model) as packed:
        trial = packed.admit(configs[0], prepared.train, "first")
        packed.admit(configs[1], prepared.train, "second")
        before = packed.evaluate(trial, prepared.validation)
        modes = [module.training for module in model.modules()]
        attention = model.config._attn_implementation
        with contextlib.suppress(ZeroDivisionError), packed.unpacked(trial):
            assert model.config._attn_implementation != attention
            raise ZeroDivisionError
        assert model.config._attn_implementation == attention
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert modes == [module.training for module in model.modules()]
        assert packed.evaluate(trial, prepared.validation).equals(before)
        packed.step()


def test_an_answer_ends_with_the_first_end_token(make: Make) -> None:
    config = make()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    peft: Any = get_peft_model(model.eval(), lora_config(config))
    prompts = [Prompt("", [5, 6, 7]), Prompt("", [9, 8, 7, 6, 5])]
    with torch.no_grad():
        never = generate(peft, prompts, {3})
        end = never[0][10]
        cut = generate(peft, prompts, {end})
    assert [len(answer) for answer in never] == [MAX_NEW_TOKENS, MAX_NEW_TOKENS]
    assert cut[0] == never[0][: never[0].index(end) + 1]
    assert cut[1][:3] == never[1][:3]


def write_dataset(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_prompt_is_the_conversation_up_to_its_last_answer(make: Make, tmp_path: Path) -> None:
    def turns(*contents: str) -> list[dict[str, str]]:
        roles = ("user", "assistant") * len(contents)
        return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]

    records = [
        {"messages": turns(f"First {n}?", f"So {n}.", f"Then {n}?", f"Last {n}.")}
        for n in range(40)
    ]
    data = write_dataset(tmp_path / "turns.jsonl", records)
    config = make(dataset_name=str(data), max_length=256)
    prepared = prepare(config)
    prompts = read_prompts(config, prepared, 4)
    assert len(prompts) == 4
    tokenizer: Any = prepared.tokenizer
    for prompt in prompts:
        number = int(prompt.text.removeprefix("Then ").removesuffix("?"))
        text = tokenizer.apply_chat_template(
            records[number]["messages"][:3], tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(prompt.ids) == text
    assert read_prompts(make(**{**config.to_dict(), "lora_r": 16}), prepared, 4) == prompts
    assert len(read_prompts(config, prepared, 1000)) == len(prepared.validation)


def test_a_plain_texts_prompt_is_its_beginning(make: Make, tmp_path: Path) -> None:
    records = [{"text": f"Text number {n} goes on and on and has its end here."} for n in range(40)]
    config = make(dataset_name=str(write_dataset(tmp_path / "plain.jsonl", records)))
    for prompt in read_prompts(config, prepare(config), 3):
        assert prompt.text.startswith("Text number")
        assert any(
            record["text"].startswith(prompt.text) and record["text"] != prompt.text
            for record in records
        )


def test_no_room_for_an_answer_is_one_line(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    prepared = prepare(config)
    text_config: Any = prepared.model.config.get_text_config()
    monkeypatch.setattr(text_config, "max_position_embeddings", MAX_NEW_TOKENS)
    with pytest.raises(
        ModelError, match="no validation example leaves room for 64 tokens in 64 positions"
    ):
        read_prompts(config, prepared, 3)
