"""Rules of notebook 06: key-value cache."""

from collections.abc import Iterator

from ...report.rules import Comparison, Finding, exactly
from ...report.tables import Tables
from ...report.verdicts import advice, check


@check
def cache_shrinks_in_proportion(tables: Tables, tolerance: float) -> Iterator[Finding]:
    for row in tables["paper"].itertuples():
        left, dense = row.counted_bytes / 2**30, row.dense_bytes / 2**30
        printed = exactly(f"Attn-{row.n}, counted of the paper's number,", left / row.paper_gib, tolerance)
        text = f"Attn-{row.n} leaves {left:g} of {dense:g} GiB (the paper prints {row.paper_gib:g})"
        yield Finding(row.model, text, [*_shares(row), printed])
    for model, rows in tables["caches"].groupby("model", sort=False):
        if not rows["full_attention"].astype(bool).all():
            reason = "its sliding windows hold a fixed number of tokens, so the share depends on which are dropped"
            yield Finding(model, reason)
            continue
        compared = [comparison for row in rows.itertuples() for comparison in _shares(row)]
        yield Finding(model, f"{len(rows)} caches, each compared with the formula and with its share of the layers", compared)


def _shares(row) -> list[Comparison]:
    """A cache counted, against the formula and against the share of the layers that keep theirs."""
    of_layers = row.dense_bytes * (row.n_layers - row.n) / row.n_layers
    return [
        exactly(f"Attn-{row.n} of {row.n_layers}, counted of the formula,", row.counted_bytes / row.formula_bytes),
        exactly(f"Attn-{row.n} of {row.n_layers}, counted of its share,", row.counted_bytes / of_layers),
    ]


@advice("06_kv_cache")
def what_to_do(tables: Tables) -> str:
    """What each dropped attention layer saves on the models of the run."""
    text = []
    for model, rows in tables["caches"].groupby("model", sort=False):
        longest = rows[rows["length"] == rows["length"].max()]
        most = longest.loc[longest["n"].idxmax()]
        left = most["counted_bytes"] / most["dense_bytes"]
        if most["full_attention"]:
            per_token = most["dense_bytes"] / most["length"]
            found = (
                f"the cache takes {per_token:,.0f} bytes per token, and every attention layer that you drop saves "
                f"{per_token / most['n_layers']:,.0f} of them, whichever it is."
            )
        else:
            found = (
                "some of its layers are sliding windows, which hold a fixed number of tokens however long the context. At long "
                "contexts, dropping a layer that sees every token saves more than its share, dropping a window less."
            )
        if left > 0 and most["n"]:
            found += (
                f" With {most['n']} of {most['n_layers']} dropped, {most['length']:,} tokens take {100 * left:.0f} % of the "
                f"dense cache, so the same memory holds {1 / left:.1f} times as many sequences."
            )
        text.append(f"**{model}**: {found}")
    return "\n\n".join(text)
