"""Figures of notebook 06: key-value cache."""

import matplotlib.pyplot as plt

from ...report.style import COLORS, WIDTH, figure
from ...report.tables import Tables


@figure("06_kv_cache")
def figS12_kv_cache(tables: Tables):
    """Paper, Table 4: key-value cache of the paper's models, counted, beside what the paper prints."""
    data = tables["paper"]
    models = list(data["model"].unique())
    fig, ax = plt.subplots(figsize=(WIDTH * 0.75, 2.4))
    for i, model in enumerate(models):
        for j, row in enumerate(data[data["model"] == model].sort_values("n").itertuples()):
            kind = "attention" if row.n else "dense"
            x, gib = i + 0.38 * j - 0.19, row.counted_bytes / 2**30
            label = (f"{'with attention dropped' if row.n else 'dense'}") if i == 0 else None
            ax.bar(x, gib, 0.34, color=COLORS[kind], alpha=0.75, label=label)
            layers = f"{row.n_layers - row.n}\nlayers"
            ax.text(x, gib / 2, f"{gib:g}\n{layers}", ha="center", va="center", fontsize=6.5, color="white")
            label = "as printed in the paper" if i == j == 0 else None
            ax.plot([x - 0.19, x + 0.19], [row.paper_gib] * 2, color="#D55E00", linewidth=1.4, label=label)
    names = data.drop_duplicates("model")
    ax.set_xticks(range(len(models)), [f"{r.model}\nbatch {r.batch_size}" for r in names.itertuples()])
    ax.set_ylabel("Key-value cache, GiB\n(2,048 tokens, 16 bit)")
    ax.legend(loc="upper right", fontsize=7)
    return fig, data
