"""NBL (arXiv:2505.21077): a linear map in each dropped place, and its choice of layers. rivals.py says what was read of it."""

import dataclasses

import numpy as np
import torch
from torch import nn

from ..base.errors import LLMDropError
from ..dropping.maps import LinearMap
from ..dropping.plan import NAMES, DropPlan
from ..measure.guard import evaluating
from ..models.families import family_of
from .moments import Moments, solve
from .rivals import RIDGE, checked, dense_pass, need_plain_stream, terms


def fit_maps(model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, batch_size: int = 4, ridge: float = RIDGE) -> DropPlan:
    """The plan with a linear map for each dropped attention that has none yet (NBL). No weight of the model changes.

    With x what the attention module reads and y what it returns (before a norm that follows), of all tokens, the map is the
    linear estimator of the least mean square error:

        W = C_yx (C_xx + ridge * mean(diag(C_xx)) * I)^-1,  b = E[y] - W E[x]

    The authors' code uses no ridge, and its published settings take the stream before the norm for x, and remove the norm. A
    drop plan keeps norms where it has maps, so that here x is the normed stream in families whose norms come first.

    model: whole, of any family and dtype. tokens: LongTensor (n_samples, seq_len), more of them than the stream is wide.
    batch_size: samples per forward pass. Memory: 48 bytes * width^2 a map. Time: two to three forward passes. Products are
    formed in float32 (float64 if the model is), sums in float64; maps are float32. Raises LLMDropError for wrong input, a model
    that lacks sub-layers, and statistics that are singular or not finite.
    """
    anatomy, tokens, batch_size = checked(model, tokens, plan, batch_size, ridge)
    name = family_of(anatomy.decoder.config).attention_unit[0]
    chosen = [index for index in sorted(plan.attention) if plan.map_of("attention", index) is None]
    units = {index: anatomy.layers[index].block.get_submodule(name) for index in chosen}
    sums = {index: _Covariance() for index in chosen}
    with evaluating(model):
        taps = {index: {side: (unit, side) for side in ("input", "output")} for index, unit in units.items()}
        for index, _, seen in dense_pass(model, anatomy, tokens, batch_size, taps):
            sums[index].add(seen["input"], seen["output"])
    fitted = []
    for index, each in sums.items():
        mean, covariance = each.result()
        n = len(mean) // 2
        weight = solve(covariance[:n, :n], covariance[:n, n:], ridge).T
        fitted.append(("attention", index, LinearMap(weight, mean[n:] - weight @ mean[:n])))
    return dataclasses.replace(plan, maps=(*plan.maps, *fitted))


def canonical_correlation_bound(
    model: nn.Module, tokens: torch.LongTensor, kind: str = "attention", batch_size: int = 4
) -> np.ndarray:
    """NBL's criterion, float64 (n_layers,): the layer of the smallest value is linearised first.

        bound = (d - r) + sum_i (1 - rho_i^2)

    X is the stream that the "attention" or "mlp" reads, before its norm, Y+ = X + what it adds, both d wide. rho are their
    canonical correlations over all tokens, r is their number. The bound is on the error of the linear estimator of Y+ from X,
    relative to the variance of Y+. The authors' published settings take the same X and Y+. Their code has no d - r: it is zero
    unless X or Y+ does not vary in some direction (but for ten times the rounding error of the products), where that code
    fails. Whether the paper's r is the same there could not be checked. Arguments and errors as in `fit_maps`.
    """
    if kind not in NAMES:
        raise LLMDropError(f"The kind of sub-layer must be 'attention' or 'mlp', but is {kind!r}.")
    anatomy, tokens, batch_size = checked(model, tokens, DropPlan(), batch_size, 0.0)
    need_plain_stream(anatomy)
    beside = family_of(anatomy.decoder.config).mlp_input is None  # the MLP reads the stream that attention reads
    sums = [_Covariance() for _ in anatomy.layers]
    with evaluating(model):
        for (_, index), stream, x, term in terms(model, anatomy, tokens, batch_size, [(kind, i) for i in range(len(sums))]):
            x = stream if beside else x
            sums[index].add(x, x + term)
    rhos = [each.canonical_correlations() for each in sums]
    return np.array([x.shape[-1] - len(rho) + float((1 - rho.square()).sum()) for rho in rhos])


class _Covariance:
    """Mean (2n,) and covariance (2n, 2n) in float64 of (x, y), n wide each, over tokens that stream by."""

    def __init__(self):
        self.shift, self.moments = torch.zeros(0), Moments()

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x and y (..., n) of the same tokens, in float32 or float64."""
        rows = torch.cat([x, y.to(x.device)], -1).flatten(0, -2)
        if not len(self.shift):
            self.shift = rows.mean(0)  # is taken off before products are formed: it can be far larger than what varies
        self.moments.add(rows - self.shift, rows.new_ones(len(rows), 1))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        sums = self.moments.fitted
        mean = sums.xe[:, 0] / sums.n
        if not bool(sums.xx.isfinite().all()):
            raise LLMDropError("The statistics are not finite. Load the model in bfloat16 or float32.")
        return self.shift.double() + mean, sums.xx / sums.n - torch.outer(mean, mean)

    def canonical_correlations(self) -> torch.Tensor:
        """Float64 (r,), r the smaller of the numbers of directions in which x and y vary."""
        covariance, n = self.result()[1], len(self.shift) // 2
        # No canonical correlation depends on the units of the inputs, of which a few are often thousands of times the others.
        units = torch.where(covariance.diagonal() > 0, covariance.diagonal().clamp(min=0).sqrt(), 1.0)
        covariance = covariance / torch.outer(units, units)
        whitening = []
        for part in (covariance[:n, :n], covariance[n:, n:]):
            values, vectors = torch.linalg.eigh(part)
            kept = values > 10 * torch.finfo(self.shift.dtype).eps * values[-1]
            whitening.append(vectors[:, kept] * values[kept].rsqrt())
        return torch.linalg.svdvals(whitening[0].T @ covariance[:n, n:] @ whitening[1]).clamp(max=1)
