"""The processes of `accelerate launch`, if there are several: each has the whole model, and a share of each batch."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch

from ..base.errors import LLMDropError

T = TypeVar("T")


def n_processes() -> int:
    """1 outside of `accelerate launch`; as accelerate counts them."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return n_processes() == 1 or int(os.environ["RANK"]) == 0


def own_device() -> torch.device | None:
    """Where this process of several computes; None for one alone."""
    return _state().device if n_processes() > 1 else None


def share_of(batch_size: int) -> int:
    """How many samples of a batch each process reads. Raises LLMDropError if shares would differ."""
    if batch_size % n_processes():
        what = f"A batch of {batch_size} samples cannot be shared equally by {n_processes()} processes"
        raise LLMDropError(f"{what}. Set a batch size that is a multiple of {n_processes()}.")
    return batch_size // n_processes()


def agree(value: object) -> bool:
    """Whether all processes have the same value; each calls it, and is told the same."""
    if n_processes() == 1:
        return True
    _state()
    values: list = [None] * n_processes()
    torch.distributed.all_gather_object(values, value)
    return all(each == value for each in values)


def once(work: Callable[[], T]) -> T:
    """What the work returns, or raises, in the first process, which alone does it. The others wait for it."""
    if n_processes() == 1:
        return work()
    device = _state().device
    done: list = [None]
    if is_first():
        try:
            done = [(work(), None)]
        except Exception as error:
            done = [(None, error)]
    torch.distributed.broadcast_object_list(done, device=device)  # accelerate's own passes nothing between CPUs
    ((result, raised),) = done
    if raised is not None:
        raise raised
    return result


def _state():
    """Makes the processes find each other, unless they have."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
