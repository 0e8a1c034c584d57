"""Grouped LoRA products against sliced ones, on tiny models, and against what the CUDA kernel demands."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_packs import TRAIN, Run, assert_equal, make_config, make_model, run_packed
from torch.nn import functional

from training import doctor, grouped_lora
from training.engine import PackedEngine
from training.examples import Examples

ONE_SHAPE: list[dict[str, Any]] = [
    {"lora_r": 16, "lora_alpha": 8},
    {"lora_r": 16, "lora_alpha": 64, "per_device_train_batch_size": 1},
    {"lora_r": 16, "lora_alpha": 32, "use_rslora": True, "learning_rate": 1e-3},
]
"""Scalings 0.5, 4 and 8: powers of two round alike wherever they are multiplied in. Of another rounding of a
gradient near 0, AdamW would make a difference of weights above 1e-5."""
ODD_SCALINGS: list[dict[str, Any]] = [
    {"lora_r": 8, "lora_alpha": 11},
    {"lora_r": 8, "lora_alpha": 40, "per_device_train_batch_size": 1},
    {"lora_r": 8, "use_rslora": True},
]

grouped_mm = functional.grouped_mm


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes grouped products wherever they can be; the number of groups of each, the engine's check apart."""
    monkeypatch.setattr(grouped_lora, "forced", {grouped_lora.NAME})
    monkeypatch.setattr(grouped_lora, "disabled", set())
    seen: list[int] = []

    def counted(a: Any, b: Any, *, offs: Any) -> Any:
        seen.append(len(offs))
        return grouped_mm(a, b, offs=offs)

    monkeypatch.setattr(functional, "grouped_mm", counted)
    find_fault = grouped_lora.find_fault

    def uncounted(*args: Any) -> str | None:
        before = len(seen)
        fault = find_fault(*args)
        del seen[before:]
        return fault

    monkeypatch.setattr(grouped_lora, "find_fault", uncounted)
    return seen


def run_sliced(settings: list[dict[str, Any]], directory: Path) -> list[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_lora, "forced", set())
        return run_packed(make_configs(settings), make_model(), directory / "sliced")


def run_grouped(settings: list[dict[str, Any]], directory: Path) -> list[Run]:
    return run_packed(make_configs(settings), make_model(), directory / "grouped")


def make_configs(settings: list[dict[str, Any]]) -> list[Any]:
    return [make_config(**{"max_steps": 6, "seed": n, **own}) for n, own in enumerate(settings)]


def assert_all_equal(ours: list[Run], theirs: list[Run]) -> None:
    for run, reference in zip(ours, theirs, strict=True):
        assert_equal(run, reference, 1e-5)


def test_trials_of_one_shape_and_unlike_scalings_equal_sliced_ones(
    calls: list[int], tmp_path: Path
) -> None:
    expected = run_sliced(ONE_SHAPE, tmp_path)
    assert calls == []
    assert_all_equal(run_grouped(ONE_SHAPE, tmp_path), expected)
    assert set(calls) == {3, 1}  # steps, and evaluations


