"""How much faster scoring is than stock lm-eval, and a drop curve than its plans one by one: paired, on this machine.

    .venv/bin/python tests/benchmarks/scoring_speed.py [model]

Prints ratios of times, and the largest difference of log-likelihoods between both.
"""

import sys
import time

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from llmdrop_utils import DropPlan, load_model, load_tokens, measure_importance, select
from llmdrop_utils.evaluation import FEWSHOT_SEED, FastLM, load_task, score_text

BOUNDS = {"hellaswag": 4.0, "mmlu_anatomy": 5.0, "curve": 1.5}


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
    requests = instances(name, num_fewshot, limit)
    stock, fast = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), FastLM(model, tokenizer)
    fast.loglikelihood(requests[:40], disable_tqdm=True)  # warm-up
    ratios, difference = [], 0.0
    for _ in range(2):
        fast_s, ours = seconds(lambda: fast.loglikelihood(requests, disable_tqdm=True))
        stock_s, theirs = seconds(lambda: stock.loglikelihood(requests, disable_tqdm=True))
        ratios.append(stock_s / fast_s)
        difference = max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
        print(f"{name}, {num_fewshot}-shot, {len(requests)} requests: lm-eval {stock_s:.1f} s, here {fast_s:.1f} s, "
              f"{ratios[-1]:.2f} x; largest difference {difference:.1e}", flush=True)  # fmt: skip
    return float(np.median(ratios))


def curve(model, tokenizer) -> float:
    tokens = load_tokens("web", tokenizer, 10, 512)
    scores = measure_importance(model, tokens[:8], batch_size=4)
    plans = [DropPlan()] + [select(scores, kind, n) for kind in ("attention", "mlp", "block") for n in range(1, 9)]
    ratios = []
    for _ in range(2):
        together_s, together = seconds(lambda: score_text(model, tokens[8:], plans))
        alone_s, alone = seconds(lambda: [score_text(model, tokens[8:], [plan]).nll[0] for plan in plans])
        ratios.append(alone_s / together_s)
        difference = np.abs(together.nll - np.array(alone)).max()
        print(f"curve of {len(plans)} plans: one by one {alone_s:.1f} s, together {together_s:.1f} s, {ratios[-1]:.2f} x; "
              f"largest difference {difference:.1e} nats a token", flush=True)  # fmt: skip
    return float(np.median(ratios))


def main() -> None:
    model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
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
