"""The LoRA products of several trials in one launch each, through `torch.nn.functional.grouped_mm`.

Slice by slice, K trials cost K small products for each A and each B: on a GPU it is launching them that takes
the time. Where adjoining stretches of a row belong to trials of one shape (a `Run`), `forward` and `backward`
compute all of them together; `training.packed_lora` slices the rest.
Tested on the CPU against the slices; NOT MEASURED and never run on a GPU, as there was none.

What `grouped_mm` of torch 2.13 demands (its GroupedMMUtils.h, GroupedBlas.cpp and GroupMMCommon.cuh):
bfloat16 and compute capability 9 or 10, or else it waits for the device and loops; strides and addresses
that are multiples of 16 bytes; where tokens are what is summed over, a left operand that is column-major and
a right one that is row-major, or else each stretch would have to be a multiple of 8 tokens.

T tokens of the row, t of a run, K its trials, D input and O output features, R rank, M members of a group.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch.nn import functional

from training.row import Row

NAME = "grouped_lora"
FAST_PATHS = {NAME}

disabled: set[str] = set()
"""Fast paths that have failed the engine's check on this machine."""
forced: set[str] = set()
"""Fast paths that are taken on any device and in any dtype: for tests, since slices are faster on a CPU."""


@dataclass(slots=True)
class Share:
    """One trial's part of a group of linear layers."""

    a: torch.Tensor
    """A of all members that it adapts, [M·R, D], float32."""
    grad_a: torch.Tensor
    b: list[tuple[int, torch.Tensor, torch.Tensor]]
    """Each such member's number in the group, its Bᵀ [R, O], and that one's gradient."""
    rank: int
    scaling: float
    dropout: float

    @property
    def members(self) -> list[int]:
        return [member for member, *_ in self.b]

    def columns(self, place: int) -> slice:
        """Where the R columns of the member in this place stand among those of all."""
        return slice(place * self.rank, (place + 1) * self.rank)


@dataclass(slots=True)
class Run:
    """Adjoining stretches of a row that are multiplied together, or a single one."""

    start: int
    ends: list[int]
    """Where each stretch ends in the row; the next one begins there."""
    shares: list[Share]
    """Each stretch's."""
    seed: int | None = None
    """Of a single stretch's dropout masks; None where nothing is dropped."""

    @property
    def rows(self) -> slice:
        return slice(self.start, self.ends[-1])

    def can_take(self, share: Share, start: int, dtype: torch.dtype) -> bool:
        """Whether a stretch without dropout may join: it adjoins, and is of this shape, which is aligned."""
        ours = self.shares[0]
        return (
            self.seed is None
            and self.ends[-1] == start
            and (ours.rank, ours.members) == (share.rank, share.members)
            and is_aligned(
                [ours.rank, ours.a.shape[1], *(b_RO.shape[1] for _, b_RO, _ in ours.b)], dtype
            )
        )


