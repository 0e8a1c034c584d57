"""Packed trials against the same trials alone in SFTTrainer and PEFT, on tiny random models in float32."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from training.config import TrialConfig
from training.engine import PackedEngine
from training.evaluate import example_losses, mean_loss
from training.examples import Examples
from training.exceptions import ModelError
from training.model import load_tokenizer
from training.trial import StepResult, TrialState

VOCABULARY = 128
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOLERANCE = 1e-4

MIXED: list[dict[str, Any]] = [
    {"lora_r": 1, "learning_rate": 1e-2, "lr_scheduler_type": "linear"},
    {"lora_r": 64, "learning_rate": 2e-3, "per_device_train_batch_size": 1, "warmup_steps": 5},
    {
        "lora_r": 8,
        "gradient_accumulation_steps": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
    },
    {"lora_r": 16, "weight_decay": 0.3, "lr_scheduler_type": "constant", "seed": 7},
    {"lora_r": 6, "max_grad_norm": 0.05, "lr_scheduler_type": "constant_with_warmup"},
    {"lora_r": 32, "use_rslora": True, "max_steps": 57, "gradient_accumulation_steps": 3},
    {"lora_r": 5, "lora_alpha": 40, "lora_target_modules": ["q_proj", "down_proj", "up_proj"]},
    {
        "lora_r": 12,
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": 4,
        "max_grad_norm": 0,
        "lora_target_modules": ["q_proj", "v_proj"],
    },
]


def make_config(**settings: Any) -> TrialConfig:
    defaults = {
        "max_steps": 50,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 3,
        "lora_r": 4,
        "dtype": "float32",
    }
    return TrialConfig.from_dict({**defaults, **settings})


def make_model(kind: type = transformers.LlamaConfig, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = kind(**{**TINY, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model.requires_grad_(False)


def make_examples(num: int = 31, longest: int = 24, seed: int = 1) -> Dataset:
    """Sequences with a common beginning, as a chat template gives them."""
    generator = np.random.default_rng(seed)
    prefix = generator.integers(3, VOCABULARY, 4)
    rows = []
    for index in range(num):
        length = int(generator.integers(2, longest))
        tokens = np.concatenate([prefix, generator.integers(3, VOCABULARY, length)])
        labels = np.where(generator.random(len(tokens)) < 0.4, -100, tokens)
        labels[: len(prefix)] = -100
        labels[-1] = tokens[-1]
        row = {"example_id": f"e{index}", "input_ids": tokens, "labels": labels}
        rows.append(row)
    return Dataset.from_list(rows)


TRAIN, VALIDATION = make_examples(), make_examples(9, seed=2)


@dataclasses.dataclass
class Run:
    """What a finished trial is compared by."""

    steps: list[tuple[float, float, float]]
    """Loss, gradient norm and learning rate of every step."""
    eval_loss: float
    weights: dict[str, torch.Tensor]


def run_alone(config: TrialConfig, model: Any, directory: Path, train: Dataset = TRAIN) -> Run:
    """The trial in plain TRL and PEFT."""
    steps = []

    class Record(transformers.TrainerCallback):
        rate = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.rate = kwargs["optimizer"].param_groups[0]["lr"]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                steps.append((logs["loss"], float(logs["grad_norm"]), self.rate))

    targets = config.lora_target_modules
    is_wsd = config.lr_scheduler_type == "warmup_stable_decay"
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(directory),
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            lr_scheduler_kwargs=(
                {"num_decay_steps": round(0.2 * config.max_steps), "decay_type": "1-sqrt"}
                if is_wsd
                else {}
            ),
            warmup_steps=config.warmup_steps,
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            max_length=None,
            logging_steps=1,
            logging_nan_inf_filter=False,
            activation_checkpointing=False,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=train.select_columns(["input_ids", "labels"]),
        processing_class=load_tokenizer(TrialConfig()),
        peft_config=LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
            use_rslora=config.use_rslora,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        ),
        callbacks=[Record()],
    )
    trainer.train()
    adapted: Any = trainer.model
    loss = mean_loss(example_losses(adapted.get_base_model(), VALIDATION, 4))
    return Run(steps, loss, get_peft_model_state_dict(adapted))


def finish(engine: PackedEngine, trials: list[TrialState], directory: Path) -> list[Run]:
    """Trains to the end, retiring each trial when it is done."""
    steps: dict[str, list[StepResult]] = {trial.adapter.name: [] for trial in trials}
    runs: dict[str, Run] = {}
    while engine.trials:
        for trial, result in engine.step():
            name = trial.adapter.name
            steps[name].append(result)
            if trial.is_done:
                runs[name] = close(engine, trial, steps[name], directory / name)
    return [runs[trial.adapter.name] for trial in trials]


def close(
    engine: PackedEngine, trial: TrialState, steps: list[StepResult], directory: Path
) -> Run:
    loss = mean_loss(engine.evaluate(trial, Examples(VALIDATION)))
    engine.lora.save(trial.adapter.name, directory)
    engine.retire(trial)
    weights = load_file(directory / "adapter_model.safetensors")
    curve = [(result.train_loss, result.grad_norm, result.learning_rate) for result in steps]
    return Run(curve, loss, weights)


def run_packed(
    configs: list[TrialConfig], model: Any, directory: Path, train: Dataset = TRAIN
) -> list[Run]:
    with PackedEngine(model) as engine:
        examples = Examples(train)
        trials = [engine.admit(config, examples, f"t{n}") for n, config in enumerate(configs)]
        return finish(engine, trials, directory)


def assert_equal(ours: Run, reference: Run, tolerance: float = TOLERANCE) -> None:
    assert len(ours.steps) == len(reference.steps)
    np.testing.assert_allclose(ours.steps, reference.steps, rtol=tolerance)
    assert ours.eval_loss == pytest.approx(reference.eval_loss, rel=tolerance)
    assert ours.weights.keys() == reference.weights.keys()
    for name, weight in reference.weights.items():
        scale = float(weight.abs().max())
        assert torch.allclose(ours.weights[name], weight, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Every mixed trial by itself in TRL."""
    directory = tmp_path_factory.mktemp("trl")
    return [run_alone(make_config(**settings), make_model(), directory) for settings in MIXED]


