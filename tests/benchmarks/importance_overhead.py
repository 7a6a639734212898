"""What does measuring importance cost over the bare forward pass? Time as a paired ratio, and peak memory.

    .venv/bin/python tests/benchmarks/importance_overhead.py [model]

SmolLM2-135M on 128 x 512 tokens of the web corpus, batch 4; a model with random weights (random:llama-3-8b) on random tokens.
The bare pass is the same model without LM head. Both run in turn over the same 16 samples, so that a slow phase of the machine
hits both. Memory is what torch allocates beyond the weights at its peak, on one batch.
"""

import argparse
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from llmdrop_utils import load_model, load_tokens, measure_importance

MAX_RATIO, MAX_EXTRA_BATCHES = 1.10, 2.0


def bare(model, tokens, batch_size=4):
    decoder = model.get_decoder()
    with torch.inference_mode():
        for batch in tokens.split(batch_size):
            decoder(input_ids=batch.to(model.device), use_cache=False)


def seconds(function, *arguments):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(function, *arguments):
    """Largest sum of live allocations while the function runs."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*arguments)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function(*arguments)
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=128)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    if tokenizer is None:
        tokens = torch.randint(model.config.vocab_size, (options.samples, 512), generator=torch.Generator().manual_seed(0))
    else:
        tokens = load_tokens("web", tokenizer, n_samples=options.samples, seq_len=512)
    bare(model, tokens[:4])
    measure_importance(model, tokens[:4])

    pairs = []
    for chunk in tokens.split(16):  # several batches a call, as in use: the first of each is checked
        order = (bare, measure_importance) if len(pairs) % 2 else (measure_importance, bare)
        taken = {function: seconds(function, model, chunk) for function in order}
        pairs.append((taken[bare], taken[measure_importance]))
    total = sum(p[1] for p in pairs) / sum(p[0] for p in pairs)
    ratios = sorted(measured / plain for plain, measured in pairs)
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"time: {total:.3f} x the bare pass in all; {len(ratios)} pairs, median {statistics.median(ratios):.3f}, "
          f"middle half {low:.3f} to {high:.3f}; bare {tokens.numel() / sum(p[0] for p in pairs):.0f} tokens/s")  # fmt: skip

    batch = tokens[:4]
    plain, measured = peak_bytes(bare, model, batch), peak_bytes(measure_importance, model, batch)
    hidden = batch.numel() * model.config.hidden_size * model.dtype.itemsize
    extra = (measured - plain) / hidden
    print(f"memory: bare {plain / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB, "
          f"difference {extra:+.2f} batches of hidden states ({hidden / 2**20:.1f} MiB each)")  # fmt: skip
    good = total <= MAX_RATIO and extra < MAX_EXTRA_BATCHES
    print(f"{'within' if good else 'OUTSIDE'} the bounds: {MAX_RATIO} x, {MAX_EXTRA_BATCHES} batches")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
