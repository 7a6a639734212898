"""Notebook 05: which loads are timed, under which plans."""

import json

import numpy as np

from ...base.errors import DiskFull, LLMDropError, NotAvailable
from ...base.store import Store
from ...drop.plan import DropPlan
from ...measure.speed import Load
from ...models.families import learned_positions
from ...models.load import load_config
from ...models.locate import LocatedModel, locate_model
from ...selection.methods import select_last
from ...selection.ranking import drop_sequence, select
from ...sources.catalogue import catalogue
from ..profile import Profile
from ..queue import measure_all
from ..run import available_corpora, identity_of, importance_of, importance_work
from ..work import SpeedWork, plan_key

Cell = tuple[str, int]  # kind, how many are dropped


# ---- models, plans, work --------------------------------------------------------------------------------------------


def models_or_shapes(profile: Profile, not_run: dict[str, str]) -> list[LocatedModel]:
    """The profile's models; those that cannot be had go into `not_run`, and random weights take their place if the shape is
    known."""
    located = []
    for name in profile.models:
        try:
            located.append(locate_model(name))
        except DiskFull:
            raise
        except LLMDropError as reason:
            if name not in catalogue()["shapes"]:
                if len(profile.models) == 1:
                    raise
                not_run[name] = str(reason)
                continue
            not_run[name] = f"{reason} Its shape with random weights was taken instead."
            located.append(locate_model(f"random:{name}"))
    if not located:
        raise NotAvailable("None of these models can be had here:\n" + "\n".join(not_run.values()))
    return located


def plans_of(model: LocatedModel, profile: Profile, store: Store, not_run: dict[str, str]) -> dict[Cell, DropPlan]:
    """What notebook 02 drops; for random weights the last layers, since layers of one shape cost the same."""
    counts = {(kind, n) for kind, several in profile.speed.n_drop.items() for n in several}
    counts |= {("attention", profile.speed.sweep_n), ("mlp", profile.speed.sweep_n)}
    n_layers = n_layers_of(model)
    cells = [(kind, n) for kind, n in sorted(counts) if n < n_layers]
    if model.is_random:
        return {(kind, n): select_last(n_layers, kind, n) for kind, n in cells}
    (item,) = importance_work(model, available_corpora(profile, not_run)[:1], profile)
    measure_all([item], store, False, profile.several, not_run)
    if store.get(item.keys[0]) is None:  # one of several models, and in `not_run` by now
        return {}
    scores = importance_of(item, store).first(profile.calibration.n_samples)
    return {(kind, n): select(scores, kind, n) for kind, n in cells if n < len(drop_sequence(scores, kind))}


def speed_work(model: LocatedModel, plans: dict[Cell, DropPlan], profile: Profile) -> list[SpeedWork]:
    """The loads of a model: the paper's protocol in samples, a generation timed whole, and the sweep."""
    part = profile.speed
    batch, fill = part.batch_size or 1, part.batch_size is None
    wanted = {cell: plan for cell, plan in plans.items() if cell[1] in part.n_drop.get(cell[0], [])}
    swept = {cell: plan for cell, plan in plans.items() if cell[0] in ("attention", "mlp") and cell[1] == part.sweep_n}
    one = dict(list((swept or wanted).items())[:1])
    prompt, new_tokens = part.whole
    loads: list[tuple[Load, bool, dict[Cell, DropPlan]]] = [(Load("prefill", part.prompt, batch_size=batch), fill, wanted)]
    for context in part.contexts:
        loads.append((Load("decode", context, part.steps), False, wanted))
        loads += [(Load("decode", context, part.steps, size), False, swept) for size in part.sweep_batches]
    protocol = [c for c in part.contexts if part.prompt <= c <= part.prompt + part.new_tokens]
    loads += [(Load("decode", context, part.steps, batch), fill, wanted) for context in protocol]
    room = part.prompt + part.new_tokens + part.steps
    compiled = {cell: plan for cell, plan in plans.items() if cell[1] in (part.compiled or {}).get(cell[0], [])}
    loads.append((Load("decode", part.prompt, part.steps, batch, "compiled", room), fill, compiled))
    loads += [(Load("decode", context, part.steps), False, one) for context in (prompt, prompt + new_tokens)]
    loads.append((Load("generation", prompt, new_tokens), False, one))
    loads += [(Load("prefill", context), False, swept) for context in part.contexts if context <= part.prompt]
    loads.append((Load("prefill", prompt), False, one))
    shared, work, longest = identity_of(model), {}, part.prompt + part.new_tokens + part.steps
    for load, full, cells in loads:  # the same load for several purposes is timed once, under all their plans
        plans_of = work.setdefault((load, full), {})
        plans_of.update({json.dumps(plan_key(plan)): plan for plan in cells.values()})
    known = learned_positions(load_config(model)) or np.inf
    return [
        SpeedWork(**shared, load=load, fill=full, longest=longest, repeats=part.repeats, plans=tuple(plans_of.values()))
        for (load, full), plans_of in work.items()
        if plans_of and load.context + load.new_tokens <= known
    ]


def n_layers_of(model: LocatedModel) -> int:
    config = load_config(model).get_text_config()
    return getattr(config, "num_hidden_layers", None) or config.n_layer
