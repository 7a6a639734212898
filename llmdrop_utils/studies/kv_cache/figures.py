"""Figures of notebook 06: key-value cache."""

import matplotlib.pyplot as plt
import pandas as pd

from ...report.style import COLORS, WIDTH, Drawing, figure
from ...report.tables import Tables

SLIP = 0.5  # GiB by which the paper's rounded number may differ from the count


@figure("06_kv_cache")
def figS12_kv_cache(tables: Tables) -> Drawing:
    """Paper, Table 4: key-value cache of the paper's models, counted, beside what the paper prints."""
    data = tables["paper"]
    models = list(data["model"].unique())
    fig, ax = plt.subplots(figsize=(WIDTH, 2.6))
    for i, model in enumerate(models):
        for j, row in enumerate(data[data["model"] == model].sort_values("n").itertuples()):
            x, gib = i + 0.42 * j - 0.21, row.counted_bytes / 2**30
            label = ("attention dropped, counted" if row.n else "dense, counted") if i == 0 else None
            ax.bar(x, gib, 0.4, color=COLORS["attention" if row.n else "dense"], alpha=0.75, label=label)
            text = f"{gib:g} GiB\n{row.n_layers - row.n} layers"
            ax.text(x, gib / 2, text, ha="center", va="center", fontsize=6.5, color="white")
            label = "as the paper prints it" if i == j == 0 else None
            ax.plot([x - 0.21, x + 0.21], [row.paper_gib] * 2, color=COLORS["mlp"], linewidth=1.4, label=label)
    names = data.drop_duplicates("model")
    ax.set_xticks(range(len(models)), [f"{r.model}\nbatch {r.batch_size}" for r in names.itertuples()])
    ax.set_ylabel(f"Key-value cache, GiB\n({data['length'].iloc[0]:,} tokens, 16 bit)")
    ax.legend(loc="upper right", fontsize=7)
    return Drawing(fig, data, _takeaway(data))


def _takeaway(data: pd.DataFrame) -> str:
    """Whether formula, count and paper agree."""
    same = data["counted_bytes"] == data["formula_bytes"]
    text = f"Formula and count agree to the byte in {same.sum()} of {len(data)} rows."
    slips = data[(data["counted_bytes"] / 2**30 - data["paper_gib"]).abs() >= SLIP]
    for model, rows in slips.groupby("model", sort=False):
        printed = " and ".join(f"{value:g}" for value in rows["paper_gib"])
        counted = " and ".join(f"{value / 2**30:g}" for value in rows["counted_bytes"])
        text += f" The paper prints {printed} for {model}, where its own formula gives {counted} GiB: the paper's slip."
    return text
