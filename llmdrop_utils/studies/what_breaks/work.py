"""Notebook 08, what is measured beside text and tasks: questions about the context, the model's own words, its confidence."""

import dataclasses
import hashlib
import json

from ...dropping.plan import DropPlan
from ...dropping.units import skipping
from ...measure.confidence import VERSION as CONFIDENCE_VERSION
from ...measure.confidence import score_choices
from ...measure.decoding import greedy
from ...measure.scoring import score
from ...measure.text import VERSION as TEXT_VERSION
from ...sources.probes import Request
from ..work import PlansWork, TaskWork, Work

VERSION = 1  # raise when a change to the measurement changes what is measured


@dataclasses.dataclass(frozen=True)
class ProbeWork(Work):
    """What share of each answer is found in the context, under each of several plans."""

    probe: str  # "copy", "retrieval" or the name of a set of labelled texts
    requests: tuple[Request, ...]
    plans: tuple[DropPlan, ...]

    @property
    def keys(self) -> list[dict]:
        asked = hashlib.sha256(json.dumps(self.requests).encode()).hexdigest()
        return [self._key("probe", VERSION, requests=asked, plan=plan.key.to_json(), text=TEXT_VERSION) for plan in self.plans]

    @property
    def tokens_to_pass(self) -> int:
        return sum(len(context) + len(answer) for context, answer in self.requests) * len(self.plans)

    @property
    def about(self) -> dict:
        return {"probe": self.probe, "questions": len(self.requests)}

    def measure(self, model, tokenizer, update) -> list[dict]:
        done = lambda share: update(share * self.tokens_to_pass)  # noqa: E731
        scores = score(model, list(self.requests), self.plans, on_batch=done)
        return [{"found": (hits / scores.length).tolist()} for hits in scores.hits]


@dataclasses.dataclass(frozen=True)
class GenerationWork(PlansWork):
    """What the model itself writes after each prompt under each plan: greedy, side by side. tokens: (n_prompts, prompt)."""

    new_tokens: int

    @property
    def keys(self) -> list[dict]:
        return [key | {"new_tokens": self.new_tokens} for key in self._keys("generation", VERSION)]

    @property
    def tokens_to_pass(self) -> int:
        return (self.tokens.numel() + len(self.tokens) * self.new_tokens) * len(self.plans)

    def measure(self, model, tokenizer, update) -> list[dict]:
        values = []
        for plan in self.plans:
            with skipping(model, plan):
                values.append({"tokens": greedy(model, self.tokens, self.new_tokens).tolist()})
            update(self.tokens_to_pass / len(self.plans))
        return values


@dataclasses.dataclass(frozen=True)
class ConfidenceWork(TaskWork):
    """How sure the model is of its choices in one task, under each of several plans, and which are right."""

    @property
    def keys(self) -> list[dict]:
        return [key | {"measurement": "confidence", "confidence": CONFIDENCE_VERSION} for key in super().keys]

    def measure(self, model, tokenizer, update) -> list[dict]:
        done = lambda share: update(share * self.tokens_to_pass)  # noqa: E731
        found = score_choices(model, tokenizer, list(self.members), self.plans, self.limit, on_batch=done)
        pairs = zip(found.confidence.tolist(), found.right.tolist(), strict=True)
        return [{"confidence": sure, "right": right, "chance": found.chance} for sure, right in pairs]
