"""Rules of notebook 06: key-value cache."""

from collections.abc import Iterator

from ...report.tables import Tables
from ...report.verdicts import Finding, check


@check
def cache_shrinks_in_proportion(tables: Tables) -> Iterator[Finding]:
    for row in tables["paper"].query("n > 0").itertuples():
        exact = row.counted_bytes == row.formula_bytes
        share = row.counted_bytes * row.n_layers == row.dense_bytes * (row.n_layers - row.n)
        left, dense = row.counted_bytes / 2**30, row.dense_bytes / 2**30
        text = f"Attn-{row.n} leaves {left:g} of {dense:g} GiB (the paper prints {row.paper_gib:g})"
        yield row.model, bool(exact and share), text
    for model, rows in tables["caches"].groupby("model", sort=False):
        if not rows["full_attention"].astype(bool).all():
            yield model, None, "its sliding windows hold a fixed number of tokens, so the share depends on which layers go"
            continue
        exact = (rows["counted_bytes"] == rows["formula_bytes"]).all()
        share = (rows["counted_bytes"] * rows["n_layers"] == rows["dense_bytes"] * (rows["n_layers"] - rows["n"])).all()
        yield model, bool(exact and share), f"{len(rows)} caches, each to the byte as the formula says"
