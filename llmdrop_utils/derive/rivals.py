"""Published training-free ways to make up for dropped attention, to be compared with our repair on the same text.

- NBL (arXiv:2505.21077): a linear map in each dropped place, `fit_maps`; its choice of layers, `canonical_correlation_bound`.
- ReplaceMe (arXiv:2505.02819): a linear transform, folded into the MLP before what is dropped, `fold_transform`.
- Prune&Comp (arXiv:2507.18212): the magnitude that the stream lacks after a cut, `rescale`.

Each is written anew from its formulas, with statistics of the dense model. The papers' full texts could not be read here, only
their abstracts, accounts of them, and the authors' code (LIONS-EPFL/NBL, mts-ai/ReplaceMe, chenxinrui-tsinghua/PruneAndComp).
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..dropping.maps import LinearMap
from ..dropping.plan import NAMES, DropPlan, check_plan
from ..dropping.units import left
from ..measure.guard import evaluating, tokens_for
from ..models.families import Anatomy, family_of, stream_width
from .moments import Moments, solve, wide
from .sites import check_changeable, rows_of, sites_of
from .streams import advance, read_streams, tap

VERSION = 1  # raise when a change alters the weights or maps that come out
RIDGE = 1e-5  # the authors use none; products in float32 leave errors of this size where inputs do not vary
Place = tuple[str, int]  # kind, layer


# ---- NBL ----------------------------------------------------------------------------------------------------------------


def fit_maps(model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, batch_size: int = 4, ridge: float = RIDGE) -> DropPlan:
    """The plan with a linear map for each dropped attention that has none yet (NBL). No weight of the model changes.

    With x what the attention module reads and y what it returns (before a norm that follows), of all tokens, the map is the
    linear estimator of the least mean square error:

        W = C_yx (C_xx + ridge * mean(diag(C_xx)) * I)^-1,  b = E[y] - W E[x]

    The authors' code uses no ridge, and its published settings take the stream before the norm for x, and remove the norm. A
    drop plan keeps norms where it has maps, so that here x is the normed stream in families whose norms come first.

    model: whole, of any family and dtype. tokens: LongTensor (n_samples, seq_len), more of them than the stream is wide.
    batch_size: samples per forward pass. Memory: 32 bytes * width^2 a map. Time: two to three forward passes. Products are
    formed in float32 (float64 if the model is), sums in float64; maps are float32. Raises LLMDropError for wrong input, a model
    that lacks sub-layers, and statistics that are singular or not finite.
    """
    anatomy, tokens, batch_size = _checked(model, tokens, plan, batch_size, ridge)
    name = family_of(anatomy.decoder.config).attention_unit[0]
    chosen = [index for index in sorted(plan.attention) if plan.map_of("attention", index) is None]
    units = {index: anatomy.layers[index].block.get_submodule(name) for index in chosen}
    sums = {index: _Covariance() for index in chosen}
    with evaluating(model):
        taps = {index: {side: (unit, side) for side in ("input", "output")} for index, unit in units.items()}
        for index, _, seen in _dense(model, anatomy, tokens, batch_size, taps):
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
    anatomy, tokens, batch_size = _checked(model, tokens, DropPlan(), batch_size, 0.0)
    _need_plain_stream(anatomy)
    beside = family_of(anatomy.decoder.config).mlp_input is None  # the MLP reads the stream that attention reads
    sums = [_Covariance() for _ in anatomy.layers]
    with evaluating(model):
        for (_, index), stream, x, term in _terms(model, anatomy, tokens, batch_size, [(kind, i) for i in range(len(sums))]):
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


# ---- ReplaceMe ----------------------------------------------------------------------------------------------------------


def fold_transform(
    model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, batch_size: int = 4, ridge: float = RIDGE
) -> None:
    """Fold, in place, a linear transform into the output projection of each kept MLP before dropped attention (ReplaceMe).

        T = argmin |M T + Y - L|^2 + ridge * mean(diag(M'M)) * |T|^2,  W' = T' W,  b' = T' b

    M (tokens, d) is what the MLP adds to the stream Y, and L is the stream past what is dropped after it, all of the dense
    model: L - Y is M and the dropped terms up to the next kept MLP. So a run of dropped attentions is handled layer by layer,
    independent of each other; where the MLPs between are dropped too, the last kept one makes up for all, as in the paper,
    which drops whole blocks. Attention that no kept MLP precedes is not made up for. The authors' code folds no bias (Llama
    has none), and uses no ridge unless told to.

    Arguments and errors as in `fit_maps`; measure the result under the same plan. Also refused: a model that is quantised,
    offloaded or has adapters, plans with maps, families whose attention and MLP read the same stream or whose MLP's output
    passes a norm, and experts where T would go. After any error the model is as it was.
    """
    anatomy, tokens, batch_size = _checked(model, tokens, plan, batch_size, ridge)
    _need_plain_stream(anatomy)
    if family_of(anatomy.decoder.config).mlp_input is None:
        why = "so the MLP beside a dropped attention would read what an earlier one adds for it. Use `repair` or `fit_maps`."
        raise LLMDropError(f"In this {anatomy.family} model, attention and MLP read the same stream, {why}")
    runs: dict[int, list[Place]] = {}  # kept MLP -> what is dropped between it and the next kept one
    for kind, index in [(kind, index) for index in range(len(anatomy)) for kind in ("attention", "mlp")]:
        if index in getattr(plan, kind) and runs:
            runs[max(runs)].append((kind, index))
        elif kind == "mlp" and index not in plan.mlp:
            runs[index] = []
    runs = {mlp: run for mlp, run in runs.items() if any(kind == "attention" for kind, _ in run)}
    modules = {mlp: _projection(anatomy, ("mlp", mlp), plan) for mlp in runs}
    places = {place for mlp, run in runs.items() for place in (("mlp", mlp), *run)}
    sums = {mlp: Moments() for mlp in runs}
    with evaluating(model):
        for (kind, index), _, _, term in _terms(model, anatomy, tokens, batch_size, places):
            if kind == "mlp" and index in runs:
                mlp, moved, target = index, term, term
            else:
                target = target + term.to(target.device)
                if runs[mlp][-1] == (kind, index):
                    sums[mlp].add(moved, target)
    _multiply({module: solve(sums[mlp].fitted.xx, sums[mlp].fitted.xe, ridge).T for mlp, module in modules.items()})


# ---- Prune&Comp ---------------------------------------------------------------------------------------------------------


def rescale(model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, batch_size: int = 4, by: str = "token") -> None:
    """Give the stream, in place, the magnitude after each cut that it has in the dense model (Prune&Comp).

    At each dropped sub-layer, with x the dense stream before it and a the dropped term:

        alpha = mean over tokens of |x + a| / |x|

    The authors multiply by alpha all that is written to the stream before the cut, embeddings included. Here all that is
    written after it, by output projections and their biases, is divided by the product of the alphas so far. That is the same
    up to the epsilon of norms, because the stream is read through norms alone, whose output does not depend on its scale; and
    it leaves embeddings alone, which the LM head may share.

    by: "token", as above, with Euclidean norms; or "channel", as in the authors' code: the mean over samples and channels of
    mean_t |x + a| / mean_t |x|, t the tokens of a sample. Which of them the paper's text has could not be checked. That code
    measures each cut on the model that has those before; here all are measured on the dense one. Other arguments and errors as
    in `fold_transform`, but few tokens will do, and so will families whose attention and MLP read the same stream.
    """
    anatomy, tokens, batch_size = _checked(model, tokens, plan, batch_size)
    if by not in ("token", "channel"):
        raise LLMDropError(f"Magnitudes are compared by 'token' or by 'channel', not by {by!r}.")
    _need_plain_stream(anatomy)
    if getattr(anatomy.decoder.config, "_remove_final_layer_norm", False):  # some OPT models
        raise LLMDropError("This model has no final norm, so the scale of its stream matters. Use `repair` or `fit_maps`.")
    places = [(kind, index) for index in range(len(anatomy)) for kind in ("attention", "mlp")]
    cuts = [(kind, index) for kind, index in places if index in getattr(plan, kind)]
    after = places[places.index(cuts[0]) :] if cuts else []
    modules = {place: _projection(anatomy, place, plan) for place in after if place not in cuts}
    ratios, counts = dict.fromkeys(cuts, 0.0), dict.fromkeys(cuts, 0)
    with evaluating(model):
        for place, _, x, term in _terms(model, anatomy, tokens, batch_size, cuts):
            before, now = (part.norm(dim=-1) if by == "token" else part.abs().mean(1) for part in (x, x + term))
            counted = before > 0  # the embedding of a padding token is often zero
            ratios[place] += float((now[counted] / before[counted]).sum(dtype=torch.float64))
            counts[place] += int(counted.sum())
    factors, alphas = {}, 1.0
    for place in after:
        if place in modules:
            factors[modules[place]] = 1 / alphas
            continue
        alphas *= ratios[place] / max(1, counts[place])
        if not 0 < alphas < math.inf:
            raise LLMDropError(f"At layer {place[1]} the stream is zero before or after what is dropped. Use another plan.")
    _multiply(factors)


# ---- what they share ----------------------------------------------------------------------------------------------------


def _checked(
    model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, batch_size: int, ridge: float | None = None
) -> tuple[Anatomy, torch.LongTensor, int]:
    """All that can be told before anything is computed. With a ridge, a regression is made, which takes enough tokens."""
    anatomy, tokens, batch_size = check_plan(model, plan), tokens_for(model, tokens), whole(batch_size, "The batch size")
    width, whole_model = stream_width(anatomy.decoder.config), list(range(len(anatomy)))
    if any(left(anatomy, kind) != whole_model for kind in NAMES):
        raise LLMDropError("Some attention or MLP of this model is dropped or replaced already. Give the whole model.")
    if ridge is not None and (isinstance(ridge, bool) or not isinstance(ridge, float | int) or not 0 <= ridge < math.inf):
        raise LLMDropError(f"The ridge must be a number from 0 up, such as {RIDGE:g}, but is {ridge!r}.")
    if ridge is not None and tokens.numel() <= width:
        raise LLMDropError(f"Statistics of {width} inputs take more tokens than that: {tokens.numel()} are too few.")
    return anatomy, tokens, batch_size


def _need_plain_stream(anatomy: Anatomy) -> None:
    """Raise LLMDropError for a post-norm model: what is added there passes a norm together with the stream."""
    if family_of(anatomy.decoder.config).stream_norms:
        raise LLMDropError(f"Norms act on the stream itself in this {anatomy.family} model. Use `repair` or `fit_maps`.")


def _projection(anatomy: Anatomy, place: Place, plan: DropPlan) -> nn.Module:
    """The output projection whose weight and bias are to change. Raises LLMDropError if they do not make the whole term."""
    kind, index = place
    block, name = anatomy.layers[index].block, f"{NAMES[kind]} of layer {index} of this {anatomy.family} model"
    if plan.maps:
        raise LLMDropError("The drop plan has linear maps in dropped places, which this method has not. Give a plan without.")
    check_changeable(block, index)
    sites = sites_of(block, family_of(anatomy.decoder.config), kind)
    if sites is None or sites.output is None:
        raise LLMDropError(f"The {name} has experts and no output projection of its own. Use a model whose layers are dense.")
    if sites.norm is not None:
        raise LLMDropError(f"The output of the {name} passes a norm before it is added. Use `repair` or `fit_maps`.")
    return block.get_submodule(sites.output)


def _terms(
    model: nn.Module, anatomy: Anatomy, tokens: torch.Tensor, batch_size: int, places: Collection[Place]
) -> Iterator[tuple[Place, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each batch, and each place in order: the place, the stream that its layer reads, the same with the attention's term
    if the place is an MLP, and the place's own term; as in `_dense`."""
    layers = anatomy.layers
    taps = {index: {"attention": (layers[index].attention, "output")} for _, index in sorted(places)}
    taps |= {index: taps[index] | {"mlp": (layers[index].mlp, "output")} for kind, index in places if kind == "mlp"}
    for index, stream, seen in _dense(model, anatomy, tokens, batch_size, taps):
        x = stream
        for kind in sorted(seen):  # attention, then MLP
            term = layers[index].scale * seen[kind].to(x.device)
            if (kind, index) in places:
                yield (kind, index), stream, x, term
            x = x + term


def _dense(
    model: nn.Module, anatomy: Anatomy, tokens: torch.Tensor, batch_size: int, taps: dict[int, dict[str, tuple[nn.Module, str]]]
) -> Iterator[tuple[int, torch.Tensor, dict[str, torch.Tensor]]]:
    """For each batch and tapped layer: its index, the stream (B, T, d) that it reads, what is tapped; in float32 at least."""
    streams, calls, _ = read_streams(model, tokens, batch_size) if taps else ([], {}, None)
    for stream in streams:
        for index in range(max(taps) + 1):
            block, call = anatomy.layers[index].block, calls[len(stream)][index]
            if index in taps:  # left and run again: Falcon's layers go on to add into what the MLP returned
                seen = tap(block, stream, call, taps[index])
                yield index, wide(stream), {key: wide(tensor) for key, tensor in seen.items()}
            stream = advance(block, stream, call)


@torch.no_grad()
def _multiply(factors: Mapping[nn.Module, torch.Tensor | float]) -> None:
    """Multiply what linear maps give (weights and biases) by a matrix (n_out, n_out) in float64, or a number. All or none."""
    changed = []
    for module, factor in factors.items():
        for weight in [rows_of(module)] + ([] if module.bias is None else [module.bias]):
            new = factor @ weight.to(factor) if isinstance(factor, torch.Tensor) else factor * weight.double()
            changed.append((weight, new.to(weight.dtype)))
            if not bool(changed[-1][1].isfinite().all()):
                raise LLMDropError(f"New weights are not finite in {weight.dtype}. Load the model in bfloat16 or float32.")
    for weight, new in changed:
        weight.copy_(new)
