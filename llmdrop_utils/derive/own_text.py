"""Text that a model writes itself, for its healing where little text of its kind is at hand.

The student of a distillation is then taught where its teacher is itself most at home (self-data distillation, Thangarasa et al.
2024, arXiv:2410.09982). Mix it with text of all kinds: what a model writes is less varied than what it has read.
"""

import torch
from torch import nn

from ..base.checks import seed_of, whole
from ..base.errors import LLMDropError
from ..measure.guard import check_length, evaluating, finite_generation, tokens_for
from ..models.families import find_anatomy, input_device
from .moments import wide


def write_samples(
    model: nn.Module, beginnings: torch.LongTensor, seq_len: int, batch_size: int = 32, seed: int = 0
) -> torch.LongTensor:
    """Samples that go on from these beginnings with tokens drawn from the model's distributions, none of them cut off.

    Parameters
    ----------
    model: any that generates; it is read as it is, so under a plan inside of `dropped` or `skipping`.
    beginnings: LongTensor (n_samples, n), n >= 1, such as the first 16 tokens of samples of the corpora that healing reads.
    seq_len: of the samples, beginnings included. A token that ends a text does not end a sample.
    batch_size: samples that are written at a time.
    seed: of what is drawn. The same samples come out in batches of the same size on the same kind of device.

    Returns LongTensor (n_samples, seq_len) on the CPU. Raises LLMDropError for wrong input, and
    for numbers that are not finite.
    """
    beginnings, batch_size, seed = tokens_for(model, beginnings), whole(batch_size, "The batch size"), seed_of(seed)
    seq_len = whole(seq_len, "The length of a sample")
    if seq_len <= beginnings.shape[1]:
        raise LLMDropError(f"Samples of {seq_len} tokens cannot go on from beginnings of {beginnings.shape[1]}.")
    check_length(seq_len, find_anatomy(model).decoder.config)
    with evaluating(model), finite_generation(model), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        written = [_written(model, batch.to(input_device(model)), seq_len) for batch in beginnings.split(batch_size)]
    return torch.cat(written).cpu()


def _written(model: nn.Module, samples: torch.Tensor, seq_len: int) -> torch.Tensor:
    """transformers' `generate` would add what the checkpoint recommends for chats, and stop at ends of text."""
    read, cache = samples, None
    while samples.shape[1] < seq_len:
        output = model(input_ids=read, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        drawn = torch.multinomial(wide(output.logits[:, -1]).softmax(-1), 1).to(samples.device)
        samples = torch.cat([samples, drawn], 1)
        # Without attention nothing is cached, and some models do not hand out their cache: all is read again.
        read = samples if cache is None else drawn
    return samples
