"""Importance metrics: from the products of a sub-layer's input x and of what it adds, a, to one number per token."""

from collections.abc import Callable

import numpy as np
import torch

KINDS = ("attention", "mlp", "block")

# Importance of single tokens is counted in bins of equal width in log10, from 1e-7 (the resolution of float32) to 2.
BIN_EDGES = np.linspace(-7.0, np.log10(2.0), 147)

# Rows are handled in pieces that stay in a CPU's cache, or that keep a GPU busy; temporary memory is this many floats.
PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}


# ---- products -----------------------------------------------------------------------------------------------------------


def dots(x: torch.Tensor, y: torch.Tensor, scale: float, y_is_sum: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x.x, x.a and a.a, each float64 (tokens,), for x (..., d) and a = scale * y, or a = y - x if `y_is_sum`."""
    width = x.shape[-1]
    x, y = x.reshape(-1, width), y.reshape(-1, width)
    step = max(1, PIECE.get(x.device.type, PIECE["cuda"]) // width)
    dots = torch.empty(3, len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), step):
        p, q = x[start : start + step].to(_at_least_float32(x)), y[start : start + step].to(_at_least_float32(y))
        a = q - p if y_is_sum else q
        for row, (u, v) in zip(dots, ((p, p), (p, a), (a, a)), strict=True):
            row[start : start + step] = (u * v).sum(-1)
    xx, xa, aa = dots
    return (xx, xa, aa) if y_is_sum else (xx, xa * scale, aa * scale**2)


def _at_least_float32(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- metrics ------------------------------------------------------------------------------------------------------------

Metric = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x.x, x.a, a.a per token -> importance

METRICS: dict[str, Metric] = {}


def metric(name: str) -> Callable[[Metric], Metric]:
    """Register a function as the metric of this name, which `measure_importance` takes."""

    def register(function: Metric) -> Metric:
        if name in METRICS:
            raise ValueError(f"There are two metrics called {name!r}.")
        METRICS[name] = function
        return function

    return register


@metric("cosine")
def one_minus_cosine(xx: torch.Tensor, xa: torch.Tensor, aa: torch.Tensor) -> torch.Tensor:
    """1 - cosine(x, x + a).

    Written with a instead of x + a, so that rounding does not grow as the cosine nears 1:
    sin^2 = (|x|^2 |a|^2 - (x.a)^2) / (|x|^2 |x + a|^2), 1 - cos = sin^2 / (1 + cos). A zero vector has cosine 0.
    """
    product = xx * (xx + 2 * xa + aa).clamp(min=0)
    cosine = ((xx + xa) / product.sqrt()).clamp(-1, 1)
    sine2 = ((xx * aa - xa * xa) / product).clamp(0, 1)
    importance = torch.where(cosine > 0, sine2 / (1 + cosine), 1 - cosine)
    return torch.where(product == 0, 1.0, importance)


@metric("relative magnitude")
def relative_magnitude(xx: torch.Tensor, xa: torch.Tensor, aa: torch.Tensor) -> torch.Tensor:
    """|a| / |x + a|; 1 where both are zero vectors."""
    whole = (xx + 2 * xa + aa).clamp(min=0)
    return torch.where((aa == 0) & (whole == 0), 1.0, (aa / whole).sqrt())


@metric("angular distance")
def angular_distance(xx: torch.Tensor, xa: torch.Tensor, aa: torch.Tensor) -> torch.Tensor:
    """The angle between x and x + a as a share of 180 degrees: arccos(cosine) / pi (Gromov et al. 2024).

    From sin^2(angle / 2) = (1 - cosine) / 2, so that small angles keep their digits.
    """
    return (one_minus_cosine(xx, xa, aa) / 2).clamp(0, 1).sqrt().asin() * (2 / torch.pi)
