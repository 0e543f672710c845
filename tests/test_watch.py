"""What changes after a step was recorded is seen, and what a record could not see is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from steps import (
    adam,
    by_pyro_module,
    run,
)
from torch import Tensor, nn

from pyro_vi.compiled import Recorded
from pyro_vi.svi import SVI

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.usefixtures("recorded_alone")
def test_parameters_that_are_others_are_seen() -> None:
    svi, _, _ = run(pyro.optim.Adam({"lr": 0.05}), True)
    x = torch.tensor([1.0] * 6 + [0.0] * 4)
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match="parameter 'a' is another one"):
        loss = svi.step(x)  # eager, with new parameters
    assert svi._recorder.recorded == [] and isinstance(loss, float)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    for _ in range(20):  # ten times as many as before
        svi.step(x)
    assert len(svi._recorder.recorded) == 1
    assert all(not torch.equal(v, before[n]) for n, v in pyro.get_param_store().items())


CHANGES: dict[str, Callable[[SVI, nn.Module], object]] = {
    "mode": lambda svi, encoder: encoder.eval(),
    "frozen": lambda svi, encoder: encoder.requires_grad_(False),
    "moved": lambda svi, encoder: encoder.float().double(),
    "optimizer": lambda svi, encoder: setattr(svi, "optim", adam()),
    "model": lambda svi, encoder: setattr(svi, "model", poutine.scale(svi.model, scale=2.0)),
}


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")  # says Pyro
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_seen(change: str) -> None:
    torch.manual_seed(0)
    model, guide, loss, args = by_pyro_module()
    encoder = guide.__closure__[0].cell_contents  # type: ignore[attr-defined]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), loss, compile=True)
    for _ in range(4):
        svi.step(*args)
    assert svi._recorder.recorded
    CHANGES[change](svi, encoder)
    with pytest.warns(UserWarning, match="steps are eager for a while, 20 of a kind: "):
        svi.step(*args)
    assert not svi._recorder.recorded


TEMPERATURE = 1.0
LIST, ARRAY, NAMESPACE = [1.0], np.ones(1), SimpleNamespace(beta=1.0)


class Config:
    beta = 1.0


class Annealed:
    """A model that reads a number from one of the places where people keep them."""

    def __init__(self, where: str) -> None:
        self.where, self.beta, self.options = where, 1.0, {"beta": 1.0}
        beta = 1.0

        def read() -> float:
            return beta

        def bind(value: float) -> None:
            nonlocal beta
            beta = value

        self.read, self.bind = read, bind

    def set(self, value: float) -> None:
        global TEMPERATURE
        self.bind(value)
        TEMPERATURE = self.beta = self.options["beta"] = LIST[0] = Config.beta = value
        ARRAY[0] = NAMESPACE.beta = value
        self.pair = (value, 0.0)

    def __call__(self, x: Tensor) -> None:
        if self.where == "closure":
            scale = self.read()
        elif self.where == "global":
            scale = TEMPERATURE
        elif self.where == "dictionary":
            scale = self.options["beta"]
        elif self.where == "list":
            scale = LIST[0]
        elif self.where == "class":
            scale = Config.beta
        elif self.where == "tuple":
            scale = self.pair[0]
        elif self.where == "array":
            scale = float(ARRAY[0])
        elif self.where == "namespace":
            scale = NAMESPACE.beta
        else:
            scale = self.beta
        with poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize(
    "where",
    [
        *("closure", "global", "dictionary", "attribute", "list", "class", "tuple", "array"),
        "namespace",
    ],
)
def test_numbers_that_change_are_seen(where: str) -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))

    model, losses = Annealed(where), {}
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model.set(1.0)
        svi = SVI(model, guide, adam(), Trace_ELBO(), compile=compile)
        x = torch.ones(3)
        losses[compile] = [svi.step(x) for _ in range(4)]
        assert compile is False or svi._recorder.recorded
        model.set(0.3)
        expected = pytest.warns(
            UserWarning, match="steps are eager for a while, 20 of a kind: .* another value"
        )
        with expected if compile else nullcontext():
            losses[compile] += [svi.step(x) for _ in range(2)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-10)


def simple_guide(x: Tensor, *_: Any, **__: Any) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))


def observe(z: Tensor, x: Tensor) -> None:
    pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)


X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
Run = tuple[Callable[..., Any], Callable[..., Any], Callable[[Any, int], Any]]


def stepping(svi: Any, i: int) -> Any:
    return svi.step(X)


def laplace() -> Run:
    """Parameters of a PyroModule that are plain nn.Parameters."""

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = PyroModule[nn.Linear](3, 1)

        def forward(self, x: Tensor) -> None:
            pyro.sample("z", dist.Normal(self.net(x)[0], 0.5))

    def model(x: Tensor) -> None:
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    return model, Guide(), stepping


def module_as_argument() -> Run:
    net = nn.Linear(1, 1)

    def model(x: Tensor, net: nn.Module) -> None:
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(net(z.reshape(1))[0], x)

    return model, simple_guide, lambda svi, i: svi.step(X, net)


def literal() -> Run:
    """A tensor that is made of a number that changes."""

    class Model:
        n = 0

        def __call__(self, x: Tensor) -> None:
            self.n += 1
            scale = torch.tensor(self.n / 10.0)
            observe(scale * pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    return Model(), simple_guide, stepping


def iterator() -> Run:
    batches = iter(torch.arange(60.0, dtype=torch.float64).reshape(20, 3) / 60)

    def model() -> None:
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), next(batches))

    def guide() -> None:
        simple_guide(X)

    return model, guide, lambda svi, i: svi.step()


def item_of_a_closure() -> Run:
    beta = torch.tensor(1.0)

    def model(x: Tensor) -> None:
        observe(pyro.sample("z", dist.Normal(0.0, 0.5 + beta.item())), x)

    def step(svi: Any, i: int) -> Any:
        beta.fill_(1.0 / (1 + i))
        return svi.step(X)

    return model, simple_guide, step


def average_in_a_closure() -> Run:
    mean = torch.tensor(0.0)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean.mul_(0.5).add_(z.detach())
        observe(z + mean, x)

    return model, simple_guide, stepping


def reseeded() -> Run:
    def model(x: Tensor) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            w = torch.randn(3)
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)) * w, x)

    return model, simple_guide, stepping


def generator_of_its_own() -> Run:
    generator = torch.Generator().manual_seed(0)

    def model(x: Tensor) -> None:
        w = torch.randn(3, generator=generator)
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)) * w, x)

    return model, simple_guide, stepping


def plain(x: Tensor) -> None:
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)


def handler_around() -> Run:
    def step(svi: Any, i: int) -> Any:
        with poutine.scale(scale=1.0 + i % 3):
            return svi.step(X)

    return plain, simple_guide, step


def handler_around_later() -> Run:
    def step(svi: Any, i: int) -> Any:
        with poutine.scale(scale=3.0) if i > 5 else nullcontext():
            return svi.step(X)

    return plain, simple_guide, step


def float_argument() -> Run:
    def model(x: Tensor, beta: float) -> None:
        with poutine.scale(scale=beta):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z, x)

    return model, simple_guide, lambda svi, i: svi.step(X, 0.1 * (i + 1))


def object_argument() -> Run:
    class Batch:
        x = X

    batch = Batch()

    def model(batch: Batch) -> None:
        plain(batch.x)

    def step(svi: Any, i: int) -> Any:
        batch.x = X + i
        return svi.step(batch)

    return model, simple_guide, step


def exchanged_part() -> Run:
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.0))

    def model(x: Tensor) -> None:
        pyro.module("net", net, update_module_params=True)
        observe(net(pyro.sample("z", dist.Normal(0.0, 1.0)).reshape(1))[0], x)

    def step(svi: Any, i: int) -> Any:
        if i == 6:
            net[1].p = 0.5
        return svi.step(X)

    return model, simple_guide, step


def hook_on_a_parameter() -> Run:
    def step(svi: Any, i: int) -> Any:
        if i == 5:
            pyro.get_param_store()._params["loc"].register_hook(lambda g: 0.1 * g)
        return svi.step(X)

    return plain, simple_guide, step


def one_cycle() -> Run:
    def step(svi: Any, i: int) -> Any:
        for one in svi.optim.optim_objs.values():
            one.param_groups[0]["betas"] = (0.95 - 0.04 * i, 0.999)
        return svi.step(X)

    return plain, simple_guide, step


def loaded_state() -> Run:
    def step(svi: Any, i: int) -> Any:
        if i == 6:
            for one in svi.optim.optim_objs.values():
                state = one.state_dict()
                state["state"][0]["exp_avg"] = torch.tensor(5.0)
                one.load_state_dict(state)
        return svi.step(X)

    return plain, simple_guide, step


def unused_now_and_then() -> Run:
    """What a step does not use has a gradient of zero, and momentum moves it."""

    def guide(x: Tensor, flag: bool) -> None:
        loc = pyro.param("loc", torch.tensor(0.1))
        other = pyro.param("other", torch.tensor(0.3))
        pyro.sample("z", dist.Normal(loc + other if flag else loc + other.detach(), 0.5))

    def model(x: Tensor, flag: bool) -> None:
        plain(x)

    return model, guide, lambda svi, i: svi.step(X, i < 3)


def particles_changed() -> Run:
    def step(svi: Any, i: int) -> Any:
        if i == 6:
            LOSSES[-1].num_particles = 3
        return svi.step(X)

    return plain, simple_guide, step


def negative_zero() -> Run:
    def model(x: Tensor, a: float) -> None:
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)) + math.copysign(1.0, a), x)

    return model, simple_guide, lambda svi, i: svi.step(X, -0.0 if i % 5 == 4 else 0.0)


def outer_mask() -> Run:
    """Masks of model and guide that are one in some steps alone."""

    def model(x: Tensor, mask: Tensor, other: Tensor) -> None:
        with poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z, x)

    def guide(x: Tensor, mask: Tensor, other: Tensor) -> None:
        with poutine.mask(mask=other):
            simple_guide(x)

    yes, no = torch.tensor(True), torch.tensor(False)
    return model, guide, lambda svi, i: svi.step(X, yes, no if i == 6 else yes)


SEEN: dict[str, Callable[[], Run]] = {
    one.__name__: one
    for one in (
        *(laplace, module_as_argument, literal, iterator, item_of_a_closure, average_in_a_closure),
        *(reseeded, generator_of_its_own, handler_around, handler_around_later, float_argument),
        *(object_argument, exchanged_part, hook_on_a_parameter, one_cycle, loaded_state),
        *(unused_now_and_then, particles_changed, negative_zero, outer_mask),
    )
}
LOSSES: list[Any] = []


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.filterwarnings("ignore:steps (stay|are) eager")
@pytest.mark.parametrize("name", SEEN)
def test_nothing_goes_unseen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps with and without records are the same: replayed where that is right alone."""
    monkeypatch.setattr("pyro_vi.recorder._OTHER", 1)
    runs, replays, replay = [], [], Recorded.__call__

    def counted(self: Recorded, batch: Any) -> Tensor:
        replays.append(None)
        return replay(self, batch)

    monkeypatch.setattr(Recorded, "__call__", counted)
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide, step = SEEN[name]()
        LOSSES.append(TraceMeanField_ELBO() if name == "outer_mask" else Trace_ELBO())
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), LOSSES[-1], compile=compile)
        replays.clear()
        losses = [step(svi, i) for i in range(12)]
        params = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
        runs.append((losses, params))
    (eager, expected), (found, params) = runs
    if name == "iterator":  # from which recording takes too, so that the runs differ
        assert not svi._recorder.recorded
        return
    if name in ("laplace", "module_as_argument", "particles_changed", "outer_mask"):
        assert replays  # and not for want of a record
    assert found == pytest.approx(eager, rel=1e-8)
    for key, value in expected.items():
        torch.testing.assert_close(params[key], value, rtol=1e-6, atol=1e-9)
