"""Notebook 04, what is measured: orders in which methods drop layers, with their cost, and how continuations change."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Annotated

import torch

from ...base.errors import NotApplicable
from ...base.provenance import code_provenance
from ...base.settings import Counts, Names, Positive, Settings
from ...measure.alone import VERSION as ALONE_VERSION
from ...measure.decoding import greedy
from ...measure.importance import VERSION as IMPORTANCE_VERSION
from ...measure.importance import measure_importance
from ...measure.scoring import score
from ...measure.taylor import VERSION as TAYLOR_VERSION
from ...measure.text import VERSION as TEXT_VERSION
from ...models.families import find_anatomy, stream_of
from ...selection.methods import METHODS, Context, select_by
from ...sources.texts import fingerprint
from ..profile import known, section
from ..work import DENSE, PlansWork, Work

VERSION = 2  # raise when a change to the measurement changes what is measured
# What methods measure, each with its own version.
MEASURES = {"importance": IMPORTANCE_VERSION, "text": TEXT_VERSION, "Taylor": TAYLOR_VERSION, "alone": ALONE_VERSION}


Methods = Annotated[Names, known("method", METHODS)]


@section("ablations")
class Ablations(Settings):
    """Which methods choose attention layers, on how much text, and how what they choose is tested."""

    methods: Methods  # that rank all layers at once, beside cosine ("one-shot")
    stepwise: Methods  # that look again after each layer, on fewer samples
    n_samples: Positive  # the first blocks of the first corpus, for all methods
    stepwise_samples: Positive
    seeds: Positive  # of the method "random"
    n_drop: Counts  # attention layers; MLPs too, with the residual connection and without it
    text_samples: Positive  # of the held-out text of the section `text`, the first ones
    task_n: Counts  # of these, those at which tasks are asked
    task_limit: Positive | None  # documents of each task; null: all
    samples: Counts  # cosine from so few blocks,
    lengths: Counts  # and from blocks that are so short
    blocks: Counts  # whole blocks, beside attention of as many parameters
    prompt: Positive  # tokens of held-out text that the dense model continues
    new_tokens: Positive


@dataclasses.dataclass(frozen=True)
class OrderWork(Work):
    """The order in which a method drops layers, and what it took to find it."""

    tokens: torch.LongTensor
    batch_size: int
    kind: str
    method: str
    n_drop: int
    seed: int = 0

    @property
    def keys(self) -> list[dict]:
        code = code_provenance()
        machine = {name: code[name] for name in ("processor", "gpus", "cpu_threads")}  # seconds are among what is stored
        more = {"tokens": fingerprint(self.tokens), "kind": self.kind, "method": self.method, "n_drop": self.n_drop,
                "seed": self.seed, "batch_size": self.batch_size, "machine": machine, "measures": MEASURES}  # fmt: skip
        return [self._key("order", VERSION, **more)]

    @property
    def tokens_to_pass(self) -> int:
        return self.tokens.numel()

    @property
    def about(self) -> dict:
        return {"method": self.method, "tokens": list(self.tokens.shape), "tokens_sha256": fingerprint(self.tokens)}

    def measure(self, model, tokenizer, update) -> list[dict]:
        context = Context(model, self.tokens, self.batch_size, self.seed)
        measure_importance(model, self.tokens[:1, :16])  # the first pass of a process is slower than any other
        started = time.perf_counter()
        with counted_passes(model, self.tokens.numel()) as passes:
            try:
                plan = select_by(self.method, context, self.kind, self.n_drop)
            except NotApplicable as reason:  # the other methods go on
                return [{"layers": [], "seconds": 0.0, "passes": 0.0, "reason": str(reason)}]
        seconds = time.perf_counter() - started
        update(self.tokens.numel())
        layers = plan.mlp if self.kind == "mlp" else plan.attention
        return [{"layers": list(layers), "seconds": seconds, "passes": passes[0]}]


@contextlib.contextmanager
def counted_passes(model: torch.nn.Module, n_tokens: int) -> Iterator[list[float]]:
    """Yields [how often `n_tokens` tokens went through the whole model]; attention and MLP of each layer count as much.

    It is seen at these modules: what several plans share, and what is dropped, is not computed and does not count.
    """
    anatomy, passes = find_anatomy(model), [0.0]

    def count(module, args, kwargs):
        passes[0] += stream_of(args, kwargs).shape[:-1].numel() / n_tokens / (2 * len(anatomy))

    modules = [module for layer in anatomy.layers for module in (layer.attention, layer.mlp)]
    handles = [module.register_forward_pre_hook(count, with_kwargs=True) for module in modules]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


@dataclasses.dataclass(frozen=True)
class ContinuationWork(PlansWork):
    """How plans change what follows a prompt: the dense model's own greedy continuation, read again under each plan.

    tokens: (n_prompts, prompt).
    """

    new_tokens: int

    @property
    def keys(self) -> list[dict]:
        return [key | {"new_tokens": self.new_tokens, "text": TEXT_VERSION} for key in self._keys("continuation", VERSION)]

    def measure(self, model, tokenizer, update) -> list[dict]:
        new = torch.cat([greedy(model, prompt[None], self.new_tokens) for prompt in self.tokens]).cpu()
        requests = list(zip(self.tokens.tolist(), new.tolist(), strict=True))
        done = lambda share: update(share * self.tokens_to_pass)  # noqa: E731
        scores = score(model, requests, (DENSE, *self.plans), kl=True, on_batch=done)
        same, kl = scores.hits[1:] / self.new_tokens, scores.kl[1:] / self.new_tokens
        return [{"same": a.tolist(), "kl": b.tolist()} for a, b in zip(same, kl, strict=True)]


def order_of(value: dict) -> tuple[int, ...]:
    """What an `OrderWork` found."""
    return tuple(value["layers"])
