"""What changes after a step was recorded is seen, and what a record could not see is refused."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
    beta_bernoulli,
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
    with pytest.warns(UserWarning, match="'a of the store' is another one"):
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
    with pytest.warns(
        UserWarning, match="the next 20 steps of each kind of batch are not compiled: "
    ):
        svi.step(*args)
    assert not svi._recorder.recorded


X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
TEMPERATURE = 1.0
LIST, LONG, ARRAY, BAG = [1.0], [1.0] * 200, np.ones(200), {1.0}
NAMESPACE, LAST = SimpleNamespace(beta=1.0), deque([1.0])


def squash(x: Tensor) -> Tensor:
    return x.tanh()


class Base:
    inherited = 1.0


class Config(Base):
    beta = 1.0


class Slotted:
    __slots__ = ("beta",)

    def __init__(self) -> None:
        self.beta = 1.0


class Trainer:
    """A model that keeps the books of its training too."""

    def __init__(self) -> None:
        self.beta, self.steps, self.losses = 1.0, 0, list[float]()

    def model(self, x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(self.factor(z) * self.beta + self.shift, x)

    def factor(self, z: Tensor) -> Tensor:
        return z * BEHIND["method"]

    @property
    def shift(self) -> float:
        return BEHIND["property"]

    def step(self, svi: SVI) -> float:
        self.steps += 1
        self.losses.append(svi.step(X))
        return self.losses[-1]


BEHIND = {"method": 1.0, "property": 1.0}


@pytest.mark.usefixtures("recorded_alone")
def test_what_programs_do_not_read_may_change() -> None:
    trainer = Trainer()
    svi = SVI(trainer.model, simple_guide, adam(), Trace_ELBO(), compile=True)
    for _ in range(6):
        trainer.step(svi)
    assert svi._recorder.recorded and trainer.steps == 6
    trainer.beta = 2.0
    with pytest.warns(UserWarning, match=r"'Trainer.beta' is 2.0, and was 1.0"):
        trainer.step(svi)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize("where", BEHIND)
def test_what_is_read_behind_a_method_is_seen(where: str) -> None:
    trainer = Trainer()
    svi = SVI(trainer.model, simple_guide, adam(), Trace_ELBO(), compile=True)
    for _ in range(4):
        trainer.step(svi)
    assert svi._recorder.recorded
    BEHIND[where] = 2.0
    try:
        with pytest.warns(UserWarning, match=f"'BEHIND.{where}' is 2.0, and was 1.0"):
            trainer.step(svi)
    finally:
        BEHIND[where] = 1.0


class Net(nn.Module):
    """A layer that reads numbers and functions wherever a module may keep them."""

    common = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.act, self.beta, self.nothing, self.table = torch.tanh, 1.0, None, {"a": 1.0}
        self.register_buffer("square", torch.eye(2) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.other(self.layer(x))) @ self.square
        h = h * self.beta * self.common * self.table["a"] * self.table.get("b", 1.0)
        h = h * getattr(self, "late", 1.0)
        return h if self.nothing is None else h * self.nothing


def everywhere() -> tuple[Callable[[Tensor], None], dict[str, Callable[[], object]]]:
    """A model that reads from many places, and what changes one of them each."""
    torch.manual_seed(0)
    config, slotted, own, net = Config(), Slotted(), Config(), Net()
    another = nn.Linear(2, 2).requires_grad_(False)
    beta, nothing, pair, prior = 1.0, None, (1.0, 0.0), dist.Normal(0.0, 1.0)
    act, tensor, layer = abs, X, nn.Linear(2, 2).requires_grad_(False)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        z = pyro.sample("z", prior)
        h = net(x) + layer(x) + act(z) + squash(z) * TEMPERATURE + tensor.sum()
        for number in (beta, pair[0], LIST[0], LONG[150], float(ARRAY[150]), max(BAG), LAST[0]):
            h = h * number
        h = h * NAMESPACE.beta * Config.beta * own.beta * config.inherited * slotted.beta
        if nothing is not None:
            h = h * nothing
        pyro.sample("x", dist.Normal(h, 1.0).to_event(2), obs=x)

    def rebind(name: str) -> None:
        nonlocal beta, nothing, pair, prior, act, tensor, layer
        beta = 2.0 if name == "beta" else beta
        nothing = 2.0 if name == "nothing" else nothing
        pair = (2.0, 0.0) if name == "pair" else pair
        prior = dist.Normal(3.0, 1.0) if name == "prior" else prior
        act = torch.exp if name == "act" else act
        tensor = X + 1 if name == "tensor" else tensor
        layer = another if name == "layer" else layer

    def forget_gradient(parameter: Tensor) -> None:
        parameter.grad = None

    def exchange() -> None:
        one, two = net.layer, net.other
        del net.layer, net.other
        net.layer, net.other = two, one

    changes: dict[str, Callable[[], object]] = {
        **{f"closure: {name}": partial(rebind, name) for name in ("beta", "nothing", "pair")},
        **{f"closure: {n}": partial(rebind, n) for n in ("prior", "act", "tensor", "layer")},
        "global": lambda: globals().update(TEMPERATURE=2.0),
        "global function": lambda: globals().update(squash=torch.exp),
        "list": lambda: LIST.__setitem__(0, 2.0),
        "long list": lambda: LONG.__setitem__(150, 2.0),
        "array": lambda: ARRAY.__setitem__(150, 2.0),
        "set": lambda: BAG.add(2.0),
        "deque": lambda: LAST.appendleft(2.0),
        "namespace": lambda: setattr(NAMESPACE, "beta", 2.0),
        "class": lambda: setattr(Config, "beta", 2.0),
        "shadowed class attribute": lambda: setattr(own, "beta", 2.0),
        "inherited": lambda: setattr(Base, "inherited", 2.0),
        "slot": lambda: setattr(slotted, "beta", 2.0),
        "module: function": lambda: setattr(net, "act", torch.relu),
        "module: number": lambda: setattr(net, "beta", 2.0),
        "module: None": lambda: setattr(net, "nothing", 2.0),
        "module: dictionary": lambda: net.table.update(a=2.0),
        "module: new key": lambda: net.table.update(b=2.0),
        "module: new attribute": lambda: setattr(net, "late", 2.0),
        "module: class": lambda: setattr(Net, "common", 2.0),
        "module: parts exchanged": exchange,
        "module: forward": lambda: setattr(net.layer, "forward", lambda x: x * 3),
        "module: buffers": lambda: vars(net).update(_buffers={"square": torch.eye(2) * 3}),
        "module: hooks": lambda: vars(net.layer).update(
            _forward_hooks=OrderedDict({0: lambda module, args, out: 2 * out})
        ),
        "module: hook": lambda: net.other.register_full_backward_pre_hook(
            lambda module, gradients: (0 * gradients[0],)
        ),
        "module: attributes": lambda: object.__setattr__(
            net, "__dict__", {**vars(net), "beta": 2.0}
        ),
        "parameter: gradient hook": lambda: net.layer.weight.register_post_accumulate_grad_hook(
            forget_gradient
        ),
        "parameter: strides": lambda: setattr(net.layer.weight, "data", net.layer.weight.data.t()),
    }
    return model, changes


@pytest.mark.usefixtures("recorded_alone")
def test_counts_that_are_set_apart_are_seen() -> None:
    """Parameters share Adam's corrections while they have taken equally many steps."""
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide, loss, args = beta_bernoulli()
        optim = adam()
        svi = SVI(model, guide, optim, loss, compile=compile)
        losses = [svi.step(*args) for _ in range(5)]
        optim.torch_optimizer.state[next(iter(optim.torch_optimizer.state))]["step"].fill_(1.0)
        seen = pytest.warns(UserWarning, match="parameters took steps apart")
        with seen if compile else nullcontext():
            found.append(losses + [svi.step(*args) for _ in range(3)])
    assert found[1] == pytest.approx(found[0], rel=1e-10)


