"""Rules of notebook 12: encoders and vision transformers beside decoders."""

from collections.abc import Iterator

import pandas as pd

from ...report.rules import Comparison, Finding
from ...report.style import KIND_NAMES
from ...report.tables import Tables
from ...report.verdicts import advice, check, triple
from ..gather import of_model
from ..similarity.verdicts import attention_most_redundant
from .rows import FINDING, MEAN
from .work import COSINE

PAIR_NAMES = {
    "attention": "attention layers",
    "cross_attention": "cross-attention layers",
    "mlp": "MLPs",
    "block": "blocks",
}
KEEP = 0.9  # of what the dense model finds above guessing
COST = 0.1  # nats that a target token may cost more


@check
def attention_most_redundant_in_text_encoders(tables: Tables) -> Iterator[Finding]:
    yield from _most_redundant(tables, "text")


@check
def attention_most_redundant_in_vision_transformers(tables: Tables) -> Iterator[Finding]:
    yield from _most_redundant(tables, "images")


def _most_redundant(tables: Tables, reads: str) -> Iterator[Finding]:
    """The rule of notebook 01, for the models that read this."""
    for model in _reading(tables, reads):
        yield from attention_most_redundant(of_model(tables, model))


@check
def attention_drop_keeps_retrieval(tables: Tables, layers: float) -> Iterator[Finding]:
    yield from _keeps_more(tables, "text", layers)


@check
def attention_drop_keeps_neighbours(tables: Tables, layers: float) -> Iterator[Finding]:
    yield from _keeps_more(tables, "images", layers)


def _keeps_more(tables: Tables, reads: str, layers: float) -> Iterator[Finding]:
    """The rule of notebook 02 for tasks, up to a share of the layers, for the models that read this."""
    for model in _reading(tables, reads):
        rows = tables["gaps"].query(f"measure == '{FINDING[reads]}' and share <= {layers}")
        rows = rows[rows["model"] == model]
        if rows.empty:
            yield Finding(model, f"this run drops nothing up to {layers:.0%} of its layers".replace("%", " %"))
            continue
        compared = [
            Comparison(f"Attn-{r['n']} minus {KIND_NAMES[r['other']]}-{r['n']}", *triple(r, "difference"), above=0, form="+.3f",
                       size=_samples(tables, model), unit="samples")
            for r in rows.to_dict("records")
        ]  # fmt: skip
        yield Finding(model, f"{FINDING[reads]}: {'; '.join(map(str, compared))}", compared)


@check
def half_of_attention_can_go(tables: Tables, retained: float) -> Iterator[Finding]:
    for model in tables["models"].to_dict("records"):
        name, n = model["model"], model["n_layers"] // 2
        row = _main(tables, name, model["reads"]).query(f"kind == 'attention' and n == {n}")
        if row.empty:
            yield Finding(name, f"this run does not drop {n} of its {model['n_layers']} attention layers")
            continue
        kept = Comparison(f"Attn-{n} of {model['n_layers']} retains", *triple(row.iloc[0], "retained", "retained_"),
                          at_least=retained, form=".1%", size=_samples(tables, name), unit="samples")  # fmt: skip
        yield Finding(name, f"{kept} of its {FINDING[model['reads']]} above guessing", [kept])


def _reading(tables: Tables, reads: str) -> list[str]:
    """The models that read text, or images."""
    models = tables["models"]
    return list(models[models["reads"] == reads]["model"])


def _main(tables: Tables, model: str, reads: str) -> pd.DataFrame:
    """What is found by a model's embeddings, as a mean over data sets."""
    return (
        tables["quality"].query(f"data == '{MEAN}' and measure == '{FINDING[reads]}'").loc[lambda rows: rows["model"] == model]
    )


def _samples(tables: Tables, model: str) -> float:
    rows = tables["quality"]
    return float(rows[(rows["model"] == model) & (rows["data"] != MEAN)]["samples"].min())


@advice("12_other_transformers")
def what_to_do(tables: Tables) -> str:
    """How many attention layers of an encoder like these can be dropped, and what to look at."""
    text = []
    for model in tables["models"].to_dict("records"):
        rows = _main(tables, model["model"], model["reads"])
        reach = {}
        for kind in KIND_NAMES:
            kept = rows[(rows["kind"] == kind) & (rows["retained_low"] >= KEEP)]["n"]
            reach[kind] = kept.max() if len(kept) else 0
        found = (
            f"**{model['model']}**, {model['n_layers']} layers: by the lower end of the interval {KEEP:.0%} of what is found "
            f"above guessing ({FINDING[model['reads']]}) is retained without {reach['attention']} attention layers, without "
            f"{reach['mlp']} MLPs and without {reach['block']} blocks, of the numbers that were tried."
        ).replace("%", " %")
        half = tables["half"].query(f"measure == '{COSINE}'")
        for row in half[half["model"] == model["model"]].to_dict("records"):
            found += (
                f" Without {row['n']} attention layers embeddings have a cosine of {row['attention']:.2f} with the dense "
                "model's: embed a collection anew, and do not mix old and new vectors in one index."
            )
        text.append(found)
    pairs = tables["pairs"].to_dict("records") if "pairs" in tables else []  # runs that were kept before had none
    return "\n\n".join(text + [_of_pairs(tables["targets"], model) for model in pairs])


def _of_pairs(targets: pd.DataFrame, model: dict) -> str:
    """How many layers of an encoder-decoder can be dropped at a small cost, on every corpus."""
    rows = targets[(targets["model"] == model["model"]) & (targets["kind"] != "dense")]
    worst = rows.groupby(["kind", "n"], sort=False)["added_high"].max().reset_index()
    reach = worst[worst["added_high"] <= COST].groupby("kind")["n"].max()
    parts = [f"{reach.get(kind, 0)} {name}" for kind, name in PAIR_NAMES.items()]
    return (
        f"**{model['model']}**, {model['encoder_layers']} layers in the encoder and {model['decoder_layers']} in the decoder: "
        f"by the upper end of the interval a target token costs at most {COST:g} nats more without "
        f"{', without '.join(parts)}, of the numbers that were tried."
    )
