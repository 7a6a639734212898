"""Encoder-decoders: pairs of a source and a target -> what is read, and how well the target is predicted from the source."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ..base.checks import whole
from ..base.errors import LLMDropError
from ..models.families import find_anatomy, input_device
from ..sources.texts import as_tokens
from .guard import NotFinite, as_mask, check_tokens, measuring, normalizer

VERSION = 1  # raise when a change alters what is measured: stored results of older versions are then not used

IGNORED = -100  # in labels: no token, but padding


def prepare_pairs(tokenizer, sources: Sequence[str], targets: Sequence[str]) -> dict[str, torch.Tensor]:
    """What an encoder-decoder reads, from texts: `input_ids` and `attention_mask` (n, S), and `labels` (n, T).

    Texts are padded at their end to the longest, and cut at what the model knows. Labels are -100 where they are padding.
    """
    if len(sources) != len(targets) or not sources:
        raise LLMDropError(f"Each source needs a target: found {len(sources)} sources and {len(targets)} targets.")
    how = {"padding": True, "truncation": True, "return_tensors": "pt", "padding_side": "right"}
    read, target = tokenizer(list(sources), **how), tokenizer(text_target=list(targets), **how)
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)
    return {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "labels": labels}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """n sources of S tokens, and n targets of T tokens, padded at their ends."""

    source: torch.LongTensor  # (n, S)
    source_mask: torch.Tensor  # (n, S), 1 where a token counts
    target: torch.LongTensor  # (n, T): what the decoder reads, the labels moved on by one
    labels: torch.LongTensor  # (n, T): what it predicts, -100 where that is padding

    def __len__(self) -> int:
        return len(self.source)

    @property
    def target_mask(self) -> torch.Tensor:
        """int64 (n, T), 1 where a token is predicted."""
        return (self.labels != IGNORED).long()


def pairs_for(model: nn.Module, given: object) -> Pairs:
    """What an encoder-decoder can read: a mapping with `input_ids`, `labels` and perhaps `attention_mask`.

    Raises LLMDropError for another kind of model, and for anything else: another model's tokens, padding before text, samples
    that are too long, more sources than targets.
    """
    anatomy = find_anatomy(model)
    if anatomy.encoder is None:
        raise LLMDropError(f"This {anatomy.family} model is no encoder-decoder: it predicts no target from a source.")
    if not isinstance(given, Mapping) or not {"input_ids", "labels"} <= set(given):
        raise LLMDropError(
            f"This {anatomy.family} model reads sources and predicts targets. Give what prepare_pairs(tokenizer, sources, "
            'targets) returns: {"input_ids": ..., "attention_mask": ..., "labels": ...}.'
        )
    source, labels = as_tokens(given["input_ids"]), as_tokens(given["labels"])
    mask = given.get("attention_mask")
    mask = torch.ones_like(source) if mask is None else as_mask(mask, source).to("cpu", torch.long).ne(0).long()
    if len(source) != len(labels):
        raise LLMDropError(f"Each source needs a target: found {len(source)} sources and {len(labels)} targets.")
    counts = labels != IGNORED
    for what, counted in (("source", mask.bool()), ("target", counts)):
        if bool((counted[:, 1:] > counted[:, :-1]).any()) or not bool(counted[:, 0].all()):
            raise LLMDropError(f"Each {what} must begin with a token that counts, and be padded at its end alone.")
    target = _moved_on(model, labels)
    for tokens in (source, labels.where(counts, 0), target):
        check_tokens(tokens, anatomy.decoder.config)
    return Pairs(source, mask, target, labels)


def _moved_on(model: nn.Module, labels: torch.LongTensor) -> torch.LongTensor:
    """What the decoder reads to predict these labels, (n, T): one token earlier, after the model's first token."""
    config, shift = model.config, getattr(model, "prepare_decoder_input_ids_from_labels", None)
    try:
        if shift is not None:  # some begin with the language of the target
            return shift(labels)
        first = labels.new_full((len(labels), 1), config.decoder_start_token_id)
        moved = torch.cat([first, labels[:, :-1]], 1)
        return moved.where(moved != IGNORED, config.pad_token_id)
    except (TypeError, ValueError) as error:
        raise LLMDropError(
            f"This {config.model_type} model does not say with which token a target begins, or which stands for padding: set "
            "decoder_start_token_id and pad_token_id in its config.json."
        ) from error


@dataclasses.dataclass(frozen=True)
class TargetScores:
    """How well targets are predicted from their sources."""

    nll: np.ndarray  # float64 (n_samples,): mean negative log-probability per target token, in nats
    tokens: np.ndarray  # int64 (n_samples,): how many target tokens there are

    @property
    def perplexity(self) -> float:
        """exp of the mean over all target tokens."""
        return float(np.exp(np.average(self.nll, weights=self.tokens)))


def score_targets(model: nn.Module, given: object, batch_size: int = 8) -> TargetScores:
    """Predict each token of a target from its source and the tokens before it, by the model as it is (inside `dropped`, by the
    dropped one).

    given: from `prepare_pairs`. Raises LLMDropError for wrong input, and for a model that gives no distribution.
    """
    pairs, batch_size, device = pairs_for(model, given), whole(batch_size, "The batch size"), input_device(model)
    nll = np.zeros(len(pairs))
    with measuring(model):
        for start in range(0, len(pairs), batch_size):
            rows = slice(start, start + batch_size)
            output = model(
                input_ids=pairs.source[rows].to(device),
                attention_mask=pairs.source_mask[rows].to(device),
                decoder_input_ids=pairs.target[rows].to(device),
                use_cache=False,
            )
            if (logits := output.get("logits")) is None:
                raise LLMDropError(
                    f"This {model.config.model_type} model has no LM head. `load_encoder_decoder` loads it whole."
                )
            nll[rows] = _nll(logits, pairs.labels[rows].to(logits.device))
    return TargetScores(nll, pairs.target_mask.sum(1).numpy())


def _nll(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Mean over the labels of each sample: logits (n, T, vocabulary), labels (n, T) -> float64 (n,)."""
    counts = labels != IGNORED
    wide = logits[counts].to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    try:
        found = (normalizer(wide) - wide.gather(1, labels[counts][:, None]))[:, 0].double()
    except NotFinite:
        found = torch.full((1,), torch.inf)
    if not bool(found.isfinite().all()):
        raise LLMDropError(
            f"Some target tokens have no finite probability in {logits.dtype}. Load the model in bfloat16 or float32 (float16 "
            "overflows in some models); if it stays so, its weights are damaged, or the text was made by another tokenizer."
        )
    sums = torch.zeros(counts.shape, dtype=torch.float64, device=found.device).masked_scatter(counts, found).sum(1)
    return (sums / counts.sum(1)).cpu().numpy()