SQUASH = squash


def reset() -> None:
    """What `everywhere` reads has its values again, and the store nothing."""
    globals().update(TEMPERATURE=1.0, squash=SQUASH)
    LIST[0] = LONG[150] = ARRAY[150] = NAMESPACE.beta = 1.0
    Config.beta = Base.inherited = Net.common = 1.0
    BAG.discard(2.0)
    LAST.clear()
    LAST.append(1.0)
    pyro.clear_param_store()
    torch.manual_seed(0)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("change", everywhere()[1])
def test_what_is_bound_anew_is_seen(change: str) -> None:
    """One thing at a time, and only what makes a difference."""
    x, found = torch.arange(6.0).reshape(3, 2) / 5, {}
    for kind in ("unchanged", "eager", "compiled"):
        reset()
        model, changes = everywhere()
        svi = SVI(model, simple_guide, adam(), Trace_ELBO(), compile=kind == "compiled")
        losses = [svi.step(x) for _ in range(4)]
        if kind != "unchanged":
            changes[change]()
        seen = pytest.warns(
            UserWarning, match="the next 20 steps of each kind of batch are not compiled: "
        )
        with seen if kind == "compiled" else nullcontext():
            losses += [svi.step(x) for _ in range(3)]
        found[kind] = losses
    assert found["compiled"] == pytest.approx(found["eager"], rel=1e-10)
    assert found["unchanged"] != pytest.approx(found["eager"], rel=1e-6)


def simple_guide(x: Tensor, *_: Any, **__: Any) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))


def observe(z: Tensor, x: Tensor) -> None:
    pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)


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
@pytest.mark.filterwarnings("ignore:(steps stay eager|the next)")
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
