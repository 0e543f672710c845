"""The formulas of the optimizers give torch's numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch.optim import SGD, Adam, AdamW, Optimizer

from pyro_vi.compiling.update import Update, has_formula, make_state
from pyro_vi.optimizers import OneOptimizer

OPTIMIZERS = {
    "Adam": partial(Adam, lr=0.1),
    "Adam, amsgrad": partial(Adam, lr=0.1, amsgrad=True, betas=(0.8, 0.9), eps=1e-3),
    "Adam, decay": partial(Adam, lr=0.1, weight_decay=0.1, maximize=True),
    "AdamW": partial(AdamW, lr=0.1, weight_decay=0.2),
    "SGD": partial(SGD, lr=0.1),
    "SGD, momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "SGD, nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
}


def parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in ((3,), (2, 2), ())]


def gradients(found: list[torch.Tensor]) -> None:
    for p in found:
        p.grad = torch.randn_like(p)


def state(optimizer: Optimizer) -> list[Any]:
    return list(optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_optimizer_takes_torchs_steps(name: str, double: None) -> None:
    theirs, ours = parameters(), parameters()
    optimizer, one = OPTIMIZERS[name](theirs), OneOptimizer(OPTIMIZERS[name])
    for step in range(5):
        torch.manual_seed(step)
        gradients(theirs)
        for p, q in zip(theirs, ours, strict=True):
            q.grad = p.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        one(ours)
    assert one.torch_optimizer is not None
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(state(optimizer), state(one.torch_optimizer), rtol=1e-14, atol=0)


def test_parameters_without_gradients_stay(double: None) -> None:
    first, second = parameters()[:2]
    one = OneOptimizer(partial(Adam, lr=0.1))
    before = second.detach().clone()
    gradients([first])
    one([first, second])
    assert torch.equal(second, before)
    gradients([first, second])
    one([first, second])
    assert not torch.equal(second, before)
    assert one.torch_optimizer is not None
    assert [float(one.torch_optimizer.state[p]["step"]) for p in (first, second)] == [2, 1]


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_clipped_adam_is_pyros(decay: float, double: None) -> None:
    theirs, ours = parameters(), parameters()
    make = partial(ClippedAdam, lr=0.1, clip_norm=0.5, lrd=decay, weight_decay=0.1)
    optimizer, other = make(theirs), make(ours)
    for step in range(5):
        torch.manual_seed(step)
        gradients(theirs)
        for p, q in zip(theirs, ours, strict=True):
            q.grad = p.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        make_state(other)
        update = Update([other], ours, {})
        update.apply()
        update.advance(1)
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_numbers_of_several_steps_are_those_of_each(double: None) -> None:
    found = parameters()
    optimizer = ClippedAdam(found, lr=0.1, lrd=0.97)
    gradients(found)
    make_state(optimizer)
    update = Update([optimizer], found, {})
    ahead = update.numbers(7)
    for step in range(7):
        assert [row[0] for row in update.numbers()] == [row[step] for row in ahead]
        update.advance(1)


def test_optimizers_that_are_no_formula() -> None:
    found = parameters()
    assert has_formula(Adam(found))
    assert not has_formula(torch.optim.RMSprop(found))
    assert not has_formula(Adam(found, lr=torch.tensor(0.1)))
    hooked = Adam(found)
    hooked.register_step_post_hook(lambda *args: None)
    assert not has_formula(hooked)


def test_a_process_does_not_import_torchs_compiler() -> None:
    import subprocess
    import sys

    script = (
        "import sys, torch; from functools import partial;"
        "from pyro_vi.optimizers import OneOptimizer;"
        "p = torch.zeros(2, requires_grad=True); p.grad = torch.ones(2);"
        "OneOptimizer(partial(torch.optim.Adam, lr=0.1))([p]);"
        "assert abs(float(p[0]) + 0.1) < 1e-6, p;"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