@pytest.mark.parametrize("number", [2, 5, 6], ids=["accumulation", "rslora", "some targets"])
def test_a_trial_by_itself_equals_trl(number: int, alone: list[Run], tmp_path: Path) -> None:
    (run,) = run_packed([make_config(**MIXED[number])], make_model(), tmp_path)
    assert_equal(run, alone[number])


def test_eight_unlike_trials_in_a_pack_each_equal_trl(alone: list[Run], tmp_path: Path) -> None:
    runs = run_packed([make_config(**settings) for settings in MIXED], make_model(), tmp_path)
    for run, reference in zip(runs, alone, strict=True):
        assert_equal(run, reference)


@pytest.mark.parametrize(
    "kind",
    [transformers.Qwen3Config, transformers.MistralConfig, transformers.Gemma2Config],
    ids=lambda kind: kind.model_type,
)
def test_other_architectures_equal_trl(kind: type, tmp_path: Path) -> None:
    # A window shorter than the sequences, and soft-capped scores where the architecture has them.
    windowed = {} if kind is transformers.Qwen3Config else {"sliding_window": 6}
    config = make_config(lora_r=4, max_steps=50)
    reference_model = make_model(kind, **windowed, attn_implementation="eager")
    reference = run_alone(config, reference_model, tmp_path / "trl")
    run, _ = run_packed([config, make_config(seed=5)], make_model(kind, **windowed), tmp_path)
    assert_equal(run, reference)


