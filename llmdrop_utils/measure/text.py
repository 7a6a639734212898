"""Quality on text: perplexity, next-token accuracy and divergence from the dense model."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan
from ..models.families import find_anatomy, need_decoder, position_limit
from ..sources.texts import as_tokens
from .scoring import score

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used


@dataclasses.dataclass(frozen=True)
class TextScores:
    """How well text is predicted, by plan and sample; each sample has the same number of predicted tokens."""

    nll: np.ndarray  # float64 (n_plans, n_samples): mean negative log-probability per token, in nats
    hits: np.ndarray  # float64 (n_plans, n_samples): share of tokens that were the most probable
    kl: np.ndarray  # float64 (n_plans, n_samples): mean KL(first plan || plan) of the next-token distribution, in nats

    @property
    def perplexity(self) -> np.ndarray:
        """float64 (n_plans,): exp of the mean over all tokens."""
        return np.exp(self.nll.mean(1))


def score_text(
    model: torch.nn.Module,
    tokens: torch.LongTensor,
    plans: Sequence[DropPlan] = (DropPlan(),),
    on_batch: Callable[[float], None] = lambda share: None,
) -> TextScores:
    """Predict each token of (n_samples, seq_len) from those before it in its sample, under each plan.

    The divergence is from the first plan: give `DropPlan()`, the dense model, first. Raises LLMDropError for wrong input.
    """
    need_decoder(anatomy := find_anatomy(model))
    tokens = as_tokens(tokens, shortest=2)
    requests = [(sample[:1], sample[1:]) for sample in tokens.tolist()]
    longest = tokens.shape[1] - 1
    known = position_limit(anatomy.decoder.config)
    if known is not None and longest > known:
        raise LLMDropError(f"Samples of {longest + 1} tokens are too long for this model, which knows {known} positions.")
    scores = score(model, requests, plans, max_length=longest, kl=True, on_batch=on_batch)
    for name, values in (("log-probability", scores.logprob), ("divergence", scores.kl)):
        if len(bad := np.argwhere(~np.isfinite(values))):
            plan, sample = bad[0]
            raise LLMDropError(
                f"The {name} of sample {sample} under plan {plan} is infinite: the model rules out a token that occurs in the "
                "text. Use text that its tokenizer makes, or a larger dtype."
            )
    return TextScores(-scores.logprob / longest, scores.hits / longest, scores.kl / longest)


def perplexity(model: torch.nn.Module, tokens: torch.LongTensor) -> float:
    """Perplexity of the model as it is (inside `dropped`, of the dropped one) on token ids (n_samples, seq_len)."""
    return float(score_text(model, tokens).perplexity[0])
