"""Packed trials against the same trials alone in SFTTrainer and PEFT, on tiny random models in float32."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from tiny_packs import (
    TRAIN,
    VALIDATION,
    Run,
    assert_equal,
    close,
    make_config,
    make_model,
    run_alone,
    run_packed,
)
from trl.trainer.sft_trainer import SFTTrainer

from training.engine import EVAL_TOKENS, PackedEngine
from training.evaluate import example_losses, mean_loss
from training.examples import Examples
from training.exceptions import ModelError
from training.trial import StepResult

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


def test_recomputed_activations_change_nothing_but_their_number(tmp_path: Path) -> None:
    def settings(recompute: bool) -> Any:
        dropped = {"lora_dropout": 0.2, "max_steps": 8}
        return make_config(**dropped, gradient_checkpointing=recompute)

    (kept,) = run_packed([settings(False)], make_model(), tmp_path / "kept")
    (recomputed,) = run_packed([settings(True)], make_model(), tmp_path / "recomputed")
    assert_equal(recomputed, kept, 1e-5)

    calls = {}
    for recompute in (False, True):
        model = make_model()
        with PackedEngine(model) as engine:
            trial = engine.admit(settings(recompute), Examples(TRAIN), "t")
            count: list[int] = []
            hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: count.append(1))  # noqa: B023
            engine.backward([trial])
            hook.remove()
            calls[recompute] = len(count)
        assert not model.training
    assert calls == {False: 1, True: 2}


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


def test_an_evaluation_out_of_memory_goes_on_with_shorter_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    examples = Examples(VALIDATION)
    with PackedEngine(make_model()) as engine:
        trial = engine.admit(make_config(), Examples(TRAIN), "t")
        torch.nn.init.normal_(trial.adapter.weights, std=0.1)
        expected = engine.evaluate(trial, examples)
        hidden_states = engine._hidden_states

        def short_of_memory(row: Any) -> torch.Tensor:
            rows.append(len(row))
            if len(row) > fitting:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return hidden_states(row)

        monkeypatch.setattr(engine, "_hidden_states", short_of_memory)
        fitting = 2 * int(examples.lengths.max())
        found = engine.evaluate(trial, examples)
        assert rows[0] > fitting
        assert 0 < engine.eval_tokens < EVAL_TOKENS["cpu"]
        failures = sum(row > fitting for row in rows)
        rows.clear()
        engine.evaluate(trial, examples)  # does not run into it again
        assert failures > 0 and max(rows) <= fitting
        fitting = int(examples.lengths.max())  # one example a row, where it must be
        alone = engine.evaluate(trial, examples)
        fitting -= 1
        with pytest.raises(torch.OutOfMemoryError):
            engine.evaluate(trial, examples)
    assert list(found["example_id"]) == list(expected["example_id"])
    for losses in (found, alone):
        np.testing.assert_allclose(losses["loss_sum"], expected["loss_sum"], rtol=1e-5)


def test_the_saved_configuration_is_pefts(tmp_path: Path) -> None:
    with PackedEngine(make_model()) as engine:
        engine.admit(make_config(lora_r=8, use_rslora=True), Examples(TRAIN), "t")
        engine.lora.save("t", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["peft_type"]) == (8, True, "LORA")
    assert LoraConfig.from_pretrained(str(tmp_path)).peft_type == "LORA"


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
            with pytest.raises(
                ModelError, match=r"lora_target_modules names 'qq_proj', but .* has"
            ):
                engine.admit(config, Examples(TRAIN), "t")
            assert engine.trials == []

    def test_examples_longer_than_the_models_positions(self) -> None:
        expected = r"an example has \d+ tokens, but .* has 8 positions"
        with (
            PackedEngine(make_model(max_position_embeddings=8)) as engine,
            pytest.raises(ModelError, match=expected),
        ):
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


def test_a_fast_path_that_is_wrong_is_switched_off_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from training import attention

    expected = run_packed([make_config(max_steps=3)], make_model(), tmp_path / "right")[0]
    monkeypatch.setattr(attention, "disabled", set())
    monkeypatch.setattr(attention._Explicit, "apply", lambda query, *_: query.transpose(0, 1) * 2)
    with pytest.warns(RuntimeWarning, match="fast paths .*explicit.* are not exact on cpu"):
        run = run_packed([make_config(max_steps=3)], make_model(), tmp_path / "generic")[0]
    assert "explicit" in attention.disabled
    assert_equal(run, expected)


@pytest.mark.gpu
def test_a_pack_on_the_gpu_equals_the_one_on_the_cpu(tmp_path: Path) -> None:
    configs = [make_config(max_steps=10), make_config(max_steps=10, lora_r=16, seed=3)]
    on_cpu = run_packed(configs, make_model(), tmp_path / "cpu")
    on_gpu = run_packed(configs, make_model().to("cuda"), tmp_path / "gpu")
    for run, reference in zip(on_gpu, on_cpu, strict=True):
        assert_equal(run, reference, 1e-3)


def test_a_step_on_another_device_mixes_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """On `meta` tensors, which refuse a partner on the CPU as CUDA's do; they hold no values to check."""
    from training import engine as engine_module
    from training import packed_lora

    cpu = make_model()
    groups = packed_lora._siblings(cpu, packed_lora.linear_names(cpu))
    monkeypatch.setattr(packed_lora, "_siblings", lambda *_: groups)
    monkeypatch.setattr(engine_module, "check_head", lambda *_: None)
    monkeypatch.setattr(engine_module, "_hidden_states_alone", lambda _: [])
    monkeypatch.setattr(PackedEngine, "_check_exact", lambda *_: None)
    with PackedEngine(make_model().to("meta")) as engine:
        trials = [engine.admit(make_config(seed=n), Examples(TRAIN), f"t{n}") for n in range(2)]
        row, loss_N = engine.backward(trials)
    grads = [trial.adapter.weights.grad for trial in trials]
    assert {tensor.device.type for tensor in [row.ids_T, loss_N, *grads] if tensor is not None} == {
        "meta"
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_model_in_a_pack_equals_trl_over_fifty_steps(tmp_path: Path) -> None:
    from training.config import TrialConfig
    from training.data import load_splits
    from training.model import load_model, load_tokenizer

    torch.set_num_threads(2)
    common = {"max_length": 256, "per_device_train_batch_size": 2, "max_eval_samples": 48}
    config = TrialConfig.from_dict({**common, "max_steps": 50, "learning_rate": 1e-3})
    mate = TrialConfig.from_dict({**common, "max_steps": 50, "lora_r": 4, "seed": 1})
    train = load_splits(config, load_tokenizer(config)).train
    reference = run_alone(config, load_model(config), tmp_path / "trl", train)
    run, _ = run_packed([config, mate], load_model(config), tmp_path, train)
    np.testing.assert_allclose(run.steps, reference.steps, rtol=1e-4)
