"""The LoRA products of several trials in one launch each, through `torch.nn.functional.grouped_mm`.

Slice by slice, K trials cost K small products for each A and each B: on a GPU it is launching them that takes
the time. Where adjoining stretches of a row belong to trials that adapt the same layers (a `Run` with a
`Stack`), `forward` and `backward` compute all of them together; `training.packed_lora` slices the rest.
Weights are laid side by side and rounded once a row, and gradients added to the trials' own once a row, not
in each layer. Lower ranks are filled up with zeros, which is exact: what they multiply adds nothing.

What `grouped_mm` of torch 2.13 demands (its GroupedMMUtils.h, GroupedBlas.cpp and GroupMMCommon.cuh):
bfloat16 and compute capability 9 or 10, or else it waits for the device and loops; strides and addresses
that are multiples of 16 bytes; where tokens are what is summed over, a left operand that is column-major and
a right one that is row-major, or else each stretch would have to be a multiple of 8 tokens.

T tokens of the row, t of a run, K its trials, R their largest rank (whose lines are multiples of 16 bytes), P
parameters of an adapter of that rank, D input and O output features, M members of a group.
"""

import itertools
from collections.abc import Iterable
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
    span: slice
    """Where A stands in the adapter's vector."""
    spans: list[slice]
    """Where each Bᵀ does."""


