"""Rules of notebook 05: speed."""

from collections.abc import Iterator

from ...report.tables import Tables
from ...report.verdicts import Finding, check


@check
def half_of_attention_is_faster(tables: Tables) -> Iterator[Finding]:
    layers = tables["models"].set_index("model")["n_layers"]
    rows = tables["speed"].query("what == 'generation from samples' and kind == 'attention' and context == 2048")
    for model in layers.index:
        half = rows[(rows["model"] == model) & (2 * rows["n"] == layers[model])]
        if "llama-2-70b" not in model or half.empty:
            text = "the claim is about Llama-2-70B on a GPU: `make reproduce PROFILE=h200 NOTEBOOKS=05` times its shape"
            if len(half):
                row = half.iloc[0]
                text += f" (Attn-{row['n']} of {layers[model]} here: {row['speedup']:.2f} x)"
            yield model, None, text
            continue
        text = [f"{r.backend} {r.speedup:.2f} x ({r.speedup_low:.2f} to {r.speedup_high:.2f})" for r in half.itertuples()]
        holds = bool((half["speedup_high"] >= 1.484).any() and not half["noisy"].astype(bool).all())
        yield model, holds, f"Attn-{half.iloc[0]['n']} of {layers[model]}, 2,048 tokens in and out: " + ", ".join(text)


@check
def attention_is_best_trade(tables: Tables) -> Iterator[Finding]:
    trade = tables["trade"]
    for model in tables["models"]["model"]:
        rows = trade[(trade["model"] == model) & trade["sdr"].notna()] if len(trade) else trade
        attention = rows[rows["kind"] == "attention"].set_index(["backend", "n"]) if len(rows) else rows
        pairs = [
            (attention.loc[r.backend, r.n], r)
            for r in rows.itertuples()
            if r.kind in ("mlp", "block") and (r.backend, r.n) in attention.index
        ]
        if not pairs:
            yield model, None, "this run has no quality and speed of two kinds at equal n"
            continue
        text, judged = [], []
        for a, r in pairs:
            known = a["sdr_high"] == a["sdr_high"] and r.sdr_low == r.sdr_low
            judged += [a["sdr_high"] < r.sdr_low] if known else []
            found = f"attention {a['sdr']:.2f} ({a['sdr_low']:.2f} to {a['sdr_high']:.2f}), {r.kind} {r.sdr:.2f} "
            found += f"({r.sdr_low:.2f} to {r.sdr_high:.2f})"
            text.append(f"n = {r.n}, {r.backend}: {found if known else f'against {r.kind} a speed-up is within noise'}")
        yield model, all(judged) if judged else None, "points lost per percent of speed-up: " + "; ".join(text)
