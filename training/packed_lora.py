"""LoRA over a flat token row: the base product once for all trials, each trial's A and B on its own stretch.

Adapters live in PEFT's own layers (`PackedLora.add`), whose forward is replaced. All of an adapter's weights
are views of one flat vector, and so are their gradients: clipping, AdamW and saving see a single tensor.
Linear layers that read the same tensor (q, k and v; gate and up) form a *group* and are computed together:
one A product for all of them, and one gradient of their input. Adjoining trials of the same layers are
multiplied together where the device gains by it (`training.grouped_lora`); all else is done stretch by
stretch.

T tokens of the row, t of a trial's stretch, D input and O output features, R rank, M members of a group.
"""

import contextlib
import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from training import grouped_lora
from training.exceptions import ModelError
from training.grouped_lora import Layout, Run, Share
from training.row import Row, current_row

_PLACEHOLDER = "packed"
"""PEFT needs one adapter for its layers to exist; this one, of rank 1, takes no part in anything."""


@dataclass(kw_only=True, slots=True)
class Adapter:
    """One trial's adapter; its layers in the model are views of `weights`."""

    name: str
    config: LoraConfig
    weights: nn.Parameter
    """[P], float32; `weights.grad` is always there, and backward passes add to it."""
    layout: list[tuple[str, tuple[int, ...]]]
    """Name and shape of each layer's A or B, in the order in which they stand in `weights`."""
    layers: tuple[str, ...]
    """Names of the layers that it adapts: adapters that agree in them have one layout but for the rank."""

    @property
    def scaling(self) -> float:
        """Factor of B A x."""
        rank = self.config.r
        return self.config.lora_alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def of_any_rank(self) -> Layout:
        """Its layout without its rank."""
        return Layout(
            tuple(math.prod(shape) // self.config.r for _, shape in self.layout),
            tuple(name.endswith("lora_B") for name, _ in self.layout),
        )

    def gradient(self) -> torch.Tensor:
        """[P]."""
        assert self.weights.grad is not None
        return self.weights.grad

    def gradient_norm(self) -> torch.Tensor:
        """Of all of the gradient; does not wait for the device.

        On a CPU matrices' norms are summed, not those of millions of single values: float32 loses too many
        of the small ones in one long sum, which a GPU does not do.
        """
        grad_P = self.gradient()
        if grad_P.device.type != "cpu":
            return torch.linalg.vector_norm(grad_P)
        return torch.nn.utils.get_total_norm(
            grad_P.split([math.prod(shape) for _, shape in self.layout])
        )


class _Group:
    """Linear layers that read the same tensor."""

    def __init__(self, number: int, members: list[LoraLayer], names: list[str]):
        self.number, self.members, self.names = number, members, names
        self.layers: list[Any] = [member.get_base_layer() for member in members]
        self.is_plain = all(type(layer) is nn.Linear for layer in self.layers)
        self.shares: dict[str, Share] = {}
        # The tensor that the members are being called with, and what those not called yet return for it.
        self.input: torch.Tensor | None = None
        self.outputs: dict[int, torch.Tensor] = {}

    def base(self, x_TD: torch.Tensor) -> list[torch.Tensor]:
        """What each layer without adapters gives, [T, O]."""
        if self.is_plain:  # without the time that calling a module takes
            return [nn.functional.linear(x_TD, layer.weight, layer.bias) for layer in self.layers]
        return [layer(x_TD) for layer in self.layers]

    def weight(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Base weight [O, D], dequantised where it is 4-bit."""
        layer = self.layers[index]
        if self.is_plain:
            return layer.weight
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight, layer.weight.quant_state).to(dtype)


class PackedLora:
    """The adapters of all trials in one base model.

    Args:
        model: the frozen base model; it is given back as it was by `close`.

    Raises:
        ModelError: a linear layer is of a kind that cannot be packed.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.adapters: dict[str, Adapter] = {}
        self.names = linear_names(model)
        groups = _siblings(model, self.names)
        config = LoraConfig(r=1, target_modules=self.names, task_type="CAUSAL_LM")
        with known_warnings():
            self.peft: PeftModel = get_peft_model(model, config, adapter_name=_PLACEHOLDER)  # pyright: ignore[reportAttributeAccessIssue]
        # A tensor that needs a gradient, so that layers whose input needs none have a backward too.
        self.anchor = torch.zeros((), device=model.device, requires_grad=True)
        self.groups = []
        for number, names in enumerate(groups):
            members: list[Any] = [model.get_submodule(name) for name in names]
            group = _Group(number, members, names)
            self.groups.append(group)
            for index, member in enumerate(members):
                member.forward = functools.partial(_forward, group, index, self.anchor)
        sizes = {
            size
            for group in self.groups
            for layer in group.layers
            for size in (layer.in_features, layer.out_features)
        }
        self._is_aligned = grouped_lora.is_aligned(sizes, model.dtype)
        self._made: dict[object, Any] = {}
        """Tensors that are the same for every row with the same layers and ranks."""
        model.requires_grad_(False)

    def add(self, name: str, config: LoraConfig, seed: int) -> Adapter:
        """A new adapter with PEFT's own initial weights for `seed`, as SFTTrainer makes them.

        Raises:
            ModelError: the target modules are not there, or not linear layers.
        """
        targets = self.targets(config)
        config.base_model_name_or_path = self.model.name_or_path or None  # as get_peft_model does
        if config.target_modules == "all-linear":  # of the base model, not of the adapters in it
            config.target_modules = self._short_names(targets)
        with torch.random.fork_rng(devices=_cuda_devices(self.model)), known_warnings():
            set_seed(seed)
            self.peft.add_adapter(name, config)
        adapter = self._flatten(name, config, set(targets))
        self.adapters[name] = adapter
        self.model.requires_grad_(False)  # PEFT marks its layers; gradients here are ours
        return adapter

    def remove(self, name: str) -> None:
        """Takes an adapter out of the model; `Adapter` itself keeps its weights."""
        del self.adapters[name]
        for group in self.groups:
            group.shares.pop(name, None)
        self.peft.set_adapter(_PLACEHOLDER)
        self.peft.delete_adapter(name)
        self.model.requires_grad_(False)

    def save(self, name: str, directory: Path) -> None:
        """Writes the adapter as PEFT does: `adapter_config.json` and safetensors."""
        tensors = get_peft_model_state_dict(self.peft, adapter_name=name)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config = copy.copy(self.adapters[name].config)
        config.inference_mode = True
        config.save_pretrained(str(directory))

    def close(self) -> None:
        """Gives the base model back without any adapter."""
        for group in self.groups:
            for member in group.members:
                vars(member).pop("forward", None)
        self.peft.unload()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self.model.requires_grad_(False)

    def targets(self, config: LoraConfig) -> list[str]:
        """Full names of the layers that `config` adapts.

        Raises:
            ModelError: a name in it matches no linear layer.
        """
        wished = config.target_modules
        if wished == "all-linear":
            return self.names
        assert wished is not None
        wishes = [wished] if isinstance(wished, str) else sorted(wished)
        targets = []
        for wish in wishes:
            found = [n for n in self.names if n == wish or n.endswith(f".{wish}")]
            if not found:
                leaves = sorted({name.rsplit(".", 1)[-1] for name in self.names})
                raise ModelError(
                    f"lora_target_modules names {wish!r}, but {type(self.model).__name__} has no such "
                    f"linear layer; it has {', '.join(leaves)}"
                )
            targets += found
        return [name for name in self.names if name in set(targets)]

    def _short_names(self, targets: list[str]) -> list[str]:
        """Last parts of the names, as PEFT saves them, unless another module has one of them too."""
        short = {name.rsplit(".", 1)[-1] for name in targets}
        matching = [
            name for name, _ in self.model.named_modules() if name.rsplit(".", 1)[-1] in short
        ]
        return sorted(short) if sorted(matching) == sorted(targets) else targets

    def _flatten(self, name: str, config: LoraConfig, targets: set[str]) -> Adapter:
        """Makes PEFT's new weights views of one vector, and tells the groups of them."""
        chosen = [
            (group, [n for n, target in enumerate(group.names) if target in targets])
            for group in self.groups
        ]
        rank = config.r
        size = sum(
            rank * (group.layers[n].in_features + group.layers[n].out_features)
            for group, members in chosen
            for n in members
        )
        weights = nn.Parameter(torch.zeros(size, device=self.model.device))
        weights.grad = torch.zeros_like(weights)
        layers = tuple(sorted(targets))
        adapter = Adapter(name=name, config=config, weights=weights, layout=[], layers=layers)
        flat, grad = weights.data, weights.grad
        place = 0
        for group, members in chosen:
            if not members:
                continue
            features = group.layers[members[0]].in_features
            span = slice(place, place + len(members) * rank * features)
            a, grad_a = (
                vector[span].view(len(members) * rank, features) for vector in (flat, grad)
            )
            place = span.stop
            for row, n in enumerate(members):
                self._put(adapter, group, n, "lora_A", a[row * rank : (row + 1) * rank])
            b, spans = [], []
            for n in members:
                spans.append(slice(place, place + rank * group.layers[n].out_features))
                # Stored as [R, O]: its gradient is then one product with few rows, which is faster.
                view, grad_view = (vector[spans[-1]].view(rank, -1) for vector in (flat, grad))
                place = spans[-1].stop
                self._put(adapter, group, n, "lora_B", view.T)
                b.append((n, view, grad_view))
            group.shares[name] = Share(
                a, grad_a, b, rank, adapter.scaling, config.lora_dropout, span, spans
            )
        return adapter

    @property
    def is_grouped(self) -> bool:
        """Whether this model's trials are multiplied together on this machine."""
        return self._is_aligned and grouped_lora.is_taken(self.model.device, self.model.dtype)

    def prepare(self, row: Row) -> None:
        """Finds which stretches of a row are multiplied together, and lays their adapters side by side."""
        is_grouped, dtype = self.is_grouped, self.model.dtype
        layers: dict[str, object] = {name: a.layers for name, a in self.adapters.items()}
        row.runs = grouped_lora.find_runs(row, layers, is_grouped)
        for run in row.runs:
            if not is_grouped or run.seed is not None:
                continue
            adapters = [self.adapters[name] for name in run.adapters]
            rank = grouped_lora.aligned(max(adapter.config.r for adapter in adapters), dtype)
            run.stack = grouped_lora.make_stack(
                run,
                [adapter.weights.detach() for adapter in adapters],
                [adapter.scaling for adapter in adapters],
                rank,
                [self._places(adapter, rank) for adapter in adapters],
                self._are_b(adapters[0], rank),
                dtype,
                with_grads=torch.is_grad_enabled(),
            )

    def add_grads(self, row: Row) -> None:
        """Adds what the backward pass of a row gave to the adapters' gradients."""
        for run in row.runs:
            if run.stack is not None:
                run.stack.add_grads([self.adapters[name].gradient() for name in run.adapters])

    def _places(self, adapter: Adapter, rank: int) -> torch.Tensor | None:
        own, key = adapter.config.r, (adapter.layers, adapter.config.r, rank)
        if key not in self._made:
            self._made[key] = adapter.of_any_rank().places(own, rank, self.model.device)
        return self._made[key]

    def _are_b(self, adapter: Adapter, rank: int) -> torch.Tensor:
        key = (adapter.layers, rank)
        if key not in self._made:
            self._made[key] = adapter.of_any_rank().are_b(rank, self.model.device)
        return self._made[key]

    def _put(
        self, adapter: Adapter, group: _Group, member: int, letter: str, view: torch.Tensor
    ) -> None:
        layer = getattr(group.members[member], letter)[adapter.name]
        # On a 4-bit base TRL rounds a new adapter to bfloat16; ours starts there, and goes on in float32.
        start = layer.weight.data if group.is_plain else layer.weight.data.bfloat16()
        view.copy_(start)
        layer.weight = nn.Parameter(view, requires_grad=False)
        adapter.layout.append((f"{group.names[member]}.{letter}", tuple(view.shape)))


@contextlib.contextmanager
def known_warnings() -> Iterator[None]:
    """Silences what PEFT and TRL print about each other's versions."""
    with warnings.catch_warnings():
        # PEFT 0.21 and TRL 1.16 still use the names that Transformers 5.23 has given up.
        warnings.filterwarnings(
            "ignore", message=".*gradient_checkpointing.*", category=FutureWarning
        )
        yield


def linear_names(model: PreTrainedModel) -> list[str]:
    """The linear layers that `all-linear` means: all but the language-model head, as in PEFT.

    Raises:
        ModelError: one of them is of a kind that cannot be packed.
    """
    head = model.get_output_embeddings()
    names = []
    for name, module in model.named_modules():
        if module is head:
            continue
        kind = type(module).__name__
        if type(module) is nn.Linear or kind == "Linear4bit":
            names.append(name)
        elif kind in ("Conv1D", "Linear8bitLt") or isinstance(module, nn.Linear):
            raise ModelError(
                f"{type(model).__name__}: {name} is a {kind}, which the packed engine does not know: "
                "use --engine trl"
            )
    if not names:
        raise ModelError(f"{type(model).__name__} has no linear layer to adapt: use --engine trl")
    return names


def _siblings(model: PreTrainedModel, names: list[str]) -> list[list[str]]:
    """Groups of layers that read the very same tensor, found by watching a forward pass."""
    inputs: list[tuple[torch.Tensor, list[str]]] = []

    def watch(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if inputs and inputs[-1][0] is args[0]:
            inputs[-1][1].append(name)
        else:
            inputs.append((args[0], [name]))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(functools.partial(watch, name))
        for name in names
    ]
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups = [group for _, group in inputs]
    called = [name for group in groups for name in group]
    if sorted(called) != sorted(names):
        wrong = next(name for name in names if called.count(name) != 1)
        raise ModelError(
            f"{type(model).__name__}: {wrong} is called {called.count(wrong)} times in a forward pass, "
            "but the packed engine needs every linear layer to be called once: use --engine trl"
        )
    return groups


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _forward(
    group: _Group, index: int, anchor: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Stands in the place of a PEFT layer's forward: the whole group's, at its first member's call."""
    if group.input is not x:
        row = current_row()
        if x.shape[:-1].numel() != len(row):
            raise ModelError(
                f"{group.names[index]} gets {x.shape[:-1].numel()} tokens of a row of {len(row)}, but "
                "the packed engine needs all of them: use --engine trl"
            )
        group.input, group.outputs = x, dict(enumerate(_PackedLinear.apply(x, anchor, group, row)))
    output = group.outputs.pop(index)
    if not group.outputs:
        group.input = None
    return output


class _PackedLinear(torch.autograd.Function):
    """All layers of a group. Gradients of A and B go straight into the adapters' vectors."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, group: _Group, row: Row
    ) -> tuple[torch.Tensor, ...]:
        x_TD = x.reshape(-1, x.shape[-1])
        outputs = group.base(x_TD)
        backwards = [
            _multiply(run, group, group.shares[run.adapters[0]], x_TD, outputs)
            for run in row.runs
            if run.adapters[0] in group.shares
        ]
        ctx.save_for_backward(x_TD)
        ctx.group, ctx.backwards, ctx.shape = group, backwards, x.shape
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (x_TD,) = ctx.saved_tensors
        grads_TO = [grad.reshape(x_TD.shape[0], -1) for grad in grads]
        grad_TD = None
        if ctx.needs_input_grad[0]:
            for index, grad_TO in enumerate(grads_TO):
                weight_OD = ctx.group.weight(index, x_TD.dtype)
                if grad_TD is None:
                    grad_TD = grad_TO @ weight_OD
                else:
                    grad_TD.addmm_(grad_TO, weight_OD)
        for backward in ctx.backwards:
            backward(x_TD, grads_TO, grad_TD)
        return (None if grad_TD is None else grad_TD.view(ctx.shape)), None, None, None


def _multiply(
    run: Run, group: _Group, share: Share, x_TD: torch.Tensor, outputs_TO: list[torch.Tensor]
) -> Callable[..., None]:
    """Adds a run's products to the outputs, grouped or sliced; returns what does their backward."""
    if run.stack is not None:
        h_tR = grouped_lora.forward(run, run.stack, share, x_TD, outputs_TO)
        return functools.partial(grouped_lora.backward, run, run.stack, share, h_tR)
    x_tD = x_TD[run.rows]
    masks = None if run.seed is None else _masks(share, group, x_tD, run.seed)
    h_tR = _down(share, x_tD, masks)
    for place, (member, b_RO, _) in enumerate(share.b):
        outputs_TO[member][run.rows].addmm_(
            h_tR[:, grouped_lora.columns(place, share.rank)],
            b_RO.to(h_tR.dtype),
            alpha=share.scaling,
        )
    return functools.partial(_slice_backward, share, run.rows, h_tR, masks)


def _slice_backward(
    share: Share,
    rows: slice,
    h_tR: torch.Tensor,
    masks: list[torch.Tensor] | None,
    x_TD: torch.Tensor,
    grads_TO: list[torch.Tensor],
    grad_TD: torch.Tensor | None,
) -> None:
    grad_tR = torch.empty_like(h_tR)
    for place, (member, b_RO, grad_b_RO) in enumerate(share.b):
        columns = grouped_lora.columns(place, share.rank)
        grad_tO = grads_TO[member][rows]
        _accumulate(grad_b_RO, h_tR[:, columns].T, grad_tO, share.scaling)
        grad_tR[:, columns] = grad_tO @ b_RO.to(grad_tO.dtype).T
    grad_tR.mul_(share.scaling)
    _up(share, x_TD[rows], grad_tR, masks, None if grad_TD is None else grad_TD[rows])


def _masks(share: Share, group: _Group, x_tD: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """What dropout keeps of each member's input: a function of the seed and the layer alone.

    So a recomputed forward pass draws the same masks, and a resumed trial has no generator to restore.
    """
    masks = []
    for member, _, _ in share.b:
        generator = torch.Generator(x_tD.device)
        generator.manual_seed(seed + group.number * 101 + member)
        mask = torch.empty(x_tD.shape, dtype=torch.bool, device=x_tD.device)
        masks.append(mask.bernoulli_(1 - share.dropout, generator=generator))
    return masks


def _down(share: Share, x_tD: torch.Tensor, masks: list[torch.Tensor] | None) -> torch.Tensor:
    """x Aᵀ of all members side by side: [t, M·R]."""
    a = share.a.to(x_tD.dtype)
    if masks is None:
        return x_tD @ a.T
    keep = 1 / (1 - share.dropout)
    parts = zip(masks, a.split(share.rank), strict=True)
    return torch.cat([(x_tD * mask).mul_(keep) @ part.T for mask, part in parts], 1)


def _up(
    share: Share,
    x_tD: torch.Tensor,
    grad_tR: torch.Tensor,
    masks: list[torch.Tensor] | None,
    grad_tD: torch.Tensor | None,
) -> None:
    """Backward of `_down`: adds to A's gradient and, where it is wanted, to the input's."""
    a = share.a.to(x_tD.dtype)
    if masks is None:
        _accumulate(share.grad_a, grad_tR.T, x_tD, 1.0)
        if grad_tD is not None:
            grad_tD.addmm_(grad_tR, a)
        return
    keep = 1 / (1 - share.dropout)
    parts = [
        tensor.split(share.rank, dim) for tensor, dim in ((a, 0), (share.grad_a, 0), (grad_tR, 1))
    ]
    for mask, part, grad_a, grad in zip(masks, *parts, strict=True):
        _accumulate(grad_a, grad.T, x_tD * mask, keep)
        if grad_tD is not None:
            grad_tD.add_((grad @ part) * mask, alpha=keep)


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> None:
    """total += alpha · left @ right; the total stays float32 when the product is not."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=alpha)
    else:
        total.add_(left @ right, alpha=alpha)