@dataclass(slots=True)
class Stack:
    """The adapters of a run side by side, for all layers and both passes of one row."""

    rank: int
    """Of all of them here."""
    weights_KP: torch.Tensor
    """In the activations' dtype; B's are times the trial's scaling already."""
    grads_KP: torch.Tensor
    """Float32; each layer writes its part in the backward pass."""
    factor_KP: torch.Tensor
    """What the weights were multiplied with, [1, P] or [K, P]: 1 for A's, the scaling for B's."""
    places: list[torch.Tensor | None]
    """Where each adapter's own parameters stand in its line of P; None where that has no others."""
    ends_K: torch.Tensor
    """Where each stretch ends in the run, int32."""

    def part(self, vectors_KP: torch.Tensor, share: Share, span: slice, rows: int) -> torch.Tensor:
        """A view of one matrix of each line, [K, rows, columns]; `span` is where `share` has it.

        In one operation, since a step has thousands of them.
        """
        start, stop = (end // share.rank * self.rank for end in (span.start, span.stop))
        size = (len(vectors_KP), rows, (stop - start) // rows)
        return vectors_KP.as_strided(size, (vectors_KP.stride(0), size[2], 1), start)

    def add_grads(self, totals: list[torch.Tensor]) -> None:
        """totals[k] += the k-th trial's gradient."""
        grads = [
            grad_P if places is None else grad_P.index_select(0, places)
            for grad_P, places in zip(self.grads_KP.mul_(self.factor_KP), self.places, strict=True)
        ]
        torch._foreach_add_(totals, grads)  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True, slots=True)
class Layout:
    """How vectors of adapters of the same layers are made: of a matrix of R lines for each A and each Bᵀ."""

    columns: tuple[int, ...]
    """Of each matrix, in their order."""
    is_b: tuple[bool, ...]

    def places(self, rank: int, larger: int, device: torch.device) -> torch.Tensor | None:
        """Where an adapter's parameters stand in the vector of one of a larger rank; None for its own."""
        if rank == larger:
            return None
        columns = torch.tensor(self.columns)
        before = (columns.cumsum(0) - columns) * (larger - rank)
        places = torch.arange(rank * sum(self.columns)) + before.repeat_interleave(columns * rank)
        return places.to(device)

    def are_b(self, rank: int, device: torch.device) -> torch.Tensor:
        """Which parameters of the vector are B's, [P]."""
        sizes = torch.tensor(self.columns) * rank
        return torch.tensor(self.is_b).repeat_interleave(sizes).to(device)


@dataclass(slots=True)
class Run:
    """Adjoining stretches of a row whose adapters are multiplied together, or a single one."""

    start: int
    ends: list[int]
    """Where each stretch ends in the row; the next one begins there."""
    adapters: list[str]
    """Each stretch's."""
    seed: int | None = None
    """Of a single stretch's dropout masks; None where nothing is dropped."""
    stack: Stack | None = None
    """None for a single stretch that is sliced."""

    @property
    def rows(self) -> slice:
        return slice(self.start, self.ends[-1])


def columns(place: int, rank: int) -> slice:
    """Where the R columns of the member in this place stand among those of all."""
    return slice(place * rank, (place + 1) * rank)


def find_runs(row: Row, layers: dict[str, object], is_grouped: bool) -> list[Run]:
    """The row's stretches that have an adapter; those that may be multiplied together in one run.

    Args:
        row: where they are.
        layers: which each adapter adapts, by its name: the same in a run.
        is_grouped: whether any may be.
    """
    runs: list[Run] = []
    for stretch in row.stretches:
        if stretch.adapter is None:
            continue
        seed = row.dropout_seeds.get(stretch.adapter)
        last = runs[-1] if runs and is_grouped else None
        if (
            last is not None
            and last.seed is None
            and seed is None
            and last.ends[-1] == stretch.start
            and layers[last.adapters[0]] == layers[stretch.adapter]
        ):
            last.ends.append(stretch.end)
            last.adapters.append(stretch.adapter)
        else:
            runs.append(Run(stretch.start, [stretch.end], [stretch.adapter], seed))
    return runs


def aligned(rank: int, dtype: torch.dtype) -> int:
    """The smallest rank from this one on whose lines are multiples of 16 bytes."""
    step = 16 // dtype.itemsize
    return -(-rank // step) * step


def make_stack(
    run: Run,
    weights: list[torch.Tensor],
    scalings: list[float],
    rank: int,
    places: list[torch.Tensor | None],
    is_b_P: torch.Tensor,
    dtype: torch.dtype,
    *,
    with_grads: bool,
) -> Stack:
    """The run's adapters side by side.

    Args:
        run: K stretches.
        weights: each adapter's vector, float32.
        scalings: each adapter's.
        rank: of all of them together.
        places: where each vector's parameters stand in one of that rank; None where it is of that rank.
        is_b_P: which parameters of that one are B's.
        dtype: of the activations.
        with_grads: whether there will be a backward pass.
    """
    device = is_b_P.device
    different = scalings if len(set(scalings)) > 1 else scalings[:1]
    scaling_K1 = torch.tensor(different, device=device)[:, None]
    factor_KP = torch.where(is_b_P, scaling_K1, 1.0)
    weights_KP = torch.zeros(len(weights), len(is_b_P), device=device)
    for line_P, vector, place in zip(weights_KP, weights, places, strict=True):
        if place is None:
            line_P.copy_(vector)
        else:
            line_P.index_copy_(0, place, vector)
    ends_K = torch.tensor([end - run.start for end in run.ends], dtype=torch.int32, device=device)
    # Zeros, since a layer that a forward pass leaves out writes nothing.
    grads_KP = torch.zeros_like(weights_KP if with_grads else weights_KP[:, :0])
    return Stack(rank, weights_KP.mul_(factor_KP).to(dtype), grads_KP, factor_KP, places, ends_K)


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


def is_aligned(sizes: Iterable[int], dtype: torch.dtype) -> bool:
    """Whether rows of each of these sizes are multiples of 16 bytes."""
    return all(size * dtype.itemsize % 16 == 0 for size in sizes)


def forward(
    run: Run, stack: Stack, share: Share, x_TD: torch.Tensor, outputs_TO: list[torch.Tensor]
) -> torch.Tensor:
    """Adds the run's products to its rows of the outputs.

    Args:
        run: its stretches.
        stack: their adapters.
        share: the first adapter's share of the group; the others adapt the same layers.
        x_TD: the group's input, [T, D].
        outputs_TO: the output of each layer of the group, [T, O]; changed.

    Returns:
        x Aᵀ of all members side by side, which `backward` needs: [t, M·R].
    """
    a_KRD = stack.part(stack.weights_KP, share, share.span, len(share.b) * stack.rank)
    h_tR = functional.grouped_mm(
        x_TD[run.rows].contiguous(), a_KRD.transpose(1, 2), offs=stack.ends_K
    )
    for place, ((member, *_), span) in enumerate(zip(share.b, share.spans, strict=True)):
        b_KRO = stack.part(stack.weights_KP, share, span, stack.rank)
        up_tO = functional.grouped_mm(h_tR[:, columns(place, stack.rank)], b_KRO, offs=stack.ends_K)
        outputs_TO[member][run.rows].add_(up_tO)
    return h_tR


def backward(
    run: Run,
    stack: Stack,
    share: Share,
    h_tR: torch.Tensor,
    x_TD: torch.Tensor,
    grads_TO: list[torch.Tensor],
    grad_TD: torch.Tensor | None,
) -> None:
    """Gives the stack the gradients of A and B, and adds the input's where it is wanted.

    Args:
        run: as in `forward`.
        stack: likewise.
        share: likewise.
        h_tR: what `forward` returned, [t, M·R].
        x_TD: the group's input, [T, D].
        grads_TO: the gradient of each layer's output, [T, O].
        grad_TD: the gradient of the input, [T, D], or None; changed.
    """
    grad_members = []
    for place, ((member, *_), span) in enumerate(zip(share.b, share.spans, strict=True)):
        grad_tO = grads_TO[member][run.rows].contiguous()
        b_KRO = stack.part(stack.weights_KP, share, span, stack.rank)
        grad_members.append(
            functional.grouped_mm(grad_tO, b_KRO.transpose(1, 2), offs=stack.ends_K)
        )
        h_tr = h_tR[:, columns(place, stack.rank)]
        grad_b_KRO = functional.grouped_mm(h_tr.T, grad_tO, offs=stack.ends_K)
        stack.part(stack.grads_KP, share, span, stack.rank).copy_(grad_b_KRO)
    grad_tR = torch.cat(grad_members, 1)
    x_tD = x_TD[run.rows].contiguous()
    grad_a_KRD = functional.grouped_mm(grad_tR.T, x_tD, offs=stack.ends_K)
    rows = len(share.b) * stack.rank
    stack.part(stack.grads_KP, share, share.span, rows).copy_(grad_a_KRD)
    if grad_TD is not None:
        a_KRD = stack.part(stack.weights_KP, share, share.span, rows)
        grad_TD[run.rows].add_(functional.grouped_mm(grad_tR, a_KRD, offs=stack.ends_K))


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
    run, shares, x_TD, grads_TO = _random_run(features, outputs, device, dtype)
    outputs_TO = [torch.zeros_like(grad_TO) for grad_TO in grads_TO]
    grad_TD = torch.zeros_like(x_TD)
    weights = [
        torch.cat([share.a.flatten(), *(b_RO.flatten() for _, b_RO, _ in share.b)])
        for share in shares
    ]
    layout = Layout(
        (*(features for _ in outputs), *outputs), (False,) * len(outputs) + (True,) * len(outputs)
    )
    rank = max(share.rank for share in shares)
    places = [layout.places(share.rank, rank, device) for share in shares]
    scalings = [share.scaling for share in shares]
    totals = [torch.zeros_like(vector) for vector in weights]
    try:
        stack = make_stack(
            run,
            weights,
            scalings,
            rank,
            places,
            layout.are_b(rank, device),
            dtype,
            with_grads=True,
        )
        h_tR = forward(run, stack, shares[0], x_TD, outputs_TO)
        backward(run, stack, shares[0], h_tR, x_TD, grads_TO, grad_TD)
        stack.add_grads(totals)
    except RuntimeError as error:  # a build of torch or a GPU that lacks the kernel
        return str(error).partition("\n")[0]
    ours = [*outputs_TO, grad_TD]
    for share, total in zip(shares, totals, strict=True):
        matrices = [share.a, *(b_RO for _, b_RO, _ in share.b)]
        for span, matrix in zip([share.span, *share.spans], matrices, strict=True):
            ours.append(total[span].view_as(matrix))
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for found, expected in zip(ours, _one_by_one(run, shares, x_TD, grads_TO), strict=True):
        difference = float((found.float() - expected).abs().max() / expected.abs().max())
        if not difference <= tolerance:  # NaN is not
            return f"they differ by {difference:.1e}"
    return None


def _random_run(
    features: int, outputs: list[int], device: torch.device, dtype: torch.dtype
) -> tuple[Run, list[Share], torch.Tensor, list[torch.Tensor]]:
    """Three trials unlike in length, rank and scaling; their shares, an input, the outputs' gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    ends, shares = [37, 38, 61], []
    for rank, scaling in ((16, 2.0), (8, 0.5), (16, 1.3)):
        a = draw(len(outputs) * rank, features) / features**0.5
        b = [draw(rank, size) / rank**0.5 for size in outputs]
        pairs = [(member, b_RO, torch.zeros_like(b_RO)) for member, b_RO in enumerate(b)]
        places = list(itertools.accumulate([a.numel(), *(b_RO.numel() for b_RO in b)]))
        span, spans = slice(0, places[0]), [slice(*two) for two in itertools.pairwise(places)]
        shares.append(Share(a, torch.zeros_like(a), pairs, rank, scaling, 0.0, span, spans))
    x_TD = draw(ends[-1], features).to(dtype)
    run = Run(0, ends, [f"t{number}" for number in range(len(ends))])
    return run, shares, x_TD, [draw(ends[-1], size).to(dtype) for size in outputs]


def _one_by_one(
    run: Run, shares: list[Share], x_TD: torch.Tensor, grads_TO: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Outputs [T, O], the input's gradient [T, D], then each share's gradients of A and B: in float32."""
    with torch.enable_grad():
        x_TD = x_TD.float().requires_grad_()
        weights, parts = [], []
        for share, (start, end) in zip(
            shares, itertools.pairwise([run.start, *run.ends]), strict=True
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
