"""What the tests of changed weights share: a model of their own, all that it is, and a caller that stops the work."""

import copy
import functools
import random

import families
import numpy as np
import torch


@functools.cache
def pristine(name):
    return families.tiny(name)


def fresh(name="llama", dtype=torch.float32):
    """A model of its own, with the same weights each time."""
    return copy.deepcopy(pristine(name)).to(dtype)


def state(model):
    """All that a model is: each module, its mode and its attributes; its configuration; each parameter, and which it is."""
    parameters = {name: (p.detach().clone(), p.dtype, p.requires_grad, id(p)) for name, p in model.named_parameters()}
    modules = {name: (id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()}
    return (modules, model.config.to_dict()), parameters


def assert_as_it_was(model, before):
    rest, parameters = state(model)
    assert rest == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (values, *kind) in parameters.items():
        assert torch.equal(values, before[1][name][0]), name
        assert kind == list(before[1][name][1:]), name


def changed(model, base):
    """Names of the parameters that differ in any bit."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, base.get_parameter(name))}


def equal(model, other):
    return not changed(model, other)


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def drawn():
    return float(torch.rand(())), random.random(), np.random.rand()  # noqa: NPY002


class Stop(BaseException):  # as KeyboardInterrupt is
    pass


def stop_at(last):
    def on_step(step, loss):
        if step == last:
            raise Stop

    return on_step
