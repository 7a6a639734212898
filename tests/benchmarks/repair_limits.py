"""How far repair and healing go with more text: perplexity over dense on held-out text of four corpora, one row for each arm.

    .venv/bin/python tests/benchmarks/repair_limits.py 12 8 [--layers cosine] [--fit 131072] [--heal 327680] [--sweeps 1]

The layers are those that notebook 10 of the profile `cpu` found in SmolLM2-135M; a search drops them one after the other, so
its first eight are its plan of eight. Text for fits, for healing and for the test are disjoint. An arm takes minutes.
"""

import argparse
import copy
import tempfile
import time

import numpy as np
import pandas as pd
import torch

from llmdrop_utils import DropPlan, load_model, load_tokens
from llmdrop_utils.base import files
from llmdrop_utils.derive.healing import Healing, heal
from llmdrop_utils.derive.model import layers_restored
from llmdrop_utils.derive.repair import Repair, repair
from llmdrop_utils.measure.text import score_text
from llmdrop_utils.models.load import default_dtype

CORPORA = ("web", "encyclopedia", "code", "mathematics")
LENGTH, HEALING, TEST = 512, 160, 24  # tokens of a sample, and samples of each corpus
ARMS = ("plain", "repair", "healing", "repair, healing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, nargs="+", help="attention layers dropped")
    parser.add_argument("--layers", default="search with repair", help="what chose them: search with repair, cosine")
    parser.add_argument("--fit", type=int, default=131_072, help="tokens that a repair is fitted on")
    parser.add_argument("--heal", type=int, default=327_680, help="tokens of healing")
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    given = parser.parse_args()
    orders = pd.read_csv(files.REFERENCE / "cpu" / "10_keep_more" / "orders.csv")
    order = orders[orders["layers"] == given.layers].sort_values("position")["layer"].tolist()
    model, tokenizer = load_model("smollm2-135m", dtype=default_dtype())
    fit = given.fit // LENGTH // len(CORPORA)
    text = torch.stack([load_tokens(corpus, tokenizer, fit + HEALING + TEST, LENGTH) for corpus in CORPORA], 1)
    for_fit, for_healing, test = (part.flatten(0, 1) for part in text.split([fit, HEALING, TEST]))
    held_out = [test[i :: len(CORPORA)] for i in range(len(CORPORA))]
    dense = np.array([score_text(model, tokens).nll.mean() for tokens in held_out])
    print(f"{model.dtype}, {torch.get_num_threads()} threads; layers by {given.layers}: {order}", flush=True)
    for n in given.n:
        plan = DropPlan(attention=order[:n])
        for arm in given.arms:
            with layers_restored(model), tempfile.TemporaryDirectory() as folder:
                started, teacher = time.perf_counter(), copy.deepcopy(model)
                if "repair" in arm:
                    repair(model, for_fit, plan, Repair(sweeps=given.sweeps))
                if "healing" in arm:
                    heal(model, for_healing, plan, folder, Healing(5e-4, 4, tokens=given.heal), teacher)
                seconds = time.perf_counter() - started
                lost = np.array([score_text(model, tokens, [plan]).nll.mean() for tokens in held_out]) - dense
            ratios = "  ".join(f"{corpus} {ratio:.3f}" for corpus, ratio in zip(CORPORA, np.exp(lost), strict=True))
            print(f"{n:3} {arm:16} geometric mean {np.exp(lost.mean()):.3f}  {ratios}  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
