"""Repair: the weights that a drop plan keeps are refitted, in closed form, to do without what is dropped.

Nothing is trained, and the model keeps its shape, so inference costs what it costs without a repair. Dense and dropped model
read the same text, layer by layer, and each kept linear map W is moved by a ridge regression over all tokens:

- A map that reads the normed stream (queries, keys and values; gate and up) reads x where the dense model reads z. With
  z ~ x + x S, it becomes W' = W (I + S'): it gives what it gives in the dense model as far as x tells.
- An output projection, which adds to the stream, is to bring the stream to where the dense model's is when the next kept
  sub-layer reads it, so past what is dropped in between. With x its input and e what lacks then, e ~ x S and W' = W + S'.

Layers go front to back, and each is fitted with those before it repaired. The ridge is chosen for each map by the tokens that
were held out from its fit, and a map that explains nothing of these stays as it is.

Kin: NBL (a linear map in the dropped place, arXiv:2505.21077), ReplaceMe (one map for a run of blocks, folded into an MLP,
arXiv:2505.02819), GRAIL (the same regression for narrower layers).
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from ..base.checks import as_number, seed_of, whole
from ..base.errors import LLMDropError
from ..dropping.plan import DropPlan, check_plan
from ..measure.guard import evaluating, tokens_for
from ..models.families import find_anatomy
from .model import check_whole, recipe_of
from .moments import NotFiniteError
from .offloading import copied, hooks_of, put_back, resident
from .refitting import Refitted, Repairing, read_apart
from .sites import check_changeable
from .spooled import Spooled
from .streams import read_streams

VERSION = 1  # raise when a change alters the weights that come out, but for rounding: it is a part of the recipe


@dataclasses.dataclass(frozen=True)
class Repair:
    """How weights are refitted. Raises LLMDropError for what is no such setting.

    ridges: tried for each map, as shares of the mean square of its inputs.
    held_out: one sample of so many is not fitted on, but tells which ridge serves new text.
    sweeps: how often all layers are gone through; a further one begins with the weights of the last.
    seed: of the samples that are held out.
    """

    ridges: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    held_out: int = 8
    sweeps: int = 1
    seed: int = 0

    def __post_init__(self):
        ridges = self.ridges if isinstance(self.ridges, tuple | list) else (self.ridges,)
        if not ridges or not all(0 <= as_number(ridge) < math.inf for ridge in ridges):
            raise LLMDropError(f"The ridges must be numbers from 0 up, such as (0.01, 0.1), but are {self.ridges!r}.")
        object.__setattr__(self, "ridges", tuple(map(as_number, ridges)))
        object.__setattr__(self, "held_out", whole(self.held_out, "One held-out sample of so many", at_least=2))
        object.__setattr__(self, "sweeps", whole(self.sweeps, "The number of sweeps"))
        object.__setattr__(self, "seed", seed_of(self.seed))


def describe_repair(model: nn.Module, tokens: torch.LongTensor, plan: DropPlan, settings: Repair) -> dict:
    """All that determines what `repair` makes of all layers of a base that is its own reference, as plain JSON: the recipe for
    `save_derived`.

    Other layers, or a reference, are not in it; add them: describe_repair(...) | {"layers": [3, 4], "reference": "sha256:..."}.
    """
    how = dataclasses.asdict(settings) | {"ridges": [*settings.ridges]}
    return recipe_of("ridge", VERSION, model, tokens_for(model, tokens), plan, **how)


def repair(
    model: nn.Module,
    tokens: torch.LongTensor,
    plan: DropPlan,
    settings: Repair = Repair(),
    batch_size: int = 4,
    reference: nn.Module | None = None,
    layers: Sequence[int] | None = None,
    on_layer: Callable[[int], None] = lambda index: None,
) -> list[Refitted]:
    """Refit, in place, the linear maps of the attention and MLPs that a plan keeps. Measure the result under the same plan.

    Layers before the first one that the plan changes stay as they are, and so do embeddings, norms, biases, LM head, routers,
    and experts whose weights are one tensor for all of them. What is dropped keeps the base's weights.

    Parameters
    ----------
    model: the whole model, of any dtype, on any device or several, or offloaded by accelerate; not quantised.
    tokens: LongTensor (n_samples, seq_len): at least as many tokens as the widest map has inputs, better a hundred times as
        many, of all kinds of text that the model is to serve. A repair that is fitted on web text helps little elsewhere.
    plan: what is dropped.
    batch_size: samples per forward pass.
    reference: the model that is to be matched, of the same family and sizes, which reads the text by itself; it is left as it
        is. None: `model` as it is now.
    layers: indices of the only ones to refit; None: all from the one on that comes before the first dropped sub-layer.
    on_layer: called after each layer of each sweep with its index.

    Memory: a copy of the layers from the first dropped one on, what the first layer reads of all tokens, and the sums of one
    map. What else is read of all tokens waits in a temporary file (spooled.py), or on a GPU beside the model: up to six times
    the stream and once what the widest map reads, in the model's dtype (1.3 GB for 256 samples of 512 tokens, 576 and 1,536
    wide, in bfloat16). Of an offloaded model one layer at a time is where it computes, with its copy and copies of those
    that follow up to the next sub-layer that is kept; meanwhile CPU memory holds all layers from the first dropped one on
    twice, afterwards once. None of the model's files is written to. Time: about three forward passes over the tokens, and
    n (n + 2 m) operations a token for the sums of each map of n inputs and m outputs.

    Returns what was fitted, in order. Raises LLMDropError for wrong input, too few tokens, statistics that are singular or not
    finite, and a full disk. After any error or interruption the model is bit for bit as it was.
    """
    if not isinstance(settings, Repair):
        raise LLMDropError(f"Expected settings, found {settings!r}. Make them: Repair(ridges=(0.01, 0.1)).")
    anatomy, tokens = check_plan(model, plan), tokens_for(model, tokens)
    batch_size = whole(batch_size, "The batch size")
    if len(tokens) < 2:
        raise LLMDropError("A repair takes 2 samples at least: one to fit on, and one that is held out. Give more samples.")
    if {*range(len(anatomy))} <= {*plan.attention} & {*plan.mlp}:
        raise LLMDropError("Nothing is kept that could be refitted. Use a plan that drops less.")
    if reference is model:  # it is about to change
        reference = None
    if reference is None:
        check_whole(anatomy)
    else:
        _check_alike(model, reference)
    first = 0 if reference is not None else _first_changed(model, plan)
    chosen = [index for index in _indices(layers, len(anatomy)) if index >= first]
    for index in chosen:
        check_changeable(anatomy.layers[index].block, index, may_be_offloaded=True)
    blocks = [layer.block for layer in anatomy.layers]
    originals = _Originals(blocks, first, plan if reference is None else DropPlan())  # of which nothing is read ahead
    wanted = originals if reference is None else [layer.block for layer in find_anatomy(reference).layers]
    try:
        with evaluating(model), contextlib.nullcontext() if reference is None else evaluating(reference):
            read = functools.partial(
                read_apart, batch_size=batch_size, one_of=settings.held_out, seed=settings.seed, to_the_end=False
            )
            streams, calls, apart = read(model, tokens)
            of_reference, theirs, _ = (streams, calls, apart) if reference is None else read(reference, tokens)
            if [*map(len, streams)] != [*map(len, of_reference)]:
                raise torch.OutOfMemoryError("batches of one of the two models alone were halved")
            batches = Spooled if all(stream.is_cpu for stream in (*streams, *of_reference)) else list
            work, found = Repairing(model, plan, settings.ridges, wanted, apart, calls, theirs, batches), list[Refitted]()
            for sweep in range(settings.sweeps):
                dense, dropped = batches(of_reference), batches(streams)
                if sweep + 1 == settings.sweeps:  # what is read no more takes no memory
                    of_reference.clear()
                    streams.clear()
                for index in range(max(chosen, default=-1) + 1):
                    with originals.kept(index), resident(blocks[index]), resident(wanted[index]):
                        if index in chosen:
                            found += work.refit(index, dense, dropped)
                            on_layer(index)
                        else:
                            work.go_on(index, dense, dropped)
                if not all(bool(stream.isfinite().all()) for stream in dense):
                    raise NotFiniteError("The model gives numbers that are not finite. Load it in bfloat16 or float32.")
            return found
    except BaseException as error:
        originals.restore()
        if isinstance(error, NotFiniteError):
            read_streams(model, tokens, batch_size)  # if it is the model itself that gives such numbers, this says where
        if isinstance(error, torch.OutOfMemoryError):
            what = f"{len(tokens)} samples of {tokens.shape[1]} tokens in batches of {batch_size}"
            raise LLMDropError(f"Out of GPU memory with {what}. Give fewer samples, or a smaller batch.") from error
        raise


class _Originals(Sequence[nn.Module]):
    """The layers as they were. Those from the first that may change are copies, made before they are read."""

    def __init__(self, blocks: Sequence[nn.Module], first: int, plan: DropPlan):
        self.blocks, self.first, self.plan, self.copies = blocks, first, plan, dict[int, nn.Module]()

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index):
        return self.blocks[index] if index < self.first else self.copies[index]

    @contextlib.contextmanager
    def kept(self, index: int) -> Iterator[None]:
        """Inside, a layer may change. Copies of those that are offloaded compute where they do, and are then in CPU memory."""
        ahead = [index]  # what a fit of this layer reads: those that follow are read up to the next sub-layer that is kept
        while ahead[-1] + 1 < len(self) and ahead[-1] + 1 in self.plan.attention:
            ahead.append(ahead[-1] + 1)
            if ahead[-1] not in self.plan.mlp:
                break
        offloaded = []
        for each in (each for each in ahead if each >= self.first):
            hooks = hooks_of(self.blocks[each])
            if each not in self.copies:
                with resident(self.blocks[each]):
                    self.copies[each] = copied(self.blocks[each])
            if hooks:
                offloaded.append(self.copies[each].to(hooks[0][1].execution_device))
        try:
            yield
        finally:
            for copy in offloaded:
                copy.to("cpu")

    def restore(self) -> None:
        for index, original in self.copies.items():
            put_back(self.blocks[index], original)


# ---- where a repair begins ----------------------------------------------------------------------------------------------


def _first_changed(model: nn.Module, plan: DropPlan) -> int:
    """The first layer that something can be refitted in: that of the last sub-layer that is kept before any is dropped."""
    lost = [min(layers) for layers in (plan.attention, plan.mlp) if layers]
    first = min(lost, default=len(find_anatomy(model)))
    return max(0, first - 1)


def _indices(layers: Sequence[int] | None, n_layers: int) -> Sequence[int]:
    if layers is None:
        return range(n_layers)
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise LLMDropError(f"Which layers to refit must be a list of their indices, but is {layers!r}.")
    chosen = sorted({whole(index, "The index of a layer to refit", at_least=0) for index in layers})
    if chosen and chosen[-1] >= n_layers:
        raise LLMDropError(f"There is no layer {chosen[-1]} to refit: this model has {n_layers}, from 0 on.")
    return chosen


def _check_alike(model: nn.Module, reference: nn.Module) -> None:
    find_anatomy(reference)
    shapes = [{name: tuple(p.shape) for name, p in each.named_parameters()} for each in (model, reference)]
    if shapes[0] != shapes[1]:
        raise LLMDropError("The reference is not of the same family and sizes as the model. Give the model it was made from.")