def gradients(settings: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Of two micro-batches, laid into the row in the order of `settings`."""
    with PackedEngine(make_model()) as engine:
        trials = [
            engine.admit(config, Examples(TRAIN), f"t{n}")
            for n, config in enumerate(make_configs(settings))
        ]
        for trial in trials:  # B begins at 0, where A's gradient says nothing
            torch.manual_seed(trial.config.seed)
            torch.nn.init.normal_(trial.adapter.weights, std=0.1)
        engine.backward(trials)
        engine.backward(trials)
        sizes = [[math.prod(shape) for _, shape in trial.adapter.layout] for trial in trials]
        grads = [trial.adapter.gradient() for trial in trials]
        return [part for grad, each in zip(grads, sizes, strict=True) for part in grad.split(each)]


@pytest.mark.parametrize(
    ("settings", "grouped"),
    [
        (ODD_SCALINGS, {3}),
        ([{"lora_r": 8}, {"lora_r": 8, "lora_dropout": 0.5}, {"lora_r": 8}, {"lora_r": 8}], {1, 2}),
        ([{"lora_r": 8}, {"lora_r": 8, "lora_target_modules": ["v_proj"]}, {"lora_r": 8}], {1}),
        ([{"lora_r": 8}, {"lora_r": 4, "lora_target_modules": ["up_proj"]}, {"lora_r": 8}], {1}),
    ],
    ids=["odd scalings", "dropout between", "other modules between", "others elsewhere between"],
)
def test_gradients_equal_sliced_ones(
    settings: list[dict[str, Any]], grouped: set[int], calls: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_lora, "forced", set())
        expected = gradients(settings)
    assert calls == []
    found = gradients(settings)
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max())
        assert scale > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale)
    assert set(calls) == grouped


def test_of_a_mixed_pack_all_ranks_are_grouped_but_those_that_drop_are_not(
    calls: list[int], tmp_path: Path
) -> None:
    mixed: list[dict[str, Any]] = [
        {"lora_r": 8},
        {"lora_r": 16},
        {"lora_r": 8, "lora_dropout": 0.3},
        {"lora_r": 8, "lora_alpha": 64},
        {"lora_r": 6},
        {"lora_r": 6},
        {"lora_r": 3, "max_grad_norm": 0.05},
        {"lora_r": 8, "lora_dropout": 0.1},
    ]
    expected = run_sliced(mixed, tmp_path)
    assert_all_equal(run_grouped(mixed, tmp_path), expected)
    assert set(calls) == {6, 1}  # though others are admitted between them


def test_trials_of_the_same_modules_are_grouped_among_others(
    calls: list[int], tmp_path: Path
) -> None:
    subsets: list[dict[str, Any]] = [
        {"lora_target_modules": ["q_proj", "v_proj"]},
        {"lora_target_modules": ["q_proj", "down_proj", "up_proj"], "lora_alpha": 4},
        {"lora_target_modules": ["v_proj", "q_proj"], "lora_alpha": 24},
        {"lora_target_modules": ["all-linear"]},
        {"lora_target_modules": ["q_proj", "down_proj", "gate_proj"]},
    ]
    expected = run_sliced(subsets, tmp_path)
    assert_all_equal(run_grouped(subsets, tmp_path), expected)
    assert set(calls) == {2, 1}  # the first and the third


def test_recomputed_activations_are_grouped_too(calls: list[int], tmp_path: Path) -> None:
    recomputed = [{**own, "gradient_checkpointing": True} for own in ONE_SHAPE]
    assert_all_equal(run_grouped(recomputed, tmp_path), run_sliced(ONE_SHAPE, tmp_path))
    assert calls


def test_a_nan_trial_leaves_those_it_is_grouped_with_unchanged(calls: list[int]) -> None:
    grads = []
    for value in (0.1, float("nan")):
        with PackedEngine(make_model()) as engine:
            trials = [
                engine.admit(config, Examples(TRAIN), f"t{n}")
                for n, config in enumerate(make_configs(ONE_SHAPE))
            ]
            trials[1].adapter.weights.data.fill_(value)
            engine.backward(trials)
            grads.append(torch.cat([trials[n].adapter.weights.grad for n in (0, 2)]))  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert calls
    assert torch.equal(*grads)


@pytest.mark.parametrize("fault", ["wrong numbers", "not a number", "no kernel"])
def test_a_failing_grouped_product_is_switched_off_by_name(
    fault: str, calls: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(a: Any, b: Any, *, offs: Any) -> Any:
        if fault == "no kernel":
            raise RuntimeError("grouped mm is not supported on your system")
        return grouped_mm(a, b, offs=offs) * (float("nan") if fault == "not a number" else 1.1)

    expected = run_sliced(ONE_SHAPE, tmp_path)
    monkeypatch.setattr(functional, "grouped_mm", failing)
    reason = {
        "wrong numbers": r"they differ by \d",
        "not a number": "they differ by nan",
        "no kernel": "grouped mm is not supported",
    }[fault]
    with pytest.warns(RuntimeWarning, match=rf"\(grouped_lora\) are not exact on cpu \({reason}"):
        runs = run_grouped(ONE_SHAPE, tmp_path)
    assert grouped_lora.disabled == {grouped_lora.NAME}
    assert_all_equal(runs, expected)


@pytest.mark.parametrize("which", range(6))
def test_the_engines_check_sees_a_fault_of_any_of_the_six_products(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down and up; the gradients of h, B, A and the input."""
    number = iter(range(6))

    def failing(a: Any, b: Any, *, offs: Any) -> Any:
        factor = 1.1 if next(number) == which else 1.0
        return grouped_mm(a, b, offs=offs) * factor

    monkeypatch.setattr(functional, "grouped_mm", failing)
    cpu = torch.device("cpu")
    assert grouped_lora.find_fault(64, [48], cpu, torch.float32) is not None
    assert next(number, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_sound_machine_passes_the_engines_check(dtype: torch.dtype) -> None:
    assert grouped_lora.find_fault(64, [48, 96], torch.device("cpu"), dtype) is None


def kernel(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """Stands in for torch's CUDA kernel, with what that checks and asserts (see training.grouped_lora)."""
    assert a.dtype == b.dtype == torch.bfloat16
    assert a.dim() == 2 and offs.dtype == torch.int32 and 0 < len(offs) < 1024
    for tensor in (a, b):
        assert tensor.data_ptr() % 16 == 0
        assert 1 in tensor.stride()[-2:]
        large = max(tensor.stride()[-2:])
        assert large % 8 == 0 and large >= tensor.shape[-1 if tensor.stride(-1) == 1 else -2]
    tokens = a.shape[1] if b.dim() == 2 else a.shape[0]
    assert int(offs[-1]) == tokens  # what is behind the last offset is left as it was: random
    if b.dim() == 2:
        assert a.stride(0) == 1 and b.stride(1) == 1
    else:
        assert a.stride(1) == 1 and len(b) == len(offs)
    return grouped_mm(a, b, offs=offs)


@pytest.mark.parametrize(
    "settings",
    [ONE_SHAPE, [{"lora_r": 8}, {"lora_r": 3}, {"lora_r": 12, "lora_alpha": 5}]],
    ids=["one shape", "unlike ranks"],
)
def test_the_cuda_kernel_gets_what_it_demands(
    settings: list[dict[str, Any]],
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def train(name: str) -> list[Run]:
        model = make_model().to(torch.bfloat16)
        return run_packed(make_configs(settings), model, tmp_path / name)

    counted = functional.grouped_mm

    def checked(a: Any, b: Any, *, offs: Any) -> Any:
        kernel(a, b, offs=offs)
        return counted(a, b, offs=offs)

    monkeypatch.setattr(functional, "grouped_mm", checked)
    with monkeypatch.context() as patch:
        patch.setattr(grouped_lora, "forced", set())
        expected = train("sliced")
        assert calls == []
    runs = train("grouped")
    assert calls
    for run, reference in zip(runs, expected, strict=True):
        losses, others = (torch.tensor([step[0] for step in r.steps]) for r in (run, reference))
        torch.testing.assert_close(losses, others, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("capability", "has_kernel"),
    [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)],
)
def test_only_gpus_with_the_kernel_take_grouped_products(
    capability: tuple[int, int], has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On others torch waits for the device and loops."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cuda = torch.device("cuda")
    assert grouped_lora.is_taken(cuda, torch.bfloat16) == has_kernel
    assert not grouped_lora.is_taken(cuda, torch.float16)
    assert not grouped_lora.is_taken(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(grouped_lora, "disabled", {grouped_lora.NAME})
    assert not grouped_lora.is_taken(cuda, torch.bfloat16)


def test_the_doctor_checks_grouped_products_where_they_are_taken(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(max_position_embeddings=128)
    assert doctor.check_exactness(make_config(), model) == []
    assert "grouped products" in capsys.readouterr().out
    assert set(calls) == {2}
    monkeypatch.setattr(
        functional, "grouped_mm", lambda a, b, *, offs: grouped_mm(a, b, offs=offs) * 2
    )
    with pytest.warns(RuntimeWarning, match="grouped LoRA products"):
        assert doctor.check_exactness(make_config(), model) == []
    assert "switched off: grouped_lora" in capsys.readouterr().out


@pytest.mark.gpu
def test_grouped_products_equal_sliced_ones_on_the_gpu() -> None:
    device = torch.device("cuda")
    if not grouped_lora.is_taken(device, torch.bfloat16):
        pytest.skip("this GPU has no kernel for grouped products")
    assert grouped_lora.find_fault(2048, [2048, 512, 512], device, torch.bfloat16) is None
