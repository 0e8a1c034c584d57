"""The LoRA products of several trials in one launch each, through `torch.nn.functional.grouped_mm`.

Slice by slice, K trials cost K small products for each A and each B: on a GPU it is launching them that takes
the time. Where adjoining stretches of a row belong to trials of one shape (a `Run` with a `Stack`), `forward`
and `backward` compute all of them together; `training.packed_lora` slices the rest. Weights are laid side by
side and rounded once a row, and gradients added to the trials' own once a row, not in each layer.

What `grouped_mm` of torch 2.13 demands (its GroupedMMUtils.h, GroupedBlas.cpp and GroupMMCommon.cuh):
bfloat16 and compute capability 9 or 10, or else it waits for the device and loops; strides and addresses
that are multiples of 16 bytes; where tokens are what is summed over, a left operand that is column-major and
a right one that is row-major, or else each stretch would have to be a multiple of 8 tokens.

T tokens of the row, t of a run, K its trials, P parameters of an adapter, D input and O output features,
R rank, M members of a group.
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

    def columns(self, place: int) -> slice:
        """Where the R columns of the member in this place stand among those of all."""
        return slice(place * self.rank, (place + 1) * self.rank)


@dataclass(slots=True)
class Stack:
    """The adapters of a run side by side, for all layers and both passes of one row."""

    weights_KP: torch.Tensor
    """In the activations' dtype; B's are times the trial's scaling already."""
    grads_KP: torch.Tensor
    """Float32; each layer writes its part in the backward pass."""
    factor_KP: torch.Tensor
    """What the weights were multiplied with, [1, P] or [K, P]: 1 for A's, the scaling for B's."""
    ends_K: torch.Tensor
    """Where each stretch ends in the run, int32."""

    def weights(self, span: slice, rows: int) -> torch.Tensor:
        """[K, rows, span / rows]."""
        return _part(self.weights_KP, span, rows)

    def put_grad(self, span: slice, grad: torch.Tensor) -> None:
        """Takes a gradient of such weights."""
        _part(self.grads_KP, span, grad.shape[1]).copy_(grad)

    def add_grads(self, totals: list[torch.Tensor]) -> None:
        """totals[k] += the k-th trial's gradient [P]."""
        grads = self.grads_KP.mul_(self.factor_KP).unbind()
        torch._foreach_add_(totals, list(grads))  # pyright: ignore[reportPrivateImportUsage]


def _part(vectors_KP: torch.Tensor, span: slice, rows: int) -> torch.Tensor:
    """A view of one matrix of each vector; in one operation, of which a step has thousands."""
    num, columns = len(vectors_KP), (span.stop - span.start) // rows
    strides = (vectors_KP.stride(0), columns, 1)
    return vectors_KP.as_strided((num, rows, columns), strides, span.start)


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


def find_runs(row: Row, shapes: dict[str, object], is_grouped: bool) -> list[Run]:
    """The row's stretches that have an adapter; those that may be multiplied together in one run.

    Args:
        row: where they are.
        shapes: what adapters of one run have in common, by their name; None is never grouped.
        is_grouped: whether any are.
    """
    runs: list[Run] = []
    for stretch in row.stretches:
        if stretch.adapter is None:
            continue
        seed = row.dropout_seeds.get(stretch.adapter)
        shape = shapes[stretch.adapter]
        last = runs[-1] if runs and is_grouped and seed is None and shape is not None else None
        if (
            last is not None
            and last.seed is None
            and last.ends[-1] == stretch.start
            and shapes[last.adapters[0]] == shape
        ):
            last.ends.append(stretch.end)
            last.adapters.append(stretch.adapter)
        else:
            runs.append(Run(stretch.start, [stretch.end], [stretch.adapter], seed))
    return runs


