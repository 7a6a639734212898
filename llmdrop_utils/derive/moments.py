"""Ridge regression from second moments, which are summed as text streams by: no input is kept.

For inputs x (n_in) and what they are to explain, e (n_out), over all tokens:

    S = (X'X + ridge * mean(diag(X'X)) * I)^-1 X'E,  e ~ x S
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..base.errors import LLMDropError

ROWS = 8192  # so many tokens' products are summed in float32, before they are added in float64: that takes time, too
COLUMNS = 384  # of X'X that are formed at a time, from the diagonal up: what is below it is the same


class NotFiniteError(LLMDropError):
    """The statistics are not finite."""


class Fit(NamedTuple):
    """A solution, and how well it does on tokens that it was not fitted on."""

    matrix: torch.Tensor | None  # (n_in, n_out) in float64; None: no solution explains anything of what was held out
    ridge: float  # inf if there is none
    explained: float  # share of the squares of e, held out, that x S explains: 1 - |e - x S|^2 / |e|^2


class Moments:
    """Sums over tokens of X'X (n_in, n_in), X'E (n_in, n_out) and the squares of e, in float64; those held out apart."""

    def __init__(self):
        self.fitted, self.held_out = _Sums(), _Sums()

    def add(self, x: torch.Tensor, e: torch.Tensor, held_out: bool = False) -> None:
        """x (..., n_in) and e (..., n_out) of the same tokens, in any dtype."""
        sums = self.held_out if held_out else self.fitted
        for part, explained in zip(x.flatten(0, -2).split(ROWS), e.flatten(0, -2).split(ROWS), strict=True):
            sums.add(part, explained)

    def fit(self, ridges: Sequence[float]) -> Fit:
        """The ridge that explains most of what was held out, and its solution on all tokens.

        Raises LLMDropError for fewer tokens than inputs, and for sums that are not finite.
        """
        (xx, xe), (xx_apart, xe_apart) = ((sums.xx, sums.xe) for sums in (self.fitted, self.held_out))
        n_in, n, ee_apart = len(xx), self.fitted.n, self.held_out.ee
        if n < n_in:
            raise LLMDropError(
                f"The statistics of {n_in} inputs take as many tokens at least, but only {n} were fitted on. "
                "Give more samples, or longer ones."
            )
        if not all(bool(part.isfinite().all()) for part in (xx, xe, xx_apart, xe_apart)):
            raise NotFiniteError("The statistics are not finite. Load the model in bfloat16 or float32.")
        best, least = None, ee_apart
        for ridge in ridges:
            solution = solve(xx, xe, ridge)
            error = ee_apart - 2 * float((solution * xe_apart).sum()) + float((solution * (xx_apart @ solution)).sum())
            if error < least:
                best, least = ridge, error
        if best is None:
            return Fit(None, float("inf"), 0.0)
        return Fit(solve(xx + xx_apart, xe + xe_apart, best), best, 1 - least / ee_apart)


class _Sums:
    def __init__(self):
        self.ee, self.n = 0.0, 0
        self._sums: list[torch.Tensor] = [torch.zeros(0)] * 2  # X'X from its diagonal up, and X'E
        self._pending: list[torch.Tensor] = []  # the same in float32, of the last rows
        self._rows = 0  # how many these are

    @property
    def xx(self) -> torch.Tensor:
        upper = self._closed()[0].triu()
        return upper + upper.triu(1).T

    @property
    def xe(self) -> torch.Tensor:
        return self._closed()[1]

    def add(self, x: torch.Tensor, e: torch.Tensor) -> None:
        is_short = x.dtype == torch.bfloat16
        x, e = wide(x), wide(e)
        self.ee += float(e.square().sum())
        if not self.n:
            self._pending = [x.new_zeros(x.shape[1], n_out) for n_out in (x.shape[1], e.shape[1])]
            self._sums = [torch.zeros_like(each, dtype=torch.float64) for each in self._pending]
        if self._rows + len(x) > ROWS:
            self._closed()
        with _bfloat16_factors() if is_short else contextlib.nullcontext():
            xx, xe = self._pending
            start = 0
            for columns in x.tensor_split(-(-x.shape[1] // COLUMNS), 1):
                end = start + columns.shape[1]
                xx[start:end, start:].addmm_(columns.T, x[:, start:])
                start = end
            xe.addmm_(x.T, e)
        self.n += len(x)
        self._rows += len(x)

    @torch.inference_mode()  # of which the sums may stem
    def _closed(self) -> list[torch.Tensor]:
        """The sums of all rows."""
        if self._rows:
            for total, pending in zip(self._sums, self._pending, strict=True):
                total += pending
                pending.zero_()
            self._rows = 0
        return self._sums


@contextlib.contextmanager
def _bfloat16_factors() -> Iterator[None]:
    """Inside, a CPU with AMX rounds the factors of float32 products to bfloat16, and sums in float32; others compute as ever.

    Three times as fast. Of what is in bfloat16 already nothing is lost: X'X is what it is in float32.
    """
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = "none"  # as what is set for all of torch may have it
        if setting.fp32_precision != before:
            setting.fp32_precision = before


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def solve(xx: torch.Tensor, xe: torch.Tensor, ridge: float) -> torch.Tensor:
    """S (n_in, n_out) from X'X and X'E in float64. Raises LLMDropError if the system is singular."""
    scale = float(xx.diagonal().mean())
    if scale == 0:  # inputs that are always zero explain nothing
        return torch.zeros_like(xe)
    system = xx.clone()
    system.diagonal().add_(ridge * scale)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        raise LLMDropError(f"The statistics are singular at a ridge of {ridge:g}. Use a larger ridge, or more text.")
    return torch.cholesky_solve(xe, factor)