def test_mates_that_join_and_leave_change_nothing(alone: list[Run], tmp_path: Path) -> None:
    examples = Examples(TRAIN)
    with PackedEngine(make_model()) as engine:
        trial = engine.admit(make_config(**MIXED[2]), examples, "ours")
        mate = engine.admit(make_config(max_steps=5), examples, "early")
        steps = []
        while not trial.is_done:
            for owner, result in engine.step():
                if owner is trial:
                    steps.append(result)
                elif owner.is_done:
                    engine.retire(owner)
            if trial.step == 20 and len(engine.trials) == 1:
                engine.admit(make_config(seed=9, lora_r=16), examples, "late")
        assert mate not in engine.trials
        run = close(engine, trial, steps, tmp_path / "ours")
    assert_equal(run, alone[2])


def test_a_nan_trial_leaves_its_pack_mates_unchanged(tmp_path: Path) -> None:
    configs = [make_config(seed=seed, max_steps=12) for seed in range(8)]
    expected = run_packed(configs, make_model(), tmp_path / "without")
    wild = make_config(learning_rate=1e6, max_grad_norm=0, max_steps=12)
    with PackedEngine(make_model()) as engine:
        examples = Examples(TRAIN)
        trials = [engine.admit(config, examples, f"t{n}") for n, config in enumerate(configs)]
        broken = engine.admit(wild, examples, "wild")
        broken.adapter.weights.data.fill_(float("nan"))
        steps: dict[int, list[StepResult]] = {id(trial): [] for trial in trials}
        while not trials[0].is_done:
            for owner, result in engine.step():
                if owner is broken:
                    assert not np.isfinite(result.train_loss)
                else:
                    steps[id(owner)].append(result)
        runs = [close(engine, t, steps[id(t)], tmp_path / t.adapter.name) for t in trials]
    for run, reference in zip(runs, expected, strict=True):
        assert_equal(run, reference, 1e-5)


def test_dropout_is_the_trials_own(tmp_path: Path) -> None:
    dropped = make_config(lora_dropout=0.3, max_steps=12)
    mates = [make_config(lora_dropout=0.5, seed=5, max_steps=12), make_config(max_steps=12)]
    (by_itself,) = run_packed([dropped], make_model(), tmp_path / "alone")
    *_, in_a_pack = run_packed([*mates, dropped], make_model(), tmp_path / "pack")
    assert_equal(in_a_pack, by_itself, 1e-5)
    (undropped,) = run_packed([make_config(max_steps=12)], make_model(), tmp_path / "without")
    assert abs(undropped.eval_loss - by_itself.eval_loss) > 1e-4