def make_stack(
    run: Run,
    weights: list[torch.Tensor],
    scalings: list[float],
    is_b_P: torch.Tensor,
    dtype: torch.dtype,
    *,
    with_grads: bool,
) -> Stack:
    """The run's adapters side by side.

    Args:
        run: K stretches.
        weights: each adapter's vector, [P], float32.
        scalings: each adapter's.
        is_b_P: which parameters are B's.
        dtype: of the activations.
        with_grads: whether there will be a backward pass.
    """
    device = is_b_P.device
    different = scalings if len(set(scalings)) > 1 else scalings[:1]
    scaling_K1 = torch.tensor(different, device=device)[:, None]
    factor_KP = torch.where(is_b_P, scaling_K1, 1.0)
    weights_KP = torch.stack(weights)
    ends_K = torch.tensor([end - run.start for end in run.ends], dtype=torch.int32, device=device)
    # Zeros, since a layer that a forward pass leaves out writes nothing.
    grads_KP = torch.zeros_like(weights_KP if with_grads else weights_KP[:, :0])
    return Stack(weights_KP.mul_(factor_KP).to(dtype), grads_KP, factor_KP, ends_K)


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
        share: any of these adapters' share of the group: they are of one shape.
        x_TD: the group's input, [T, D].
        outputs_TO: the output of each layer of the group, [T, O]; changed.

    Returns:
        x Aᵀ of all members side by side, which `backward` needs: [t, M·R].
    """
    a_KRD = stack.weights(share.span, len(share.a))
    h_tR = functional.grouped_mm(
        x_TD[run.rows].contiguous(), a_KRD.transpose(1, 2), offs=stack.ends_K
    )
    for place, ((member, *_), span) in enumerate(zip(share.b, share.spans, strict=True)):
        b_KRO = stack.weights(span, share.rank)
        up_tO = functional.grouped_mm(h_tR[:, share.columns(place)], b_KRO, offs=stack.ends_K)
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
        b_KRO = stack.weights(span, share.rank)
        grad_members.append(
            functional.grouped_mm(grad_tO, b_KRO.transpose(1, 2), offs=stack.ends_K)
        )
        h_tr = h_tR[:, share.columns(place)]
        stack.put_grad(span, functional.grouped_mm(h_tr.T, grad_tO, offs=stack.ends_K))
    grad_tR = torch.cat(grad_members, 1)
    x_tD = x_TD[run.rows].contiguous()
    stack.put_grad(share.span, functional.grouped_mm(grad_tR.T, x_tD, offs=stack.ends_K))
    if grad_TD is not None:
        a_KRD = stack.weights(share.span, len(share.a))
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
    run, shares, scalings, x_TD, grads_TO = _random_run(features, outputs, device, dtype)
    outputs_TO = [torch.zeros_like(grad_TO) for grad_TO in grads_TO]
    grad_TD = torch.zeros_like(x_TD)
    weights = [
        torch.cat([share.a.flatten(), *(b_RO.flatten() for _, b_RO, _ in share.b)])
        for share in shares
    ]
    is_b_P = torch.arange(len(weights[0]), device=device) >= shares[0].a.numel()
    totals = [torch.zeros_like(vector) for vector in weights]
    try:
        stack = make_stack(run, weights, scalings, is_b_P, dtype, with_grads=True)
        h_tR = forward(run, stack, shares[0], x_TD, outputs_TO)
        backward(run, stack, shares[0], h_tR, x_TD, grads_TO, grad_TD)
        stack.add_grads(totals)
    except RuntimeError as error:  # a build of torch or a GPU that lacks the kernel
        return str(error).partition("\n")[0]
    ours = [*outputs_TO, grad_TD]
    for share, total in zip(shares, totals, strict=True):
        for span, like in zip(
            [share.span, *share.spans], [share.a, *(b for _, b, _ in share.b)], strict=True
        ):
            ours.append(total[span].view_as(like))
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for found, expected in zip(ours, _one_by_one(run, shares, x_TD, grads_TO), strict=True):
        difference = float((found.float() - expected).abs().max() / expected.abs().max())
        if not difference <= tolerance:  # NaN is not
            return f"they differ by {difference:.1e}"
    return None


def _random_run(
    features: int, outputs: list[int], device: torch.device, dtype: torch.dtype
) -> tuple[Run, list[Share], list[float], torch.Tensor, list[torch.Tensor]]:
    """Three trials of unlike lengths and scalings, their shares, an input and the outputs' gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    rank, ends, scalings = 16, [37, 38, 61], [2.0, 0.5, 1.3]
    shares = []
    for scaling in scalings:
        a = draw(len(outputs) * rank, features) / features**0.5
        b = [draw(rank, size) / rank**0.5 for size in outputs]
        places = list(itertools.accumulate([a.numel(), *(b_RO.numel() for b_RO in b)]))
        spans = [slice(*pair) for pair in itertools.pairwise(places)]
        pairs = [(member, b_RO, torch.zeros_like(b_RO)) for member, b_RO in enumerate(b)]
        shares.append(
            Share(a, torch.zeros_like(a), pairs, rank, scaling, 0.0, slice(0, a.numel()), spans)
        )
    x_TD = draw(ends[-1], features).to(dtype)
    run = Run(0, ends, [f"t{number}" for number in range(len(ends))])
    return run, shares, scalings, x_TD, [draw(ends[-1], size).to(dtype) for size in outputs]


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
