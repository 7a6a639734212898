"""Notebook 10, what is measured of how a made model ranks its layers, and of how well that ranking serves to drop more."""

import dataclasses

import torch

from ...dropping.plan import DropPlan
from ...dropping.units import skipping
from ...measure.importance import VERSION as IMPORTANCE_VERSION
from ...measure.importance import drop_order, measure_importance
from ...measure.text import VERSION as TEXT_VERSION
from ...measure.text import score_text
from ...sources.texts import fingerprint
from ..work import METRIC, Work

MORE = 4  # attention layers that are dropped further, if so many can be


@dataclasses.dataclass(frozen=True)
class RankingWork(Work):
    """Importance of all sub-layers under each of several plans, and held-out text without some attention layers more: those
    that come next in the dense model's order, and those that this importance puts first."""

    tokens: torch.LongTensor  # (n_samples, seq_len), that importance is measured on
    texts: tuple[torch.LongTensor, ...]  # held out, of each corpus
    order: tuple[int, ...]  # attention layers that are left, least important in the dense model first
    more: int  # layers that are dropped further
    batch_size: int
    plans: tuple[DropPlan, ...]

    @property
    def keys(self) -> list[dict]:
        read = {"tokens": fingerprint(self.tokens), "texts": [fingerprint(text) for text in self.texts], "text": TEXT_VERSION}
        more = read | {"metric": METRIC, "order": list(self.order), "more": self.more}
        return [self._key("ranking", IMPORTANCE_VERSION, plan=plan.key.to_json(), **more) for plan in self.plans]

    @property
    def tokens_to_pass(self) -> int:
        return (self.tokens.numel() + 2 * sum(text.numel() for text in self.texts)) * len(self.plans)

    @property
    def about(self) -> dict:
        return {"ranked on": list(self.tokens.shape), "tokens_sha256": fingerprint(self.tokens)}

    def measure(self, model, tokenizer, update) -> list[dict]:
        values = []
        for plan in self.plans:
            with skipping(model, plan):
                scores = measure_importance(model, self.tokens, self.batch_size, on_batch=update, metric=METRIC)
            own = [layer for layer in drop_order(scores.importance["attention"]) if layer in self.order]
            further = [
                dataclasses.replace(plan, attention=(*plan.attention, *order[: self.more])) for order in (self.order, own)
            ]
            nll: list[list] = [[], []]  # by order, corpus and sample
            for text in self.texts:
                done = lambda share, text=text: update(share * 2 * text.numel())  # noqa: E731
                for found, of_plan in zip(nll, score_text(model, text, further, on_batch=done).nll.tolist(), strict=True):
                    found.append(of_plan)
            importance = scores.first(len(self.tokens)).to_json()  # without the histogram, which nothing reads
            values.append({"importance": importance, "by_dense_order": nll[0], "by_own_order": nll[1]})
        return values
