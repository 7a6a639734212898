"""Rules of notebook 09: files and another runtime."""

from collections.abc import Iterator

import pandas as pd

from ...report.rules import Comparison, Finding, exactly
from ...report.tables import Tables
from ...report.verdicts import advice, check, triple
from ..speedup.verdicts import is_judged

OF_16_BITS = ("llama.cpp F16", "llama.cpp BF16")  # as many bytes for weights as for the cache, as in torch


@check
def smaller_by_what_is_dropped(tables: Tables) -> Iterator[Finding]:
    files, caches = (tables[name].query("n > 0") for name in ("files", "caches"))
    for model, rows in files.groupby("model", sort=False):
        compared = [
            exactly(
                f"{r.file} without {r.n}, bytes saved of bytes dropped,", (r.saved_bytes + r.stand_in_bytes) / r.dropped_bytes
            )
            for r in rows.itertuples()
        ]
        compared += [
            exactly(f"{r.file} without {r.n}, cache counted of the formula,", r.counted_bytes / r.formula_bytes)
            for r in caches[caches["model"] == model].itertuples()
        ]
        ratios = [comparison.value for comparison in compared]
        told = (
            f"{len(rows)} files, bytes saved of bytes dropped, and {len(compared) - len(rows)} caches, bytes of the formula's"
        )
        yield Finding(model, f"{told}: {min(ratios):.6f} to {max(ratios):.6f}", compared)


@check
def faster_in_another_runtime(tables: Tables, share: float) -> Iterator[Finding]:
    speed = tables["speed"]
    timed = speed[(speed["n"] > 0) & speed["runtime"].isin(OF_16_BITS)]
    for model, rows in timed.groupby("model", sort=False):
        judged = rows[is_judged(rows)]
        compared = [_of_predicted(row, share) for row in judged.to_dict("records")]
        left = len(rows) - len(judged)
        told = f"; {left} not judged (noisy, or too few repeats)" if left else ""
        yield Finding(
            model, f"speed-ups, each over what bytes and operations predict: {'; '.join(map(str, compared))}{told}", compared
        )


def _of_predicted(row: dict, share: float) -> Comparison:
    what = f"{row['runtime']}, {row['what']} at {row['context']:,} without {row['n']}"
    value, low, high = (end / row["predicted"] for end in triple(row, "speedup", "speedup_"))
    return Comparison(what, value, low, high, at_least=share, unit="repeats")


@advice("09_take_away")
def what_to_do(tables: Tables) -> str:
    """What a file without attention layers saves and gains, and what to check before it is served."""
    text = []
    for model, rows in tables["files"].groupby("model", sort=False):
        gguf = rows[rows["file"].str.startswith("GGUF") & (rows["n"] > 0)]
        least = gguf.sort_values("n", kind="stable").iloc[0]
        cache, gate = (_row(tables[name], least) for name in ("caches", "gate"))
        speed = tables["speed"]
        timed = speed[(speed["model"] == model) & (speed["runtime"] == f"llama.cpp {least['file'].split()[-1]}")]
        longest = timed[(timed["n"] == least["n"]) & (timed["context"] == timed["context"].max())]
        sizes = f"{least['file_bytes'] / 1e6:,.0f} MB instead of {least['dense_file_bytes'] / 1e6:,.0f}"
        text.append(
            f"**{model}**: the {least['file']} file without {least['n']} attention layers takes {sizes}. A token takes "
            f"{cache['counted_bytes']:,} bytes of cache instead of {cache['dense_bytes']:,}. At "
            f"{longest['context'].iloc[0]:,} tokens {_gains(longest)}. It computes what the dense model does with these layers "
            f"set to zero, {gate['divergence']:.2g} nats apart. That is no measure of quality: see notebook 02 before you "
            "choose a number of layers."
        )
    text.append(
        "How much faster a runtime gets depends on how it computes attention: measure in the one that you serve with, at the "
        "contexts that you serve."
    )
    return "\n\n".join(text)


def _gains(rows: pd.DataFrame) -> str:
    words = {"prefill": "reads a prompt", "decode": "generates"}
    told = []
    for r in rows.itertuples():
        between = f"{r.speedup_low:.2f} to {r.speedup_high:.2f}" + ", noisy" * bool(r.noisy)
        told.append(f"it {words[r.what]} {r.speedup:.2f} times as fast ({between})")
    return " and ".join(told)


def _row(rows: pd.DataFrame, of: pd.Series) -> pd.Series:
    """The row of the same model, file and number dropped."""
    return rows[(rows["model"] == of["model"]) & (rows["file"] == of["file"]) & (rows["n"] == of["n"])].iloc[0]
