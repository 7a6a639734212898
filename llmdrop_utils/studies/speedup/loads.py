"""Notebook 05, what is timed: which models, under which plans, at which loads."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from pydantic import ValidationInfo, field_validator

from ...base.errors import each_available
from ...base.provenance import code_provenance
from ...base.settings import Counts, Positive, Settings
from ...dropping.plan import DropPlan, PlanKey
from ...measure.metrics import KINDS
from ...measure.speed import VERSION, Load, device_limits, largest_batch, measure_speed
from ...models.cache_shape import cache_geometry
from ...models.families import input_device, learned_positions
from ...models.load import load_config
from ...models.locate import LocatedModel, locate_available, locate_model
from ...selection.methods import select_last
from ...selection.ranking import drop_sequence, select
from ...sources.catalogue import catalogue
from ..profile import CountsByKind, Profile, section
from ..run import Run, identity_of
from ..work import DENSE, Cell, Work


@section("speed")
class Speed(Settings):
    """What is timed: generation as in the paper (Sec. 5: 2,048 tokens in and out), and a sweep over batch and context."""

    repeats: Positive  # six or more for an interval of 95 %; nine leave one outlier on either side out of it
    batch_size: Positive | None  # for the paper's protocol; null: as many as fit the GPU beside the dense model
    prompt: Positive
    new_tokens: Positive
    contexts: Counts  # tokens in the cache at which decoding is timed; both ends of the protocol among them
    steps: Positive  # decode steps that are timed together
    n_drop: CountsByKind
    sweep_batches: Counts  # decoding at each of these and of the contexts, with `sweep_n` attention or MLP layers dropped
    sweep_n: Positive
    compiled: CountsByKind | None  # what is also timed on the compiled back end, as in the paper (compiling is slow)
    whole: CountsByKind | None  # under what the protocol's generation is also timed whole, once (it takes minutes)

    @field_validator("contexts")
    @classmethod
    def _hold_both_ends(cls, contexts: list[int], info: ValidationInfo) -> list[int]:
        """Steps between two contexts follow a line (see `generation`), so the generation needs those of both of its ends."""
        prompt, new_tokens = info.data.get("prompt"), info.data.get("new_tokens")
        if prompt and new_tokens and not {prompt, prompt + new_tokens} <= {*contexts}:
            raise ValueError(
                f"The key 'contexts' in {{where}} must hold the ends of the generation, {prompt} (prompt) and "
                f"{prompt + new_tokens} (prompt and new_tokens), but is {contexts}."
            )
        return contexts


# ---- models and plans -------------------------------------------------------------------------------------------------


def models_or_shapes(profile: Profile) -> tuple[list[LocatedModel], dict[str, str]]:
    """The profile's models, and why some are unavailable (name -> reason).

    Random weights take the place of an unavailable model whose shape is known: speed and memory are the same. Raises what
    `locate_available` raises if there is neither model nor shape.
    """
    with_shape = [name for name in profile.models if name in catalogue()["shapes"]]
    _, reasons = each_available(with_shape, locate_model, "models", several=True)
    located, others = locate_available([f"random:{name}" if name in reasons else name for name in profile.models])
    instead = "Its shape with random weights was taken instead."
    return located, others | {name: f"{reason} {instead}" for name, reason in reasons.items()}


def n_layers_of(model: LocatedModel) -> int:
    """How many layers a model has, without loading it."""
    return len(cache_geometry(load_config(model).get_text_config()))


def plans_of(run: Run, model: LocatedModel, corpora: list[str]) -> dict[Cell, DropPlan]:
    """What notebook 02 drops. Without scores (random weights, or no corpus to measure them on) the last layers are dropped.

    Layers of one shape cost the same, so which of them are dropped does not matter to speed. A count that the model does not
    have is left out: a profile serves several models. Empty if the model could not be measured; the run says why.
    """
    settings = run.section(Speed)
    counts = [Cell(kind, n) for kind, several in settings.n_drop.items() for n in several]
    cells = sorted({*counts, Cell("attention", settings.sweep_n), Cell("mlp", settings.sweep_n)})
    if model.is_random or not corpora:
        n_layers = n_layers_of(model)
        cells = [cell for cell in cells if cell.kind in KINDS and cell.n < n_layers]  # a joint ranking needs scores
        return {cell: select_last(n_layers, cell.kind, cell.n) for cell in cells}
    if (scores := run.scores(model, corpora[0])) is None:
        return {}
    return {cell: select(scores, cell.kind, cell.n) for cell in cells if cell.n < len(drop_sequence(scores, cell.kind))}


# ---- loads ------------------------------------------------------------------------------------------------------------


def speed_work(model: LocatedModel, plans: dict[Cell, DropPlan], profile: Profile) -> list["SpeedWork"]:
    """One item for each load of a model, with all plans that it is timed under."""
    settings = profile.section(Speed)
    timed: dict[tuple[Load, bool], dict[PlanKey, DropPlan]] = {}
    for load, fill, cells in _loads(settings, list(plans)):  # one that serves several purposes is timed once
        timed.setdefault((load, fill), {}).update({plans[cell].key: plans[cell] for cell in cells})
    longest = settings.prompt + settings.new_tokens + settings.steps
    known = learned_positions(load_config(model)) or np.inf
    shared = identity_of(model, profile) | {"longest": longest}
    repeats = {"prefill": settings.repeats, "decode": settings.repeats, "generation": 1}
    return [
        SpeedWork(**shared, repeats=repeats[load.what], load=load, fill=fill, plans=tuple(under.values()))
        for (load, fill), under in timed.items()
        if under and load.context + load.new_tokens <= known
    ]


def too_long(model: LocatedModel, settings: Speed) -> dict[str, str]:
    """Which loads a model with learned positions cannot read, and why."""
    known, longest = learned_positions(load_config(model)), settings.prompt + settings.new_tokens
    if known is None or longest <= known:
        return {}
    return {f"{model.name}, loads of more than {known} tokens": f"The model has learned no more than {known} positions."}


def _loads(settings: Speed, cells: list[Cell]) -> Iterator[tuple[Load, bool, list[Cell]]]:
    """Each load, whether its batch is to fill the GPU, and what is dropped."""
    s = settings
    batch, fill = s.batch_size or 1, s.batch_size is None
    listed = [cell for cell in cells if cell.n in s.n_drop.get(cell.kind, [])]
    swept = [cell for cell in cells if cell.kind in ("attention", "mlp") and cell.n == s.sweep_n]
    compiled, whole = ([c for c in cells if c.n in (some or {}).get(c.kind, [])] for some in (s.compiled, s.whole))

    # 1. The paper's protocol in samples. Its prompt:
    yield Load("prefill", s.prompt, batch_size=batch), fill, listed
    # 2. Decoding at every context, one sequence at a time, and the sweep over batches.
    for context in s.contexts:
        yield Load("decode", context, s.steps), False, listed
        for size in s.sweep_batches:
            yield Load("decode", context, s.steps, size), False, swept
    # 3. The protocol's decode steps at its own batch.
    for context in s.contexts:
        if s.prompt <= context <= s.prompt + s.new_tokens:
            yield Load("decode", context, s.steps, batch), fill, listed
    # 4. The same on the compiled back end: a static cache attends over its whole room, so one context stands for all.
    room = s.prompt + s.new_tokens + s.steps
    yield Load("decode", s.prompt, s.steps, batch, "compiled", room), fill, compiled
    # 5. The sweep over prompts.
    for context in s.contexts:
        if context <= s.prompt:
            yield Load("prefill", context), False, swept
    # 6. The protocol whole, to check its samples.
    yield Load("generation", s.prompt, s.new_tokens, batch), fill, whole


@dataclasses.dataclass(frozen=True)
class SpeedWork(Work):
    """Seconds of one load under each of several plans, each beside the dense model's of the same rounds."""

    load: Load
    fill: bool  # take as many sequences as fit the GPU beside the dense model
    longest: int  # tokens that these sequences grow to
    repeats: int
    plans: tuple[DropPlan, ...]

    @property
    def keys(self) -> list[dict]:
        code = code_provenance()
        machine = {name: code[name] for name in ("processor", "gpus", "cpu_threads")}
        libraries = {name: code["versions"][name] for name in ("torch", "transformers")}
        load = dataclasses.asdict(self.load) | ({"batch_size": None, "longest": self.longest} if self.fill else {})
        more = {"machine": machine, "libraries": libraries, "load": load, "repeats": self.repeats}
        return [self._key("speed", VERSION, plan=plan.key.to_json(), **more) for plan in self.plans]

    @property
    def tokens_to_pass(self) -> int:
        load, steps = self.load, self.load.new_tokens
        # A step costs about what 16 tokens of a prompt do: weights are read for one token instead of for many.
        tokens = {"prefill": load.context, "decode": 16 * steps, "generation": load.context + 16 * steps}[load.what]
        return tokens * load.batch_size * self.repeats * (1 + len(self.plans))

    @property
    def about(self) -> dict:
        return dataclasses.asdict(self.load) | {"repeats": self.repeats}

    def measure(self, model, tokenizer, update) -> list[dict]:
        load, plans = self.load, (DENSE, *self.plans)
        if self.fill:
            load = dataclasses.replace(load, batch_size=largest_batch(model, self.longest))
        each = self.tokens_to_pass / self.repeats / len(plans)
        found = measure_speed(model, load, plans, self.repeats, on_repeat=lambda: update(each))
        limits = dataclasses.asdict(device_limits(input_device(model), model.dtype))
        dense = dataclasses.asdict(found[0])
        return [{"dense": dense, "plan": dataclasses.asdict(each), "limits": limits} for each in found[1:]]
