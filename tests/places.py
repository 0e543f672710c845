"""Programs that read from places where a record sees nothing change."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from itertools import count
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
TEMPERATURE, ROWS = 1.0, torch.zeros(10)
LAST: Any = None
data = np.zeros(20_000)  # which nobody reads; a trainer has an attribute of that name


def heat() -> None:
    globals().update(TEMPERATURE=2.0)


def reset() -> None:
    """What the programs read in this file has its values again."""
    globals().update(TEMPERATURE=1.0, ROWS=torch.zeros(10))


def guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))


class Case(NamedTuple):
    """Programs, what is done besides their steps, what is around those, and a batch."""

    model: Callable[..., Any]
    then: Callable[[], Any] = heat
    guide: Callable[..., Any] = guide
    around: AbstractContextManager[Any] = nullcontext()
    batch: Tensor = X


def draw() -> Tensor:
    return pyro.sample("z", dist.Normal(0.0, 1.0))


def observe(z: Tensor, x: Tensor) -> None:
    pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)


def times(read: Callable[[], Any]) -> Callable[[Tensor], None]:
    """A model that reads one number."""

    def model(x: Tensor) -> None:
        observe(draw() * read(), x)

    return model


HOT, SCALE = "'TEMPERATURE' is 2.0, and was 1.0", "'ScaleMessenger.scale' is 3.0, and was 1.0"


class AttrDict(dict[str, Any]):
    """Entries that are attributes."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.__dict__ = self


