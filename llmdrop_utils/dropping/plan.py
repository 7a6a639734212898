"""A drop plan: which sub-layers of which model are dropped."""

import dataclasses
import json
import operator
from pathlib import Path

from torch import nn

from ..base.errors import LLMDropError
from ..base.files import write_text
from ..models.families import Anatomy, find_anatomy

FORMAT = "llmdrop drop plan 1"

NAMES = {"attention": "attention", "mlp": "MLP"}


@dataclasses.dataclass(frozen=True)
class DropPlan:
    """Which sub-layers to drop: indices of layers from zero, most droppable first.

    `n_layers` and `model` say which model the plan was made for ('sha256:...' or 'hub:org/name@commit'), `scores` is the
    fingerprint of the scores that it came from; None: unknown. Raises LLMDropError for lists that no model can have.
    """

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    n_layers: int | None = None
    model: str | None = None
    scores: str | None = None

    def __post_init__(self):
        if self.n_layers is not None:
            n_layers = _whole(self.n_layers)
            if n_layers is None or n_layers < 1:
                raise LLMDropError(f"A drop plan's n_layers must be a whole number above 0, but is {self.n_layers!r}.")
            object.__setattr__(self, "n_layers", n_layers)
        for name in ("model", "scores"):
            if not isinstance(getattr(self, name), str | None):
                raise LLMDropError(f"A drop plan's {name} must be text, but is {getattr(self, name)!r}.")
        for kind, name in NAMES.items():
            object.__setattr__(self, kind, _indices(getattr(self, kind), name))
            if self.n_layers is not None:
                _check_range(getattr(self, kind), name, self.n_layers)

    @property
    def n_drop(self) -> int:
        """Number of sub-layers that go."""
        return len(self.attention) + len(self.mlp)

    def save(self, path: Path | str) -> Path:
        """Write the plan to a JSON file, in one step."""
        return write_text(Path(path), json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "DropPlan":
        """The inverse of `save`. Raises LLMDropError if there is no such file or it holds no drop plan."""
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
                raise ValueError(f"it does not say that its format is {FORMAT!r}")
            return cls(**value)
        except FileNotFoundError as error:
            raise LLMDropError(f"There is no drop plan at {path}.") from error
        except (OSError, ValueError, TypeError, RecursionError, LLMDropError) as error:  # a JSON error is a ValueError
            raise LLMDropError(f"{path} is no drop plan that can be read ({error}). Make and save the plan again.") from error


def check_plan(model: nn.Module, plan: DropPlan) -> Anatomy:
    """The model's anatomy. Raises LLMDropError if the plan names layers it lacks or was made for another model."""
    anatomy = find_anatomy(model)
    for kind, name in NAMES.items():
        _check_range(getattr(plan, kind), name, len(anatomy))
    if plan.n_layers not in (None, len(anatomy)):
        raise LLMDropError(
            f"The drop plan was made for a model with {plan.n_layers} layers, but this one has {len(anatomy)}. "
            "Use the model it was made for, or make a plan for this one."
        )
    identity = getattr(model, "llmdrop_identity", None)
    if None not in (plan.model, identity) and plan.model != identity:
        raise LLMDropError(
            f"The drop plan was made for the model {plan.model}, but this one is {identity}. "
            "Use the model it was made for, or make a plan for this one."
        )
    return anatomy


def _whole(value) -> int | None:
    """An int from an int or a NumPy integer; None from anything else, truth values included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _indices(values, name: str) -> tuple[int, ...]:
    try:
        given = tuple(values)
    except TypeError:
        given = (None,)
    indices = tuple(_whole(value) for value in given)
    if None in indices:
        raise LLMDropError(f"The {name} drop list must hold whole numbers, the indices of layers, but is {values!r}.")
    if min(indices, default=0) < 0:
        raise LLMDropError(f"The {name} drop list holds layer {min(indices)}, but layers are counted from 0.")
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice:
        raise LLMDropError(f"The {name} drop list holds layer {twice[0]} more than once. List every layer once.")
    return indices


def _check_range(indices: tuple[int, ...], name: str, n_layers: int) -> None:
    if max(indices, default=0) >= n_layers:
        raise LLMDropError(
            f"The {name} drop list holds layer {max(indices)}, but this model has {n_layers} layers (0-{n_layers - 1})."
        )
