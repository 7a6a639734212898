"""Work items of notebook 11: causes of redundancy, and the rank of what the LM head reads."""

import dataclasses

import torch

from ...dropping.plan import DropPlan
from ...measure.causes import VERSION, final_rank, measure_causes
from ...sources.texts import fingerprint
from ..work import Work


@dataclasses.dataclass(frozen=True)
class CausesWork(Work):
    """Properties of every attention layer on one corpus."""

    corpus: str
    tokens: torch.LongTensor

    @property
    def keys(self) -> list[dict]:
        return [self._key("causes", VERSION, tokens=fingerprint(self.tokens))]

    @property
    def tokens_to_pass(self) -> int:
        return self.tokens.numel()

    @property
    def about(self) -> dict:
        return {"corpus": self.corpus, "tokens": list(self.tokens.shape), "tokens_sha256": fingerprint(self.tokens)}

    def measure(self, model, tokenizer, update) -> list[dict]:
        return [measure_causes(model, self.tokens, on_sample=update).to_json()]


@dataclasses.dataclass(frozen=True)
class RankWork(CausesWork):
    """Effective rank of the last hidden states under each of several plans."""

    plans: tuple[DropPlan, ...]

    @property
    def keys(self) -> list[dict]:
        tokens = fingerprint(self.tokens)
        return [self._key("final rank", VERSION, tokens=tokens, plan=plan.key.to_json()) for plan in self.plans]

    @property
    def tokens_to_pass(self) -> int:
        return self.tokens.numel() * len(self.plans)

    def only(self, missing: list[int]) -> "RankWork":
        return dataclasses.replace(self, plans=tuple(self.plans[i] for i in missing))

    def measure(self, model, tokenizer, update) -> list[dict]:
        return [{"rank": ranks.tolist()} for ranks in final_rank(model, self.tokens, self.plans, on_sample=update)]