def is_taken(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether activations of `dtype` on `device` take grouped products at all."""
    if NAME in disabled:
        return False
    if NAME in forced:
        return True
    return (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] in (9, 10)
    )


def find_runs(row: Row, shares: dict[str, Share], x_TD: torch.Tensor) -> list[Run]:
    """The row's stretches whose adapter has a share of a group; those that can be grouped, in one run."""
    is_grouped = is_taken(x_TD.device, x_TD.dtype)
    runs: list[Run] = []
    for stretch in row.stretches:
        share = shares.get(stretch.adapter) if stretch.adapter else None
        if share is None:
            continue
        seed = row.dropout_seeds.get(stretch.adapter or "")
        last = runs[-1] if runs and is_grouped and seed is None else None
        if last is not None and last.can_take(share, stretch.start, x_TD.dtype):
            last.ends.append(stretch.end)
            last.shares.append(share)
        else:
            runs.append(Run(stretch.start, [stretch.end], [share], seed))
    return runs


def is_aligned(sizes: list[int], dtype: torch.dtype) -> bool:
    """Whether rows of each of these sizes are multiples of 16 bytes."""
    return all(size * dtype.itemsize % 16 == 0 for size in sizes)


def forward(run: Run, x_TD: torch.Tensor, outputs_TO: list[torch.Tensor]) -> torch.Tensor:
    """Adds the run's products to its rows of the outputs.

    Args:
        run: two or more stretches.
        x_TD: the group's input, [T, D].
        outputs_TO: the output of each layer of the group, [T, O]; changed.

    Returns:
        x Aᵀ of all members side by side, which `backward` needs: [t, M·R].
    """
    offs_K = _offsets(run, x_TD.device)
    a_KRD = _stack_a(run, x_TD.dtype)
    h_tR = functional.grouped_mm(x_TD[run.rows].contiguous(), a_KRD.transpose(1, 2), offs=offs_K)
    for place, member in enumerate(run.shares[0].members):
        b_KRO = _stack_b(run, place, x_TD.dtype)
        up_tO = functional.grouped_mm(h_tR[:, run.shares[0].columns(place)], b_KRO, offs=offs_K)
        outputs_TO[member][run.rows].add_(up_tO)
    return h_tR


def backward(
    run: Run,
    h_tR: torch.Tensor,
    x_TD: torch.Tensor,
    grads_TO: list[torch.Tensor],
    grad_TD: torch.Tensor | None,
) -> None:
    """Adds to the gradients of each share's A and B, and to the input's where it is wanted.

    Args:
        run: as in `forward`.
        h_tR: what `forward` returned, [t, M·R].
        x_TD: the group's input, [T, D].
        grads_TO: the gradient of each layer's output, [T, O].
        grad_TD: the gradient of the input, [T, D], or None; changed.
    """
    offs_K = _offsets(run, x_TD.device)
    grad_members = []
    for place, member in enumerate(run.shares[0].members):
        grad_tO = grads_TO[member][run.rows].contiguous()
        b_KRO = _stack_b(run, place, x_TD.dtype)
        grad_members.append(functional.grouped_mm(grad_tO, b_KRO.transpose(1, 2), offs=offs_K))
        grad_b_KRO = functional.grouped_mm(
            h_tR[:, run.shares[0].columns(place)].T, grad_tO, offs=offs_K
        )
        grad_b_KRO = grad_b_KRO.float() * _scaling(run, x_TD.device)
        _add_each([share.b[place][2] for share in run.shares], grad_b_KRO)
    grad_tR = torch.cat(grad_members, 1)
    x_tD = x_TD[run.rows].contiguous()
    grad_a_KRD = functional.grouped_mm(grad_tR.T, x_tD, offs=offs_K)
    _add_each([share.grad_a for share in run.shares], grad_a_KRD.float())
    if grad_TD is not None:
        a_KRD = _stack_a(run, x_TD.dtype)
        grad_TD[run.rows].add_(functional.grouped_mm(grad_tR, a_KRD, offs=offs_K))


def find_fault(
    features: int, outputs: list[int], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Compares grouped products of random numbers with each trial's own, as torch differentiates them.

    Args:
        features: D of a group of layers.
        outputs: O of each of its members.
        device: where to compute.
        dtype: of the activations.

    Returns:
        What is wrong on this machine, in words; None where nothing is.
    """
    run, x_TD, grads_TO = _random_run(features, outputs, device, dtype)
    outputs_TO = [torch.zeros_like(grad_TO) for grad_TO in grads_TO]
    grad_TD = torch.zeros_like(x_TD)
    try:
        backward(run, forward(run, x_TD, outputs_TO), x_TD, grads_TO, grad_TD)
    except RuntimeError as error:  # a build of torch or a GPU that lacks the kernel
        return str(error).partition("\n")[0]
    ours = [*outputs_TO, grad_TD]
    for share in run.shares:
        ours += [share.grad_a, *(grad_b_RO for *_, grad_b_RO in share.b)]
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for found, expected in zip(ours, _one_by_one(run, x_TD, grads_TO), strict=True):
        difference = float((found.float() - expected).abs().max() / expected.abs().max())
        if not difference <= tolerance:  # NaN is not
            return f"they differ by {difference:.1e}"
    return None


def _random_run(
    features: int, outputs: list[int], device: torch.device, dtype: torch.dtype
) -> tuple[Run, torch.Tensor, list[torch.Tensor]]:
    """Three trials of unlike lengths and scalings, an input and the outputs' gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    rank, ends = 16, [37, 38, 61]
    shares = []
    for scaling in (2.0, 0.5, 1.3):
        a = draw(len(outputs) * rank, features) / features**0.5
        b = [draw(rank, size) / rank**0.5 for size in outputs]
        pairs = [(member, b_RO, torch.zeros_like(b_RO)) for member, b_RO in enumerate(b)]
        shares.append(Share(a, torch.zeros_like(a), pairs, rank, scaling, 0.0))
    x_TD = draw(ends[-1], features).to(dtype)
    return Run(0, ends, shares), x_TD, [draw(ends[-1], size).to(dtype) for size in outputs]


def _one_by_one(run: Run, x_TD: torch.Tensor, grads_TO: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs [T, O], the input's gradient [T, D], then each share's gradients of A and B: in float32."""
    with torch.enable_grad():
        x_TD = x_TD.float().requires_grad_()
        weights, parts = [], []
        for share, (start, end) in zip(
            run.shares, itertools.pairwise([run.start, *run.ends]), strict=True
        ):
            a = share.a.clone().requires_grad_()
            b = [b_RO.clone().requires_grad_() for _, b_RO, _ in share.b]
            h = (x_TD[start:end] @ a.T).split(share.rank, 1)
            parts.append([share.scaling * h_tR @ b_RO for h_tR, b_RO in zip(h, b, strict=True)])
            weights += [a, *b]
        outputs_TO = [torch.cat(stretches) for stretches in zip(*parts, strict=True)]
        grads = torch.autograd.grad(
            outputs_TO, [x_TD, *weights], [grad_TO.float() for grad_TO in grads_TO]
        )
    return [*(output_TO.detach() for output_TO in outputs_TO), *grads]


def _stack_a(run: Run, dtype: torch.dtype) -> torch.Tensor:
    """[K, M·R, D]."""
    return torch.stack([share.a for share in run.shares]).to(dtype)


def _stack_b(run: Run, place: int, dtype: torch.dtype) -> torch.Tensor:
    """Bᵀ of one member, each trial's already times its scaling: [K, R, O]."""
    b_KRO = torch.stack([share.b[place][1] for share in run.shares])
    return b_KRO.mul_(_scaling(run, b_KRO.device)).to(dtype)


def _add_each(totals: list[torch.Tensor], values: torch.Tensor) -> None:
    """totals[k] += values[k], in one launch; all float32."""
    torch._foreach_add_(totals, list(values.unbind()))  # pyright: ignore[reportPrivateImportUsage]


def _offsets(run: Run, device: torch.device) -> torch.Tensor:
    """Where each stretch ends in the run, [K]; torch's own tests let the last one be the run's end too."""
    return _end_tensor(tuple(end - run.start for end in run.ends), device)


def _scaling(run: Run, device: torch.device) -> torch.Tensor:
    """[K, 1, 1]."""
    return _scaling_tensor(tuple(share.scaling for share in run.shares), device)


# Both are the same in every layer of a step: copied to the device once, not once a layer.
@functools.lru_cache(maxsize=64)
def _end_tensor(ends: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
def _scaling_tensor(scalings: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(scalings, device=device)[:, None, None]
