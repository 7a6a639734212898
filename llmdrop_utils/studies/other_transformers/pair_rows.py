"""Notebook 12, encoder-decoders: importance of each place by depth, and what a target costs without some of them."""

from collections.abc import Mapping, Sequence

import numpy as np

from ...base import stats
from ...measure.importance import Importance
from ...report.tables import Column, Key, table
from ..work import Cell

# Column -> kind, and whether the layer is one of the encoder.
SITES = {
    "encoder_attention": ("attention", True),
    "encoder_mlp": ("mlp", True),
    "self_attention": ("attention", False),
    "cross_attention": ("cross_attention", False),
    "decoder_mlp": ("mlp", False),
}
HEADINGS = ("Encoder attention", "Encoder MLP", "Decoder self-attention", "Decoder cross-attention", "Decoder MLP")


def _site(name: str, heading: str) -> list:
    return [Column(name, heading, ".4f", f"{name}_low", f"{name}_high"), f"{name}_low {name}_high"]


TABLES = {
    "pairs": table(
        "model", Column("parameters", "Parameters", ",d"), Column("encoder_layers", "Layers of the encoder", "d"),
        Column("decoder_layers", "Layers of the decoder", "d"), Column("input", "One sample"),
    ),
    "pair_importance": table(
        "model corpus", Key("layer", "Layer", "d"),
        *(part for name, heading in zip(SITES, HEADINGS, strict=True) for part in _site(name, heading)),
    ),
    "targets": table(
        "model corpus kind", Key("n", "Dropped", "d"), Column("share", "Share of the layers", ".0%"),
        Column("samples", "Passages", "d"), Column("tokens", "Target tokens", ",d"),
        Column("nats", "Nats per target token", ".3f", "low", "high"), "low high",
        Column("added", "More than the dense model", "+.3f", "added_low", "added_high"), "added_low added_high",
    ),
}  # fmt: skip


def pair_importance_rows(scores: Mapping[str, Importance]) -> list[dict]:
    """A row for each corpus and depth, counted from the first layer of either half; NaN where one half is shorter."""
    rows = []
    for seed, (corpus, s) in enumerate(scores.items()):
        n_source = int(np.isnan(s.importance["cross_attention"]).sum())
        halves = {True: range(n_source), False: range(n_source, s.importance["block"].size)}
        for depth in range(max(map(len, halves.values()))):
            row: dict = {"corpus": corpus, "layer": depth}
            for site, (kind, of_encoder) in SITES.items():
                layers = halves[of_encoder][depth : depth + 1]
                row |= dict.fromkeys((site, f"{site}_low", f"{site}_high"), np.nan)
                for layer in layers:
                    draws = stats.text_means(s.per_sample[kind][:, layer], s.weights[:, layer], seed)
                    low, high = stats.text_interval(draws, len(s.weights))
                    row |= {site: s.importance[kind][layer], f"{site}_low": float(low), f"{site}_high": float(high)}
            rows.append(row)
    return rows


def target_rows(cells: Sequence[Cell], values: Sequence[dict], n_layers: Mapping[str, int]) -> list[dict]:
    """What a target token costs under every plan, the dense one first. values: of each plan, nats and number of tokens of each
    passage; n_layers: kind -> how many layers have one."""
    nats, tokens = np.array([value["nll"] for value in values]).T, np.array(values[0]["tokens"])
    mean, draws = np.average(nats, axis=0, weights=tokens), stats.bootstrap_means(nats, tokens)
    rows = []
    for i, cell in enumerate(cells):
        low, high = stats.interval(draws[:, i], len(tokens))
        added_low, added_high = stats.interval(draws[:, i] - draws[:, 0], len(tokens))
        share = cell.n / n_layers[cell.kind] if cell.n else 0.0
        rows.append({
            "kind": cell.kind, "n": cell.n, "share": share, "samples": len(tokens), "tokens": int(tokens.sum()),
            "nats": mean[i], "low": low, "high": high,
            "added": mean[i] - mean[0], "added_low": added_low, "added_high": added_high,
        })  # fmt: skip
    return rows
