"""Published repairs that fold a transform or a scale into kept projections: ReplaceMe, LinearPatch, Prune&Comp.

rivals.py says what was read of them.
"""

import math
from collections.abc import Iterator

import torch
from scipy.fft import dct
from scipy.linalg import hadamard
from torch import nn

from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan
from ..measure.guard import evaluating
from ..models.families import Anatomy, family_of
from .moments import Moments, solve
from .rivals import RIDGE, Place, checked, multiply, need_plain_stream, projection, terms


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
    anatomy, tokens, batch_size = checked(model, tokens, plan, batch_size, ridge)
    modules = _kept_mlps(anatomy, plan)
    sums = {mlp: Moments() for mlp in modules}
    with evaluating(model):
        for mlp, moved, target in _past_runs(model, anatomy, tokens, batch_size, plan):
            sums[mlp].add(moved, target)
    multiply({module: solve(sums[mlp].fitted.xx, sums[mlp].fitted.xe, ridge).T for mlp, module in modules.items()})


def fold_scaling(model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, batch_size: int = 4) -> None:
    """Fold, in place, a scaling of channels into the output projection of each kept MLP before dropped attention (LinearPatch).

        T = H diag(s) H',  s = mean over samples of (mean over tokens of |(L - Y) H|) / (mean over tokens of |M H|)

    with M, L and Y as in `fold_transform`, and H the orthogonal matrix of `rotation`. The authors scale the whole stream at one
    cut, by a matrix (d, d) that stays there and costs a product for each token: L H against Y H. Where dropped attentions are
    scattered that would be many products. So here the matrix scales what the MLP before adds, into which it folds. Arguments
    and errors as in `fold_transform`, but few tokens will do.
    """
    anatomy, tokens, batch_size = checked(model, tokens, plan, batch_size)
    modules = _kept_mlps(anatomy, plan)
    sums, counts = dict[int, torch.Tensor](), dict.fromkeys(modules, 0)
    with evaluating(model):
        for mlp, moved, target in _past_runs(model, anatomy, tokens, batch_size, plan):
            turn = rotation(moved.shape[-1]).to(moved)
            before, now = ((part @ turn).abs().mean(1) for part in (moved, target.to(moved.device)))  # (B, d)
            sums[mlp] = sums.get(mlp, 0) + (now / before).sum(0, dtype=torch.float64)
            counts[mlp] += len(moved)
    factors = {}
    for mlp, module in modules.items():
        scale, turn = sums[mlp] / counts[mlp], rotation(len(sums[mlp])).to(sums[mlp])
        if not bool(scale.isfinite().all()):
            raise LLMDropError(
                f"The MLP of layer {mlp} adds nothing in some direction, so nothing can be scaled. Use `repair`."
            )
        factors[module] = (turn * scale) @ turn.T
    multiply(factors)


def rotation(n: int) -> torch.Tensor:
    """An orthogonal matrix (n, n), float64, that spreads each channel over many: a Hadamard matrix for powers of two.

    Of another n it is the Kronecker product of that of its largest power of two and of a discrete cosine transform.
    """
    power = n & -n
    cosines = torch.from_numpy(dct(torch.eye(n // power, dtype=torch.float64).numpy(), norm="ortho"))
    return torch.kron(torch.from_numpy(hadamard(power, dtype=float)) / math.sqrt(power), cosines)


def _runs(n_layers: int, plan: DropPlan) -> dict[int, list[Place]]:
    """Kept MLPs that dropped attention follows: layer -> what is dropped between this MLP and the next kept one."""
    runs: dict[int, list[Place]] = {}
    for kind, index in [(kind, index) for index in range(n_layers) for kind in ("attention", "mlp")]:
        if index in getattr(plan, kind) and runs:
            runs[max(runs)].append((kind, index))
        elif kind == "mlp" and index not in plan.mlp:
            runs[index] = []
    return {mlp: run for mlp, run in runs.items() if any(kind == "attention" for kind, _ in run)}


def _kept_mlps(anatomy: Anatomy, plan: DropPlan) -> dict[int, nn.Module]:
    """The output projections that make up for what follows. Raises LLMDropError where that cannot be."""
    need_plain_stream(anatomy)
    if family_of(anatomy.decoder.config).mlp_input is None:
        why = "so the MLP beside a dropped attention would read what an earlier one adds for it. Use `repair` or `fit_maps`."
        raise LLMDropError(f"In this {anatomy.family} model, attention and MLP read the same stream, {why}")
    return {mlp: projection(anatomy, ("mlp", mlp), plan) for mlp in _runs(len(anatomy), plan)}


def _past_runs(
    model: nn.Module, anatomy: Anatomy, tokens: torch.Tensor, batch_size: int, plan: DropPlan
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each batch and kept MLP before dropped attention: its layer, M (B, T, d) and L - Y, as `fold_transform` has them."""
    runs = _runs(len(anatomy), plan)
    places = {place for mlp, run in runs.items() for place in (("mlp", mlp), *run)}
    for (kind, index), _, _, term in terms(model, anatomy, tokens, batch_size, places):
        if kind == "mlp" and index in runs:
            mlp, moved, target = index, term, term
        else:
            target = target + term.to(target.device)
            if runs[mlp][-1] == (kind, index):
                yield mlp, moved, target


def rescale(model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, batch_size: int = 4) -> None:
    """Give the stream, in place, the magnitude after each cut that it has in the dense model (Prune&Comp).

    At each dropped sub-layer, with x the dense stream before it and a the dropped term:

        alpha = mean over tokens of |x + a| / |x|

    The authors multiply by alpha all that is written to the stream before the cut, embeddings included. Here all that is
    written after it, by output projections and their biases, is divided by the product of the alphas so far. That is the same
    up to the epsilon of norms, because the stream is read through norms alone, whose output does not depend on its scale; and
    it leaves embeddings alone, which the LM head may share.

    The authors' code compares channels instead of tokens, and measures each cut on the model that has those before; here all
    are measured on the dense one. Arguments and errors as in `fold_transform`, but few tokens will do, and so will families
    whose attention and MLP read the same stream.
    """
    anatomy, tokens, batch_size = checked(model, tokens, plan, batch_size)
    need_plain_stream(anatomy)
    if getattr(anatomy.decoder.config, "_remove_final_layer_norm", False):  # some OPT models
        raise LLMDropError("This model has no final norm, so the scale of its stream matters. Use `repair` or `fit_maps`.")
    places = [(kind, index) for index in range(len(anatomy)) for kind in ("attention", "mlp")]
    cuts = [(kind, index) for kind, index in places if index in getattr(plan, kind)]
    after = places[places.index(cuts[0]) :] if cuts else []
    modules = {place: projection(anatomy, place, plan) for place in after if place not in cuts}
    ratios, counts = dict.fromkeys(cuts, 0.0), dict.fromkeys(cuts, 0)
    with evaluating(model):
        for place, _, x, term in terms(model, anatomy, tokens, batch_size, cuts):
            before, now = x.norm(dim=-1), (x + term).norm(dim=-1)
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
    multiply(factors)
