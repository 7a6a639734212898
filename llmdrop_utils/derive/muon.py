"""Muon, the optimizer of healing: a step moves all directions of a matrix equally far, however small their gradients are.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon). With G the gradient of a matrix (m, n), M its running mean:

    M <- mu M + (1 - mu) G
    W <- W - rate * 0.2 sqrt(max(m, n)) * O,  O ~ U V' of the singular value decomposition U S V' of mu M + (1 - mu) G

0.2 sqrt(max(m, n)) makes a step as large as one of AdamW, so that it takes the same rates (Liu et al. 2025, arXiv:2502.16982).

torch.optim.Muon does the same, to the bit, for matrices in bfloat16. It takes no vectors, and on processors without
instructions for bfloat16 its products would take far longer than all else.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

MOMENTUM = 0.9  # better than 0.95 in runs of some tens of steps (docs/repair.md)
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of Newton and Schulz, by Jordan et al.
SCALE = 0.2


class Muon(torch.optim.Optimizer):
    """Of matrices, and of vectors as matrices of one row. It holds 4 bytes for each weight in float32.

    dtype: that products of matrices are computed in.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, dtype: torch.dtype = torch.float32):
        super().__init__(params, {"lr": lr})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """One step. closure: none is called; the argument is that of all optimizers."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:  # a forward pass reads it without recording gradients
                    continue
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, 1 - MOMENTUM)
                wanted = weight.grad.lerp(mean, MOMENTUM).reshape(-1, weight.shape[-1])
                update = orthogonal(wanted.to(self.dtype)).view_as(weight).to(weight)
                weight.add_(update, alpha=-group["lr"] * SCALE * math.sqrt(max(wanted.shape)))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """U V' of a matrix U S V', but for singular values that are between 0.5 and 1.5 rather than 1; in its dtype."""
    a, b, c = QUINTIC
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    if len(x) > 1:
        for _ in range(ITERATIONS):
            square = x @ x.T
            x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
