"""How far repair and healing go with more text: perplexity over dense on held-out text of four corpora, one row for each arm.

    .venv/bin/python tests/benchmarks/repair_limits.py 12 8 [--layers cosine] [--fit 131072] [--heal 327680] [--rate 0.001]

Beside it each arm is asked what notebook 10 asks: tasks with choices, how far confidence in these is from being right, and how
much of a passage without sense is copied; the first row is the dense model's.

With --served each arm is also written as an F16 file for llama.cpp, through its parity gate, and the files take turns there:
how much faster than the first arm it reads 512 tokens, and generates after them.

The layers are those that notebook 10 of the profile `cpu` found in SmolLM2-135M. A search drops them one after the other, so
its first eight are its plan of eight. The test has text of its own, and so have fits and healing; but healing on more than 144
samples of each corpus goes on with those of fits, then with those that layers were chosen on. An arm takes minutes.
"""

import argparse
import contextlib
import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from llmdrop_utils import DropPlan, load_model, load_tokens
from llmdrop_utils.base import files
from llmdrop_utils.derive.healing import Healing, heal
from llmdrop_utils.derive.model import layers_restored
from llmdrop_utils.derive.own_text import write_samples
from llmdrop_utils.derive.repair import Repair, repair
from llmdrop_utils.export.gguf import export_gguf
from llmdrop_utils.export.llamacpp import LlamaCpp
from llmdrop_utils.measure.confidence import score_choices
from llmdrop_utils.measure.scoring import score
from llmdrop_utils.measure.text import score_text
from llmdrop_utils.models.load import default_dtype
from llmdrop_utils.sources.probes import Request, copy_probes
from llmdrop_utils.sources.task_data import load_task
from llmdrop_utils.sources.texts import text_beginning
from llmdrop_utils.studies.keep_more.rows import choices_drawn, more_than_dense, shares_drawn
from llmdrop_utils.studies.take_away.work import in_turns

