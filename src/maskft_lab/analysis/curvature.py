"""Curvature of the loss in the masked matrices: trace and largest eigenvalue of Hessians (Eqs. 16-18).

The paper argues that a mask's minimum is flatter because H_mask = P H_fft P (Eq. 17), P the projection onto the kept
weights. Four Hessians are computed, so that the argument can be compared with the fact:

* ``start_all``: at the weights under the mask, over all entries of the masked matrices: H_fft.
* ``start_kept``: P H_fft P, Eq. 17. Its largest eigenvalue is at most that of H_fft for every projection (Cauchy), and
  its trace (1 - sparsity) Tr(H_fft) for a random mask on average. So it describes the removed weights, and not the
  point to which the mask leads: Eq. 17 takes H at a point that the masked model has left.
* ``mask_all``: at the weights with the mask, over all entries. Whether this is flatter than ``start_all`` is the
  question.
* ``mask_kept``: the same over kept entries: the directions that the masked model still has.

None of them says that flatter generalises better: a rescaling that leaves the function as it is changes curvature
(Dinh et al., https://arxiv.org/abs/1703.04933). Where ``smallest`` is below 0, H is not positive semi-definite, as
Eq. 16 assumes, and the trace is a sum with both signs.

Hessian-vector products are those of curvlinops (the extra ``analysis``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor, nn

from maskft.data.tokenizing import IGNORED
from maskft.models import load_model
from maskft_common.errors import UserError, install_hint
from maskft_common.files import digest

from ..results.statistics import weighted_mean
from ..store import Store
from .losses import Batch, Sampling, check_ids, make_batches
from .masks import masks_of
from .records import Report, digest_folder, is_finished, no_report, pieces_of, write_record

# v -> H v, float64 (num_weights,)
Product = Callable[[np.ndarray], np.ndarray]

TOLERANCE = 1e-3  # of eigenvalues, relative


class _SiLU(nn.Module):
    """SiLU from operations that can be differentiated in forward mode, unlike the backward pass of torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class _Logits(nn.Module):
    """Token ids -> logits of the next tokens, (rows x (tokens - 1), vocabulary), float32."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        output = self.model(input_ids=ids_BT, use_cache=False)
        # The logits at the last token predict nothing that is there.
        logits_BTV = output.logits[:, :-1]
        return logits_BTV.flatten(0, 1).float()


def hessian_products(
    model,
    names: Sequence[str],
    batches: Sequence[Batch],
) -> list[Product]:
    """Hessian-vector products of the mean loss (nats per token) of each batch, over the weights of the named modules.

    Args:
        model: A causal language model with ``attn_implementation="eager"``; its SiLUs are replaced by equal ones.
        names: Modules, in the order in which their weights are flattened and joined.
        batches: Token ids and labels.
    """
    # Lists, because modules are replaced while they are visited.
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # By name: torch's, and the copy of it that transformers has.
            kind = type(child).__name__
            # A Hessian-vector product differentiates the gradient once more, in forward mode.
            if kind in ("SiLU", "SiLUActivation"):
                setattr(parent, name, _SiLU())

    # Other weights need no gradient, and the Hessian leaves them out.
    model.requires_grad_(False)
    weights = []
    for name in names:
        weight = model.get_submodule(name).weight
        # The model's own parameters and no copies, so that the operators see masks that are applied later.
        weights.append(weight.requires_grad_(True))

    # One operator for each batch: their spread gives the standard error over rows.
    loss = nn.CrossEntropyLoss(ignore_index=IGNORED)
    products: list[Product] = []
    for ids_BT, labels_BT in batches:
        # The logits at position t predict token t + 1.
        targets = labels_BT[:, 1:].flatten()
        product = operator_product(_Logits(model), loss, weights, ids_BT, targets)
        products.append(product)
    return products


def operator_product(
    model,
    loss,
    parameters: list[nn.Parameter],
    inputs: Tensor,
    targets: Tensor,
) -> Product:
    """Hessian-vector product of ``loss(model(inputs), targets)`` in ``parameters``, at their present values."""
    # Imported here, because curvlinops is an extra and the other analyses do without it.
    check_curvlinops()
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        model,
        loss,
        parameters,
        [(inputs, targets)],
        check_deterministic=False,  # it computes loss, gradient and a product twice; eval mode draws nothing
        num_data=len(inputs),  # one batch is all the data: its mean is not scaled
    )
    like = parameters[0]

    def product(vector: np.ndarray) -> np.ndarray:
        """H v: float64 outside, as ARPACK wants it, and the weights' float32 on their device inside."""
        on_device = torch.as_tensor(
            vector,
            dtype=like.dtype,
            device=like.device,
        )
        result = operator @ on_device
        return result.double().cpu().numpy()

    return product


