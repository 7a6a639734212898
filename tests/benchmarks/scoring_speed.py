"""How much faster scoring is than stock lm-eval, and a drop curve than its plans one by one: paired, on this machine.

    .venv/bin/python tests/benchmarks/scoring_speed.py [model] [--dtype float32]

Prints ratios of times (medians of pairs), and how far both are from log-likelihoods in float64. A model with random weights
(random:llama-3-8b) reads with the tokenizer of SmolLM2-135M.
"""

import argparse
import copy
import time

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from llmdrop_utils import DropPlan, load_model, load_tokens, locate_model, measure_importance, select
from llmdrop_utils.measure.tasks import FastLM
from llmdrop_utils.measure.text import score_text
from llmdrop_utils.models.load import load_tokenizer
from llmdrop_utils.sources.task_data import FEWSHOT_SEED, load_task

BOUNDS = {"hellaswag": 4.0, "mmlu_anatomy": 5.0, "curve": 1.5}
PAIRS = 5


def instances(name: str, num_fewshot: int, limit: int) -> list:
    group = name.partition("_")[0]
    (task,) = [task for task in load_task(group, num_fewshot) if task.task_name == name]
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task.instances


def seconds(function) -> tuple[float, object]:
    started = time.perf_counter()
    value = function()
    return time.perf_counter() - started, value


def against_lm_eval(model, tokenizer, name: str, num_fewshot: int, limit: int) -> float:
    """Ratio to lm-eval's `hf` model as it comes (one request at a time); the one to its batches of 8 is printed too."""
    requests = instances(name, num_fewshot, limit)
    stock = {size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in (1, 8)}
    fast = FastLM(model, tokenizer)
    fast.loglikelihood(requests[:40], disable_tqdm=True)  # warm-up
    ratios: dict[int, list[float]] = {1: [], 8: []}
    for _ in range(PAIRS):
        fast_s, ours = seconds(lambda: fast.loglikelihood(requests, disable_tqdm=True))
        for size, lm in stock.items():
            stock_s, theirs = seconds(lambda lm=lm: lm.loglikelihood(requests, disable_tqdm=True))
            ratios[size].append(stock_s / fast_s)
            print(f"{name}, {num_fewshot}-shot, {len(requests)} requests: lm-eval in batches of {size} {stock_s:.1f} s, "
                  f"here {fast_s:.1f} s, {stock_s / fast_s:.2f} x", flush=True)  # fmt: skip
    worst = sorted(range(len(requests)), key=lambda i: -abs(ours[i][0] - theirs[i][0]))[:8]
    exact = HFLM(pretrained=copy.deepcopy(model).double(), tokenizer=tokenizer, batch_size=1)
    truth = exact.loglikelihood([requests[i] for i in worst], disable_tqdm=True)
    off = lambda values: max(abs(values[i][0] - t) for i, (t, _) in zip(worst, truth, strict=True))  # noqa: E731
    print(f"{name}: where both differ most, float64 is {off(ours):.1e} from here and {off(theirs):.1e} from lm-eval")
    return float(np.median(ratios[1]))


def curve(model, tokenizer) -> float:
    tokens = load_tokens("web", tokenizer, 10, 512)
    scores = measure_importance(model, tokens[:8], batch_size=4)
    plans = [DropPlan()] + [select(scores, kind, n) for kind in ("attention", "mlp", "block") for n in range(1, 9)]
    ratios = []
    for _ in range(PAIRS):
        together_s, together = seconds(lambda: score_text(model, tokens[8:], plans))
        alone_s, alone = seconds(lambda: [score_text(model, tokens[8:], [plan]).nll[0] for plan in plans])
        ratios.append(alone_s / together_s)
        difference = np.abs(together.nll - np.array(alone)).max()
        print(f"curve of {len(plans)} plans: one by one {alone_s:.1f} s, together {together_s:.1f} s, {ratios[-1]:.2f} x; "
              f"largest difference {difference:.1e} nats a token", flush=True)  # fmt: skip
    return float(np.median(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what this machine is fast in")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model, tokenizer = load_model(options.model, dtype)
    tokenizer = tokenizer or load_tokenizer(locate_model("smollm2-135m"))
    print(f"{model.dtype}, {model.device}, {torch.get_num_threads()} threads")
    found = {
        "hellaswag": against_lm_eval(model, tokenizer, "hellaswag", 0, 100),
        "mmlu_anatomy": against_lm_eval(model, tokenizer, "mmlu_anatomy", 5, 40),
        "curve": curve(model, tokenizer),
    }
    for name, ratio in found.items():
        print(f"{name}: {ratio:.2f} x (bound {BOUNDS[name]}) {'ok' if ratio >= BOUNDS[name] else 'BELOW'}")


if __name__ == "__main__":
    main()
