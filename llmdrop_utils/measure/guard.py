"""What every measurement keeps to: eval mode, no gradients, a model that is afterwards as it was, and finite numbers."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..base.errors import LLMDropError
from ..models.families import family_of, find_anatomy, input_device, need_decoder, position_limit, stream_of, tensor_of
from ..sources.texts import as_tokens
from .rotary import RotaryState, rotary_following

# ---- what is measured on ------------------------------------------------------------------------------------------------


def tokens_for(model: nn.Module, given: object) -> torch.LongTensor:
    """Token ids int64 (n_samples, seq_len) that a causal language model can read. Raises LLMDropError otherwise, as `as_tokens`
    does."""
    need_decoder(find_anatomy(model))
    return _tokens_for(model, given)


def _tokens_for(model: nn.Module, given: object) -> torch.LongTensor:
    tokens = as_tokens(given)
    check_tokens(tokens, find_anatomy(model).decoder.config)
    return tokens


def check_tokens(tokens: torch.LongTensor, config) -> None:
    """Raise LLMDropError for token ids that a model of this configuration does not know, and for samples that are too long."""
    check_length(tokens.shape[1], config)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise LLMDropError(
            f"Token ids run from {low} to {high}, but this model knows 0 to {config.vocab_size - 1}: were they made with "
            "another model's tokenizer?"
        )


def check_length(seq_len: int, config) -> None:
    """Raise LLMDropError for samples that are too long for a model of this configuration."""
    longest = position_limit(config)
    if longest is not None and seq_len > longest:
        raise LLMDropError(f"Samples of {seq_len} tokens are too long for this model, which knows {longest} positions.")


def as_mask(given: object, tokens: torch.Tensor) -> torch.Tensor:
    """An attention mask of the shape of the tokens. Raises LLMDropError for anything else, and for samples without a token."""
    try:
        mask = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LLMDropError(f"The attention mask must have the shape of the tokens {tuple(tokens.shape)}: {error}.") from None
    if tokens.is_floating_point():
        raise LLMDropError("Images have no padding: leave the attention mask away.")
    if mask.shape != tokens.shape or not bool(mask.bool().any(1).all()):
        raise LLMDropError(
            f"The attention mask must have the shape of the tokens {tuple(tokens.shape)} and leave at least one token "
            f"in each sample; found {tuple(mask.shape)}."
        )
    return mask


def input_for(model: nn.Module, given: object) -> torch.Tensor:
    """What a model can read, encoders too: token ids int64 (n_samples, seq_len), or for a vision encoder pixels float
    (n_samples, channels, height, width).

    Raises LLMDropError otherwise.
    """
    config = find_anatomy(model).decoder.config
    family = family_of(config)
    if family.takes[0] != "pixel_values":
        return _tokens_for(model, given)
    try:
        pixels = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LLMDropError(f"Expected pixels (n_samples, channels, height, width) of images, found {error}.") from None
    if not pixels.is_floating_point() or pixels.ndim != 4 or not len(pixels) or pixels.shape[1] != config.num_channels:
        raise LLMDropError(
            f"Expected pixels of images, float (n_samples, {config.num_channels}, height, width), as their settings say; found "
            f"{pixels.dtype} {tuple(pixels.shape)}. One image alone is pixels[None]."
        )
    size, known = " x ".join(map(str, pixels.shape[2:])), config.image_size
    known = f"{known} x {known}" if isinstance(known, int) else " x ".join(map(str, known))
    if not family.interpolates and size != known:
        raise LLMDropError(f"Images of {size} pixels cannot be read by this model, which knows {known}.")
    if not bool(pixels.isfinite().all()):
        raise LLMDropError("Some pixels are not finite: correct what reads the images.")
    return pixels


# ---- the model is left as it was ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode (no dropout) and nothing records gradients; afterwards modules have their own modes."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode (no dropout) and nothing records gradients. May be nested.

    Afterwards, errors included, each module is in its own mode again, and rotary embeddings that follow the length of what
    they read are as they were. Raises LLMDropError if any weight was changed or replaced meanwhile; that is told by which
    tensors a model holds (so also by which of them it shares) and by torch's count of changes in place, so it costs nothing.
    """
    rotary = [RotaryState(module) for module in rotary_following(model)]
    before = _tensors(model, rotary)
    try:
        with evaluating(model):
            if rotary:  # what was read before must not matter: one token takes them back to short texts
                find_anatomy(model).decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=input_device(model)))
            yield
    finally:
        for state in rotary:
            state.restore()
    after = _tensors(model, rotary)
    for name in before.keys() | after.keys():
        if not _same(before.get(name), after.get(name)):
            raise LLMDropError(
                f"The weight {name} was changed while the model was measured, so the result is of no known model. "
                "Load the model again, and report what was measured."
            )


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode (no dropout), and gradients are recorded of none of the weights that it has now."""
    modes = [(module, module.training) for module in model.modules()]
    # Weights that were made in inference mode never have gradients, and cannot be told to.
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad and not parameter.is_inference()]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


Held = tuple[torch.Tensor, tuple]


def _tensors(model: nn.Module, rotary: list[RotaryState]) -> dict[str, Held]:
    """Each parameter and buffer, by every name that it has, with what would tell that it was changed."""
    restored = {id(tensor) for state in rotary for tensor, _ in state.buffers.values()}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: (tensor, _marks(tensor)) for name, tensor in named if id(tensor) not in restored}


def _marks(tensor: torch.Tensor) -> tuple:
    version = None if tensor.is_inference() else tensor._version
    # What is dropped leaves a GPU and comes back to another place.
    place = tensor.data_ptr() if tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, nn.Parameter) else None
    return tensor.shape, tensor.dtype, tensor.device, version, place


def _same(before: Held | None, after: Held | None) -> bool:
    if before is None or after is None:
        return False
    if before[0].is_meta and after[0].is_meta:  # offloaded: accelerate makes another one after each forward
        return before[0].shape == after[0].shape
    return before[0] is after[0] and before[1] == after[1]


# ---- numbers are finite -------------------------------------------------------------------------------------------------


class NotFinite(Exception):
    """A next-token distribution that is none: its row among those that were computed together."""

    def __init__(self, row: int):
        super().__init__(row)
        self.row = row


def normalizer(logits: torch.Tensor) -> torch.Tensor:
    """logsumexp of (n, vocabulary) float32 logits, (n, 1). Raises NotFinite if some are NaN or +inf, or all of a row -inf.

    Single logits of -inf are tokens that a model rules out, as some do with unused places of their vocabulary.
    """
    norm = logits.logsumexp(-1, keepdim=True)
    if not bool((finite := norm.isfinite()).all()):
        raise NotFinite(int((~finite).nonzero()[0, 0]))
    return norm


@torch.inference_mode()
def not_finite_error(model: nn.Module, tokens: list[int] | torch.Tensor, under: str = "") -> LLMDropError:
    """The error for numbers that are not finite. Reads `tokens`, one sequence, once more to find where they begin."""
    anatomy = find_anatomy(model)
    found: list[str] = []

    def look(where: str, get):
        def hook(*arguments):
            if not found and not bool(get(*arguments).isfinite().all()):
                found.append(where)

        return hook

    output = lambda module, args, output: tensor_of(output)  # noqa: E731
    handles = []
    try:
        for index, layer in enumerate(anatomy.layers):
            if index == 0:
                read = lambda module, args, kwargs: stream_of(args, kwargs)  # noqa: E731
                handles.append(layer.block.register_forward_pre_hook(look("embedding", read), with_kwargs=True))
            for kind, module in (("attention", layer.attention), ("MLP", layer.mlp), ("block", layer.block)):
                handles.append(module.register_forward_hook(look(f"{kind} of layer {index}", output)))
        anatomy.decoder(input_ids=torch.as_tensor(tokens, device=input_device(model)).reshape(1, -1), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return LLMDropError(
        f"The {found[0] if found else 'LM head'} gives values that are not finite in {dtype}{under}. "
        "Load the model in bfloat16 or float32 (float16 overflows in some models); if it stays so, its weights are damaged."
    )


@contextlib.contextmanager
def finite_generation(model: nn.Module) -> Iterator[None]:
    """Inside, each forward pass of the model refuses a next token that would be chosen from numbers that are not finite."""

    def check(module, args, kwargs, output):
        try:
            normalizer(output.logits[:, -1].float())
        except NotFinite as error:
            tokens, mask = kwargs["input_ids"][error.row], kwargs.get("attention_mask")
            if mask is not None and mask.shape[-1:] == tokens.shape and mask.ndim == 2:
                tokens = tokens[mask[error.row].bool()]
            raise not_finite_error(model, tokens) from None

    handle = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