def quadratic_forms(
    products: Sequence[Product],
    kept: np.ndarray,
    num_probes: int,
    seed: int,
    pieces: Store,
    name: str,
    on_probe: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """z^T P H_b P z of each probe z and batch b (Hutchinson), float64 (num_probes, num_batches).

    Args:
        products: H_b of each batch.
        kept: Bool (num_weights,), the diagonal of P.
        num_probes: Rademacher vectors; each depends on ``seed`` and its number alone.
        seed: Of the probes.
        pieces: Keeps each probe's numbers.
        name: Of the Hessian, in ``pieces``.
        on_probe: Called after each probe.

    Raises:
        UserError: If a number is not finite.
    """

    def forms_of(index: int) -> list[float]:
        # By its number, so that a resumed run draws the same probes.
        generator = np.random.default_rng([seed, index])
        signs = generator.choice([-1.0, 1.0], len(kept))
        # Signs have mean 0 and variance 1, so the mean of z^T H z is the trace of P H P (Hutchinson). P is not applied
        # to the product, because z is 0 wherever P is.
        z = kept * signs
        # Batch by batch: the spread between them is the error over rows.
        forms_of_batches: list[float] = []
        for product in products:
            form = float(z @ product(z))
            if not math.isfinite(form):
                # Now, and not after minutes or hours of other probes.
                raise UserError("the Hessian is NaN or infinite: check that the models' weights and losses are finite")
            forms_of_batches.append(form)
        return forms_of_batches

    forms = []
    for index in range(num_probes):
        compute = functools.partial(forms_of, index)
        # Computed only if an earlier run, which was killed, has not kept it.
        forms.append(pieces.get(f"{name} {index}", compute))
        on_probe()
    return np.array(forms)


def trace_estimate(
    forms: np.ndarray,
    shares: np.ndarray,
) -> dict[str, float | None]:
    """Trace from quadratic forms.

    Args:
        forms: (probes, batches), or the difference of two with the same probes and batches.
        shares: Share of the tokens in each batch, sum 1.

    Returns:
        ``trace``; its standard errors ``stderr_probes``, over probes on these rows (None for one probe), and
        ``stderr_rows``, over rows, from the spread between batches (None for one batch).
    """
    num_probes, num_batches = forms.shape
    # The Hessian of the mean loss is the mean of the batches' Hessians, by their tokens.
    per_probe = forms @ shares  # (probes,)
    stderr_probes = None
    # Probes are independent draws: the usual standard error of a mean.
    if num_probes > 1:
        deviation = per_probe.std(ddof=1)
        stderr_probes = float(deviation / num_probes**0.5)

    # Batches have different numbers of tokens: the spread is weighted as the mean is.
    stderr_rows = None
    if num_batches > 1:
        per_batch = forms.mean(0)
        _, stderr_rows = weighted_mean(per_batch, shares)
    return {
        "trace": float(per_probe.mean()),
        "stderr_probes": stderr_probes,
        "stderr_rows": stderr_rows,
    }


def largest_eigenvalue(
    products: Sequence[Product],
    shares: np.ndarray,
    kept: np.ndarray,
    seed: int,
) -> dict[str, float | None]:
    """Largest eigenvalue of P H P by Lanczos (ARPACK), H the token-weighted mean of the batches' Hessians.

    Args:
        products: H_b of each batch.
        shares: Share of the tokens in each batch, sum 1.
        kept: Bool (num_weights,), the diagonal of P.
        seed: Of the first vector.

    Returns:
        ``eigenvalue``; its ``stderr_rows`` to first order, from the spread of v^T H_b v between batches (None for one
        batch); ``smallest``, the lowest eigenvalue.
    """

    def apply(vector: np.ndarray) -> np.ndarray:
        # P is diagonal, 1 for kept entries and 0 for others: P v is kept * v. scipy may pass a vector or a matrix of
        # one column.
        inner = kept * vector.reshape(-1)
        mean = np.zeros_like(inner)
        for share, product in zip(shares, products, strict=True):
            mean += share * product(inner)
        return kept * mean

    num_weights = len(kept)
    # A start of kept entries, which Lanczos does not leave: removed ones would add eigenvalues of 0.
    generator = np.random.default_rng(seed)
    start = kept * generator.standard_normal(num_weights)
    shape = (num_weights, num_weights)
    operator = LinearOperator(shape, matvec=apply, dtype=np.float64)
    # Lanczos needs products only: H itself would have num_weights^2 entries.
    try:
        # BE: both ends of the spectrum, from one Krylov space.
        (smallest, largest), vectors = eigsh(
            operator,
            k=2,
            which="BE",
            v0=start,
            tol=TOLERANCE,
        )
    except (ArpackError, TypeError) as error:
        # No convergence, a Hessian of zeros or with NaN, or (TypeError) fewer than three weights.
        raise UserError(
            f"the largest eigenvalue cannot be computed ({error}): check that the model's losses are finite, or take "
            "more --num_rows"
        ) from error

    # To first order, a perturbation dH changes the eigenvalue by v^T dH v, v the eigenvector of length 1.
    # The second vector is that of the larger eigenvalue. Rounding may have left it small values at removed entries.
    v = kept * vectors[:, 1]
    forms = [v @ product(v) for product in products]
    stderr_rows = None
    if len(products) > 1:
        _, stderr_rows = weighted_mean(np.array(forms), shares)
    return {
        "eigenvalue": float(largest),
        "stderr_rows": stderr_rows,
        "smallest": float(smallest),
    }


def analyse_curvature(
    file: Path,
    start: str,
    adapter: str,
    rows: Sequence[Mapping],
    num_probes: int,
    sampling: Sampling,
    report: Report = no_report,
) -> None:
    """Write the four Hessians' `trace_estimate` and, as ``largest``, `largest_eigenvalue`, in float32 (``.json``).

    ``less_start_all`` of ``mask_all`` is its trace's difference from that of ``start_all`` with its own errors, which
    are smaller than those of the two, as probes and rows are the same. ``density`` is the share of kept weights.

    Args:
        file: Where the record goes; probes that are done survive a kill.
        start: Model under the mask.
        adapter: Folder of the mask.
        rows: Tokenised rows; ``stderr_rows`` is from the spread between batches of them.
        num_probes: Random vectors per trace.
        sampling: Batch size, device, seed of probes and Lanczos.
        report: Called after each probe and each eigenvalue.

    Raises:
        UserError: If the mask is of another model or removes all its weights, rows are of another tokenizer, or a
            number is not finite.
    """
    settings: dict[str, Any] = {
        "what": "curvature",
        "num_probes": num_probes,
        "seed": sampling.seed,
        "start": digest_folder(start),
        "mask": digest_folder(adapter),
        "batch_size": sampling.batch_size,
        "rows": digest(rows),
        "num_rows": len(rows),
    }
    if is_finished(file, settings):
        return

    # One order of the matrices for the masks, the weights and all vectors.
    masks = masks_of(adapter)
    names = sorted(masks)
    flat_masks = [masks[name].flatten() for name in names]
    kept = torch.cat(flat_masks).numpy()
    if not kept.any():
        raise UserError(
            f"the mask {adapter!r} removes all weights of its matrices, and keeps no direction of a Hessian"
        )

    # Eager, because fused attention has no second derivative.
    model = load_model(start, "float32", attn_implementation="eager")
    model = model.to(sampling.device).eval()
    check_ids(rows, model)
    masks.weights_in(model)  # raises if the mask is of another model
    batches = make_batches(rows, sampling.batch_size, sampling.device)
    # Once for all four Hessians: the products read the model's weights when they are called.
    products = hessian_products(model, names, batches)
    shares = _token_shares(batches)

    # Each Hessian has its probes and one eigenvalue.
    num_hessians = 4
    total = num_hessians * (num_probes + 1)
    num_done = 0

    def count() -> None:
        """Report one more probe or eigenvalue."""
        nonlocal num_done
        num_done += 1
        report(num_done, total)

    # A probe of a large model may take minutes: those that are done are kept beside the file.
    pieces = pieces_of(file, settings)
    forms: dict[str, np.ndarray] = {}
    hessians: dict[str, dict] = {}

    def measure(name: str, diagonal: np.ndarray) -> None:
        """Compute trace and eigenvalues of one Hessian at the model's present weights."""
        # The same seed for all four: the difference of two Hessians is then measured with the same probes.
        forms[name] = quadratic_forms(
            products,
            diagonal,
            num_probes,
            sampling.seed,
            pieces,
            name,
            count,
        )
        find = functools.partial(
            largest_eigenvalue,
            products,
            shares,
            diagonal,
            sampling.seed,
        )
        largest = pieces.get(f"{name} eigenvalue", find)
        count()
        trace = trace_estimate(forms[name], shares)
        hessians[name] = {**trace, "largest": largest}

    # Products are at the present weights: first those under the mask, then, after ``apply_``, those with it.
    every = np.ones_like(kept)
    measure("start_all", every)
    measure("start_kept", kept)
    masks.apply_(model)
    measure("mask_all", every)
    measure("mask_kept", kept)

    # The same probes on the same rows: errors that both traces share cancel in the difference of their forms.
    difference = forms["mask_all"] - forms["start_all"]
    hessians["mask_all"]["less_start_all"] = trace_estimate(difference, shares)

    record = {
        **hessians,
        "density": 1 - masks.sparsity,
        "num_weights": masks.numel,
    }
    write_record(file, record, settings)
    pieces.remove()


def _token_shares(batches: Sequence[Batch]) -> np.ndarray:
    """Share of the supervised tokens in each batch, (batches,), sum 1: the weights of a mean over all tokens."""
    num_tokens: list[int] = []
    for _, labels_BT in batches:
        # The first token has no prediction, so its label counts for nothing.
        is_supervised = labels_BT[:, 1:] != IGNORED
        num_tokens.append(int(is_supervised.sum()))
    tokens = np.array(num_tokens, dtype=np.float64)
    return tokens / tokens.sum()


def check_curvlinops() -> None:
    """Raise if the package that computes Hessian-vector products is missing."""
    try:
        import curvlinops  # noqa: F401
    except ImportError as error:
        raise UserError(f"curvature needs curvlinops ({install_hint('analysis')}): {error}") from error