def behind_code() -> dict[str, tuple[Case, str]]:
    """Where no program names a place of its own; with what is said of it."""

    class Bell(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            return TEMPERATURE * super().log_prob(value)

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.view_as(z)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return -TEMPERATURE * gradient

    class Guide(AutoDiagonalNormal):
        def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
            return dist.Normal(self.loc, self.scale * TEMPERATURE).to_event(1)

    class Scaled(dist.transforms.Transform):
        domain = codomain = dist.constraints.real
        bijective = True

        def _call(self, z: Tensor) -> Tensor:
            return z * TEMPERATURE

    class Tempered(Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            msg["scale"] = msg["scale"] * TEMPERATURE

    class Single:
        beta = 1.0
        one: Any = None

        @classmethod
        def get(cls) -> Any:
            cls.one = cls.one or cls()
            return cls.one

    def prior(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(draw(), 1.0).expand((3,)).to_event(1))

    def within(x: Tensor) -> None:
        with handler:
            observe(draw() * 2.0, x)

    def matched() -> Any:
        match space:
            case SimpleNamespace(beta=found):
                return found

    def nested() -> float:
        return TEMPERATURE

    def forget() -> None:
        heat()
        cached.cache_clear()

    for _ in range(14):
        nested = (lambda inner: lambda: inner())(nested)
    one = times(lambda: 1.0)
    handler, outer, observed = poutine.scale(scale=1.0), poutine.scale(scale=1.0), {"x": X}
    hooked, space, normal = nn.Identity(), SimpleNamespace(beta=1.0), dist.Normal(X[0], 1.0)
    hooked.register_forward_hook(lambda module, args, out: out * TEMPERATURE)
    cached = lru_cache(lambda: TEMPERATURE)
    return {
        "density": (
            Case(lambda x: pyro.sample("x", Bell(draw(), 1.0).expand((3,)).to_event(1), obs=x)),
            HOT,
        ),
        "backward": (Case(lambda x: observe(Reversed.apply(draw()), x)), HOT),
        "posterior": (Case(one, guide=Guide(one)), HOT),
        "transform": (Case(lambda x: observe(Scaled()(draw()), x)), HOT),
        "messenger": (Case(Tempered()(one)), HOT),
        "hook": (Case(lambda x: observe(hooked(draw()), x)), HOT),
        "cache": (Case(times(cached), forget), HOT),
        "closures": (Case(times(nested)), HOT),
        "singleton": (
            Case(times(lambda: Single.get().beta), lambda: setattr(Single.one, "beta", 2.0)),
            "'Single.beta' is 2.0, and was absent",
        ),
        "scale around": (Case(one, lambda: setattr(outer, "scale", 3.0), around=outer), SCALE),
        "scale within": (Case(within, lambda: setattr(handler, "scale", 3.0)), SCALE),
        "condition": (
            Case(poutine.condition(prior, data=observed), lambda: observed.update(x=X + 3.0)),
            "'ConditionMessenger.data.x' is another one",
        ),
        "distribution": (
            Case(
                lambda x: observe(pyro.sample("z", normal), x),
                partial(setattr, normal, "loc", X[2]),
            ),
            "'Normal.loc' is another one",
        ),
        "match": (
            Case(times(matched), lambda: setattr(space, "beta", 2.0)),
            "'SimpleNamespace.beta' is 2.0, and was 1.0",
        ),
        "shape of a global": (
            Case(times(lambda: len(ROWS) / 10), lambda: globals().update(ROWS=torch.zeros(20))),
            "'ROWS' is another one",
        ),
    }


class Trainer:
    """Models that keep the books of their training."""

    def __init__(self) -> None:
        self.net, self.steps, self.losses, self.data = nn.Dropout(0.5), 0, list[int](), X

    def quiet(self, x: Tensor) -> None:
        self.net.eval()
        observe(self.net(draw()), x)

    def by_name(self, x: Tensor) -> None:
        observe(draw() * getattr(self, "beta", 1.0), x)

    def by_data(self, x: Tensor) -> None:
        observe(draw() * self.data.sum(), x)

    def note(self) -> None:
        self.steps += 1
        self.losses.append(self.steps)


class Network(nn.Module):
    """As a trainer, with words that it never asks."""

    def __init__(self, words: int = 0, is_quiet: bool = False) -> None:
        super().__init__()
        self.layer, self.dropout, self.is_quiet = nn.Linear(1, 1), nn.Dropout(0.5), is_quiet
        self.epoch, self.losses = 0, list[int]()
        self.vocabulary = {str(i): i for i in range(words)}

    def forward(self, x: Tensor) -> None:
        if self.is_quiet:
            self.eval()
        pyro.module("layer", self.layer)
        observe(self.layer(self.dropout(draw().expand(9)).mean().reshape(1))[0], x)

    def note(self) -> None:
        self.epoch += 1
        self.losses.append(self.epoch)


CHANGED = "an argument of the step, or a tensor, is changed in place"


def unseeable() -> dict[str, tuple[Case, str]]:
    """What is done after the steps tells more of their numbers."""
    taken: list[float] = []
    steps, net, batch = SimpleNamespace(count=count(1)), nn.Linear(1, 1), X.clone()

    def rates() -> Iterator[float]:
        while True:
            taken.append(1.0 + len(taken) / 10)
            yield taken[-1]

    def weights(x: Tensor) -> None:
        observe(net(draw().reshape(1))[0], x)

    def in_place(change: Callable[[Tensor, Tensor], Any]) -> Case:
        def model(x: Tensor) -> None:
            change(x, torch.rand(3))
            observe(draw(), x)

        return Case(model, batch.tolist, batch=batch)

    def gradients() -> list[Any]:
        return [p.grad.tolist() for p in net.parameters() if p.grad is not None]

    class Shy(type):
        def __dir__(cls) -> Any:
            raise RuntimeError("closed")

    def leaving(leave: Callable[[Any], Any], kept: Callable[[], Any]) -> Case:
        def model(x: Tensor) -> None:
            z = draw()
            leave(z.detach())
            observe(z, x)

        return Case(model, kept)

    def by_global(value: Any) -> None:
        global LAST
        LAST = value

    def by_cell(value: Any) -> None:
        nonlocal mean
        mean = 0.9 * mean + 0.1 * value

    class Left:
        last: Any = None
        states: ClassVar[list[Any]] = []

        def __init__(self) -> None:
            self.n: Any = np.int64(0)
            self.pair: Any = (torch.zeros(()),)
            self.seen: dict[str, Any] = {}

        def count(self) -> float:
            self.n = self.n + 1
            return 1.0 + float(self.n) / 10

        def follow(self) -> Any:
            self.pair = (0.9 * self.pair[0] + 0.1,)
            return self.pair[0]

    def by_class(value: Any) -> None:
        Left.last = value

    left, mean, zs, batches = Left(), torch.zeros(()), list[Any](), deque(range(9))
    loader = iter(torch.utils.data.DataLoader(torch.arange(9.0), batch_size=1))
    own, chance = np.random.default_rng(0), random.Random(0)
    torchs = torch.Generator().manual_seed(0)
    shy = Shy("Options", (), {"beta": 1.0})()
    rate, anything = rates(), times(lambda: globals()["TEMPERATURE"])
    count_on = Case(times(lambda: next(steps.count)), lambda: [next(steps.count)])
    return {
        "generator": (Case(times(lambda: next(rate)), lambda: taken), "'rate' is a generator, "),
        "counter": (count_on, "'SimpleNamespace.count' is a count, which goes on"),
        "batch": (in_place(lambda x, u: x.add_(u)), CHANGED),
        "batch: out": (in_place(lambda x, u: torch.add(x, u, out=x)), CHANGED),
        "batch: of several": (in_place(lambda x, u: torch._foreach_add_([x], [u])), CHANGED),
        "batch: views": (in_place(lambda x, u: x.unbind()[0].add_(u[0])), CHANGED),
        "weights": (Case(weights, gradients), "gradients of a tensor that no pyro.param or"),
        "closed": (
            Case(times(lambda: shy.beta), list),
            "recording ended with RuntimeError: closed",
        ),
        "everything": (Case(anything, list), "globals() in the programs, which may read"),
        "appended": (
            leaving(lambda z: zs.append(z), lambda: torch.stack(zs).tolist()),
            "something in 'zs'",
        ),
        "of a class": (leaving(by_class, lambda: [float(Left.last)]), "something in 'Left.last'"),
        "of its list": (
            leaving(lambda z: Left.states.append(z), lambda: torch.stack(Left.states).tolist()),
            "something in 'Left.states'",
        ),
        "entry": (
            leaving(lambda z: left.seen.update(z=z), lambda: [float(left.seen["z"])]),
            "Left sets its 'seen' in a run",
        ),
        "global": (leaving(by_global, lambda: [float(LAST)]), "something in 'LAST'"),
        "cell": (leaving(by_cell, lambda: [float(mean)]), "something in 'mean'"),
        "deque": (Case(times(batches.popleft), lambda: batches), "something in 'read'"),
        "NumPy's counter": (Case(times(left.count), lambda: [left.n]), "Left sets its 'n' in a"),
        "tuple": (Case(times(left.follow), lambda: left.pair), "Left sets its 'pair' in a run"),
        "loader": (
            Case(times(lambda: next(loader)[0]), lambda: [next(loader).item()]),
            "'loader' is a _SingleProcessDataLoaderIter, which goes on",
        ),
        "NumPy's generator": (
            Case(times(lambda: own.random()), lambda: [own.random()]),
            "'own' is a Generator, which goes on",
        ),
        "Python's generator": (
            Case(times(lambda: chance.random()), lambda: [chance.random()]),
            "'chance' is a Random, which goes on",
        ),
        "torch's generator": (
            Case(
                times(lambda: torch.rand((), generator=torchs)),
                lambda: torch.rand(2, generator=torchs).tolist(),
            ),
            "'torchs' is a Generator, which goes on",
        ),
    }