CORPORA = ("web", "encyclopedia", "code", "mathematics")
LENGTH, BEGIN = 512, 16  # tokens of a sample; those that one begins with which the model writes
CHOSEN_ON, TEST, HEALING = 64, 24, 144  # samples of each corpus; layers were chosen on the first
SHORTEST = {"web": 305}  # samples of the corpora that could be read to their end
STEPS, TURNS = 32, 9  # in llama.cpp
TASKS, DOCUMENTS = ("openbookqa", "winogrande", "arc_easy", "piqa", "hellaswag", "boolq"), 100  # of each task
ARMS = ("plain", "repair", "healing", "repair, healing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, nargs="+", help="attention layers dropped")
    parser.add_argument("--layers", default="search with repair", choices=("search with repair", "cosine"))
    parser.add_argument("--fit", type=int, default=131_072, help="tokens that a repair is fitted on")
    parser.add_argument("--heal", type=int, default=327_680, help="tokens of healing")
    parser.add_argument("--minutes", type=float, help="of healing, instead of tokens")
    parser.add_argument("--rate", type=float, default=Healing.learning_rate)
    parser.add_argument("--batch", type=int, default=Healing.batch_size, help="samples in a step of healing")
    parser.add_argument("--samples", type=int, default=HEALING, help="of each corpus, for healing; read again if they are few")
    parser.add_argument("--own", type=float, default=0.0, help="share of the healing text that the dense model writes")
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--served", action="store_true", help="time the arms in llama.cpp, too")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    given = parser.parse_args()
    orders = pd.read_csv(files.REFERENCE / "cpu" / "10_keep_more" / "orders.csv")
    budget = {"minutes": given.minutes} if given.minutes else {"tokens": given.heal}
    healing = Healing(given.rate, given.batch, **budget)
    order = orders[orders["layers"] == given.layers].sort_values("position")["layer"].tolist()
    model, tokenizer = load_model("smollm2-135m", dtype=default_dtype())
    fit = given.fit // LENGTH // len(CORPORA)
    # The test comes before what is fitted on, so that it is the same however much that is.
    parts = [CHOSEN_ON, TEST, HEALING, fit]
    text = torch.stack([load_tokens(corpus, tokenizer, sum(parts), LENGTH) for corpus in CORPORA], 1)
    test, _, for_fit = (part.flatten(0, 1) for part in text.split(parts)[1:])
    for_healing = torch.stack([text_for_healing(corpus, tokenizer, given.samples) for corpus in CORPORA], 1).flatten(0, 1)
    if not given.minutes:
        for_healing = for_healing[: -(-given.heal // LENGTH)]
    if n_own := round(given.own * len(for_healing)):
        started = time.perf_counter()
        for_healing = torch.cat([write_samples(model, for_healing[:n_own, :BEGIN], LENGTH), for_healing[n_own:]])
        print(f"{n_own} samples of {len(for_healing)} written in {time.perf_counter() - started:.0f} s", flush=True)
    held_out = [test[i :: len(CORPORA)] for i in range(len(CORPORA))]
    dense = [score_text(model, tokens).nll[0] for tokens in held_out]
    asked = {name: load_task(name, 0) for name in TASKS}
    copied = copy_probes(test, len(text_beginning(tokenizer)))
    print(f"{model.dtype}, {torch.get_num_threads()} threads; layers by {given.layers}: {order}", flush=True)
    print(f"  0 {'dense':16} {beside(model, tokenizer, asked, copied, DropPlan())}", flush=True)
    for n in given.n:
        if n > len(order):
            raise SystemExit(f"Of {n} layers to drop only {len(order)} were chosen by {given.layers}.")
        plan = DropPlan(attention=order[:n])
        with tempfile.TemporaryDirectory() as folder:
            files_of: dict[str, Path] = {}
            repaired, took = {}, 0.0  # once for all arms
            for arm in given.arms:
                with layers_restored(model):
                    teacher, started = copy.deepcopy(model), time.perf_counter()
                    if "repair" in arm and repaired:
                        model.load_state_dict(repaired)
                        started -= took
                    elif "repair" in arm:
                        repair(model, for_fit, plan, Repair(sweeps=given.sweeps))
                        took = time.perf_counter() - started
                        repaired = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                    if "healing" in arm:
                        steps = len(heal(model, for_healing, plan, f"{folder}/{arm}", healing, teacher))
                        print(f"{n:3} {arm:16} {steps * given.batch * LENGTH} tokens of healing", flush=True)
                    seconds = time.perf_counter() - started
                    nll = [score_text(model, tokens, [plan]).nll[0] for tokens in held_out]
                    pairs = zip(CORPORA, dense, nll, strict=True)
                    lost = more_than_dense({corpus: np.stack(both, 1) for corpus, *both in pairs}, 0)
                    row = {corpus: of.row(1) for corpus, of in lost.items()}
                    mean, low, high = np.exp([row["mean"][end] for end in ("value", "low", "high")])
                    each = "  ".join(f"{corpus} {np.exp(row[corpus]['value']):.3f}" for corpus in CORPORA)
                    print(f"{n:3} {arm:16} mean {mean:.3f} ({low:.3f} to {high:.3f})  {each}  {seconds:.0f} s", flush=True)
                    print(f"{n:3} {arm:16} {beside(model, tokenizer, asked, copied, plan)}", flush=True)
                    if given.served:
                        files_of[arm] = Path(folder) / f"{arm}.gguf"
                        parity = export_gguf(copy.deepcopy(model).float(), tokenizer, plan, files_of[arm])
                        print(f"{n:3} {arm:16} diverges in llama.cpp by {parity.divergence:.1g} nats", flush=True)
            if given.served:
                in_llama_cpp(files_of, test[0].tolist() + test[1].tolist())


def beside(model, tokenizer, tasks: dict[str, list], copied: list[Request], plan: DropPlan) -> str:
    """Choices that are right, the calibration error of all of them, and what is copied, each with its 95 % interval."""
    found = [score_choices(model, tokenizer, members, [plan], DOCUMENTS) for members in tasks.values()]
    measures = choices_drawn(*(np.hstack([getattr(each, of) for each in found]).T for of in ("confidence", "right")))
    scores = score(model, copied, [plan])
    measures["copied"] = shares_drawn((scores.hits / scores.length).T, seed=20)
    rows = {name: drawn.row(0) for name, drawn in measures.items()}
    return "  ".join(f"{name} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for name, row in rows.items())


def text_for_healing(corpus: str, tokenizer, n: int) -> torch.Tensor:
    """n samples of a corpus: all but the test, those that layers were chosen on at last, and from the start again."""
    text = load_tokens(corpus, tokenizer, SHORTEST.get(corpus, CHOSEN_ON + TEST + n), LENGTH)
    text = torch.cat([text[CHOSEN_ON + TEST :], text[:CHOSEN_ON]])
    return text.repeat(-(-n // len(text)), 1)[:n]


def in_llama_cpp(files_of: dict[str, Path], tokens: list[int]) -> None:
    """Prints, for each file, ratios of times to those of the first, paired by turn: the median, the least and the most."""
    with contextlib.ExitStack() as opened:
        served = [opened.enter_context(LlamaCpp(path, n_context=LENGTH + STEPS)) for path in files_of.values()]
        seconds = in_turns(served, tokens, [LENGTH], STEPS, TURNS)
    for arm, of_arm in zip(files_of, seconds, strict=True):
        for what, taken in of_arm.items():
            ratios = np.array(seconds[0][what]) / taken
            print(
                f"    {arm:16} {what}: {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f}) times as fast",
                flush=True,
            )


if __name__ == "__main__":
    main()
