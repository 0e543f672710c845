"""The formulas of the optimizers give the numbers of torch's and Pyro's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyro_vi.compiling.update import Update, has_formula, make_state, update_of
from pyro_vi.optimizers import OneOptimizer

MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": partial(SGD, lr=0.1),
    "SGD, decay, maximize": partial(SGD, lr=0.1, weight_decay=0.3, maximize=True),
    "SGD, momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.4, weight_decay=0.3),
    "SGD, Nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": partial(Adam, lr=0.1),
    "Adam, betas, eps": partial(Adam, lr=0.1, betas=(0.5, 0.8), eps=1e-3),
    "Adam, amsgrad": partial(Adam, lr=0.1, amsgrad=True, betas=(0.5, 0.6)),
    "Adam, decay, maximize": partial(Adam, lr=0.1, maximize=True, weight_decay=0.3),
    "AdamW": partial(AdamW, lr=0.1, weight_decay=0.3),
    "AdamW, amsgrad": partial(AdamW, lr=0.1, amsgrad=True, maximize=True),
    "ClippedAdam": partial(ClippedAdam, lr=0.1, clip_norm=0.7),
    "ClippedAdam, decay": partial(ClippedAdam, lr=0.1, lrd=0.8, weight_decay=0.3),
    "ClippedAdam, centred": partial(ClippedAdam, lr=0.1, centered_variance=True),
}


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (), (3,), (2, 2)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def give(params: list[Tensor], step: int, *, but: int | None = None) -> None:
    """Gives parameters the gradients of a step, but for one of them."""
    generator = torch.Generator().manual_seed(step + 1)
    for i, p in enumerate(params):
        gradient = (1 + step) * torch.randn(p.shape, generator=generator)
        p.grad = None if i == but else gradient


def left(params: list[Tensor], optimizer: Optimizer) -> list[Tensor]:
    """The parameters, and the optimizer's state."""
    every = [value for state in optimizer.state.values() for value in state.values()]
    return [*params, *(torch.as_tensor(one).double() for one in every if one is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def known(optimizer: Optimizer) -> OneOptimizer:
    """A Pyro optimizer that has this one."""
    one = OneOptimizer(lambda params: optimizer)
    one.torch_optimizer = optimizer
    return one


@pytest.mark.parametrize("given", [False, True], ids=["by Python", "by a tensor"])
@pytest.mark.parametrize("name", MAKE)
def test_formulas_are_the_optimizers(name: str, given: bool) -> None:
    mine, theirs = parameters(), parameters()
    ours, optimizer = MAKE[name](mine), MAKE[name](theirs)
    for step in range(7):
        give(mine, step)
        give(theirs, step)
        make_state(ours)
        update = Update([ours], mine, {})
        numbers = torch.from_numpy(update.numbers()[0]) if given else None
        update.apply(numbers)
        update.advance(1)
        optimizer.step()
        assert_same(left(mine, ours), left(theirs, optimizer))
        if name.startswith("SGD"):
            assert given or all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("name", ["Adam", "AdamW, amsgrad", "SGD, momentum", "ClippedAdam, decay"])
def test_numbers_of_many_steps_are_those_of_one_after_the_other(name: str) -> None:
    mine, theirs = parameters(), parameters()
    ours, optimizer = MAKE[name](mine), MAKE[name](theirs)
    for params, one in ((mine, ours), (theirs, optimizer)):
        give(params, 0)
        one.step()
    update = update_of(known(ours), mine)
    assert update is not None
    counts, ahead = update.counts(), update.numbers(5)
    for step in range(5):
        assert (update.numbers()[0] == ahead[step]).all()
        give(mine, step)
        give(theirs, step)
        update.apply(torch.from_numpy(ahead[step]))
        update.advance(1)
        optimizer.step()
    assert_same(left(mine, ours), left(theirs, optimizer))
    assert ours.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    update.set_counts(counts)  # of what a tensor does not count
    assert name != "ClippedAdam, decay" or (update.numbers(5) == ahead).all()


def test_groups_have_numbers_of_their_own() -> None:
    """By rates, and by how many steps they have taken."""
    mine, theirs = parameters(), parameters()
    made = []
    for params in (mine, theirs):
        groups = [{"params": params[:1], "lr": 0.3}, {"params": params[1:]}]
        made.append(Adam(groups, lr=0.1, betas=(0.5, 0.9)))
    for step in range(6):
        but = 2 if step == 0 else None  # the last one is a step behind
        give(mine, step, but=but)
        give(theirs, step, but=but)
        made[1].step()
        make_state(made[0])
        update = Update([made[0]], [p for p in mine if p.grad is not None], {})
        update.apply(torch.from_numpy(update.numbers()[0]))
        assert_same(left(mine, made[0]), left(theirs, made[1]))
    assert update.rates() == [0.3, 0.1, 0.1]


@pytest.mark.parametrize("name", MAKE)
def test_one_optimizer_takes_torchs_steps(name: str) -> None:
    """With a norm to clip at, and a schedule or a parameter that comes later."""
    mine, theirs = parameters(), parameters()
    late = 2 if name == "Adam" else 0  # steps without the last parameter
    schedule = None if late else partial(ExponentialLR, gamma=0.8)
    optim = OneOptimizer(MAKE[name], schedule=schedule, clip_norm=2.0)
    optimizer = MAKE[name](theirs[:2] if late else theirs)
    scheduler = schedule(optimizer) if schedule is not None else None
    for step in range(6):
        if late and step == late:
            optimizer.add_param_group({"params": theirs[2:]})
        used = slice(2 if step < late else 3)
        give(mine, step)
        give(theirs, step)
        optim(mine[used])
        torch.nn.utils.clip_grad_norm_(theirs[used], 2.0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        assert optim.torch_optimizer is not None
        assert_same(left(mine, optim.torch_optimizer), left(theirs, optimizer))
        optim.set_state(optim.get_state())


def test_a_parameter_without_a_gradient_stays() -> None:
    params = parameters()
    optimizer = Adam(params, lr=0.1)
    give(params, 0, but=1)
    optimizer.step()
    before = params[1].detach().clone()
    update = update_of(known(optimizer), params)
    assert update is not None and len(update.state) == 6
    give(params, 1)
    update.apply()
    assert torch.equal(params[1].detach(), before)


class Own(Adam):
    """A class of a user's."""


def hooked() -> Optimizer:
    optimizer = Adam(parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *args: None)
    return optimizer


UNKNOWN: dict[str, Callable[[], Any]] = {
    "another kind": lambda: torch.optim.RMSprop(parameters()),
    "a class of one's own": lambda: Own(parameters()),
    "a hook": hooked,
    "a rate that is a tensor": lambda: Adam(parameters(), lr=torch.tensor(0.1), foreach=False),
    "differentiable": lambda: SGD(parameters(), lr=0.1, differentiable=True),
    "complex": lambda: Adam([torch.tensor(1j).requires_grad_()], lr=0.1),
    "fused": lambda: Adam(parameters(), lr=0.1, fused=True),
    "no optimizer": lambda: None,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_formula(name: str) -> None:
    assert has_formula(Adam(parameters(), lr=0.1))
    assert not has_formula(UNKNOWN[name]())


def test_hooks_of_all_optimizers_have_none() -> None:
    handle = register_optimizer_step_post_hook(lambda *args: None)
    assert not has_formula(Adam(parameters(), lr=0.1))
    handle.remove()
    assert has_formula(Adam(parameters(), lr=0.1))


class Halved(pyro.optim.PyroOptim):
    """Does something else before its step."""

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        for p in params:
            p.grad.mul_(0.5)
        super().__call__(params, *args, **kwargs)


def test_pyros_optimizers_are_looked_behind() -> None:
    params = parameters()
    pyro.get_param_store()._param_to_name.update({p: f"p{i}" for i, p in enumerate(params)})
    scheduled = {"optimizer": Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    for optim, is_known in (
        (pyro.optim.Adam({"lr": 0.1}), True),
        (pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}), True),
        (pyro.optim.ExponentialLR(scheduled), True),
        (pyro.optim.RMSprop({"lr": 0.1}), False),
        (Halved(Adam, {"lr": 0.1}), False),
    ):
        give(params, 0)
        optim(params)
        update = update_of(optim, params)
        assert (update is not None) == is_known
        assert update is None or len(update.optimizers) == len(params)


def test_a_process_does_not_import_torchs_compiler() -> None:
    script = (
        "import sys, torch; from functools import partial;"
        "from pyro_vi.optimizers import OneOptimizer;"
        "p = torch.zeros(2, requires_grad=True); p.grad = torch.ones(2);"
        "OneOptimizer(partial(torch.optim.Adam, lr=0.1))([p]);"
        "assert abs(float(p[0]) + 0.1) < 1e-6, p;"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
