"""Work items of notebook 11: causes of redundancy, and the rank of what the LM head reads."""

import dataclasses

from ...measure.causes import VERSION, final_rank, measure_causes
from ...sources.texts import fingerprint
from ..work import CorpusWork, PlansWork


@dataclasses.dataclass(frozen=True)
class CausesWork(CorpusWork):
    """Properties of every attention layer on one corpus."""

    @property
    def keys(self) -> list[dict]:
        return [self._key("causes", VERSION, tokens=fingerprint(self.tokens))]

    def measure(self, model, tokenizer, update) -> list[dict]:
        return [measure_causes(model, self.tokens, on_sample=update).to_json()]


@dataclasses.dataclass(frozen=True)
class RankWork(PlansWork):
    """Effective rank of the last hidden states under each of several plans."""

    @property
    def keys(self) -> list[dict]:
        return self._keys("final rank", VERSION)

    def measure(self, model, tokenizer, update) -> list[dict]:
        return [{"rank": ranks.tolist()} for ranks in final_rank(model, self.tokens, self.plans, on_sample=update)]