def test_dropout_scales_what_it_keeps() -> None:
    """Mean over many masks: the adapter's output is that without dropout, as in PEFT."""
    model = make_model()
    config = make_config(lora_dropout=0.4, max_steps=4)
    with PackedEngine(model) as engine:
        examples = Examples(TRAIN)
        trial = engine.admit(config, examples, "t")
        torch.nn.init.normal_(trial.adapter.weights, std=0.05)
        group = engine.lora.groups[0]
        share = group.shares["t"]
        from training.packed_lora import _down, _masks

        x_tD = torch.randn(3, 48)
        draws = [_down(share, x_tD, _masks(share, group, x_tD, seed)) for seed in range(3000)]
        mean = torch.stack(draws).mean(0)
        expected = _down(share, x_tD, None)
        assert float((mean - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_evaluation_equals_the_padded_one(tmp_path: Path) -> None:
    model = make_model()
    expected = example_losses(model, VALIDATION, 4)
    with PackedEngine(model) as engine:
        base = engine.evaluate(None, Examples(VALIDATION))
        trial = engine.admit(make_config(), Examples(TRAIN), "t")
        torch.nn.init.normal_(trial.adapter.weights, std=0.1)
        adapted = engine.evaluate(trial, Examples(VALIDATION))
        engine.lora.save("t", tmp_path / "adapter")
    np.testing.assert_allclose(base["loss_sum"], expected["loss_sum"], rtol=1e-5)
    assert list(base["example_id"]) == list(expected["example_id"])
    assert list(base["num_tokens"]) == list(expected["num_tokens"])
    plain: Any = PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter"))
    expected = example_losses(plain.get_base_model(), VALIDATION, 4)
    np.testing.assert_allclose(adapted["loss_sum"], expected["loss_sum"], rtol=1e-5)
    assert abs(mean_loss(adapted) - mean_loss(base)) > 1e-3


def test_the_saved_configuration_is_pefts(tmp_path: Path) -> None:
    with PackedEngine(make_model()) as engine:
        engine.admit(make_config(lora_r=8, use_rslora=True), Examples(TRAIN), "t")
        engine.lora.save("t", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["peft_type"]) == (8, True, "LORA")
    assert LoraConfig.from_pretrained(str(tmp_path)).r == 8


def test_the_base_model_is_given_back_as_it_was() -> None:
    model = make_model()
    names = [name for name, _ in model.named_modules()]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(3, 13)[None]
    logits = model(input_ids=ids).logits
    with PackedEngine(model) as engine:
        engine.admit(make_config(), Examples(TRAIN), "t")
        engine.step()
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_a_4bit_base_equals_trls_qlora(tmp_path: Path) -> None:
    """TRL keeps the adapter of a 4-bit base in bfloat16; here it is compared in float32."""
    model = make_model(hidden_size=64, intermediate_size=128, head_dim=16, num_attention_heads=4)
    model.save_pretrained(tmp_path / "base")
    loaded = [load_4bit(tmp_path / "base") for _ in range(2)]
    config = make_config(max_steps=20)
    with float32_adapters():
        reference = run_alone(config, loaded[0], tmp_path / "trl")
    run, _ = run_packed([config, make_config(seed=3, max_steps=20)], loaded[1], tmp_path)
    assert_equal(run, reference)


def load_4bit(path: Path) -> Any:
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model.eval()


@contextlib.contextmanager
def float32_adapters() -> Iterator[None]:
    train = SFTTrainer.train

    def train_in_float32(self: Any, *args: Any, **kwargs: Any) -> Any:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SFTTrainer, "train", train_in_float32)
        yield


def test_bfloat16_trains_within_its_rounding(tmp_path: Path) -> None:
    exact = run_packed([make_config(max_steps=20)], make_model(), tmp_path / "float32")[0]
    model = make_model().to(torch.bfloat16)
    rounded = run_packed([make_config(max_steps=20)], model, tmp_path / "bfloat16")[0]
    losses, expected = (np.array([step[0] for step in run.steps]) for run in (rounded, exact))
    np.testing.assert_allclose(losses, expected, rtol=0.02)
    assert all(weight.dtype == torch.float32 for weight in rounded.weights.values())


class TestRefusals:
    """What cannot be packed is named before anything is trained."""

    def test_target_modules_that_match_nothing(self) -> None:
        with PackedEngine(make_model()) as engine:
            config = make_config(lora_target_modules=["q_proj", "qq_proj"])
            with pytest.raises(ModelError, match=r"lora_target_modules names 'qq_proj', but .* has"):
                engine.admit(config, Examples(TRAIN), "t")
            assert engine.trials == []

    def test_examples_longer_than_the_models_positions(self) -> None:
        with PackedEngine(make_model(max_position_embeddings=8)) as engine:
            with pytest.raises(ModelError, match=r"an example has \d+ tokens, but .* has 8 positions"):
                engine.admit(make_config(), Examples(TRAIN), "t")

    def test_layers_that_are_not_linear(self) -> None:
        config = transformers.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with pytest.raises(ModelError, match="Conv1D, which the packed engine does not know"):
            PackedEngine(model)

    def test_a_model_that_drops_activations(self) -> None:
        model = make_model(transformers.PhiConfig, resid_pdrop=0.1)
        with pytest.raises(ModelError, match=r"drops activations \(p = 0.1\)"):
            PackedEngine(model)

    def test_a_model_whose_layers_mix_tokens_otherwise(self) -> None:
        model = make_model()

        class Mixer(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + torch.roll(x, 1, dims=1)

        norm = model.model.layers[0].input_layernorm
        model.model.layers[0].input_layernorm = torch.nn.Sequential(norm, Mixer())
        with pytest.raises(ModelError, match="gives other results for a packed row"):
            PackedEngine(model)
        assert model.config._attn_implementation == "sdpa"
