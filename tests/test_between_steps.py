"""What steps leave to the next, and what users do between them, is as with eager steps."""

from __future__ import annotations

import copy
import logging
import signal
from array import array
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from places import X, draw, guide, observe, times
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

from pyro_vi import SVI, capture, recorder

pytestmark = pytest.mark.usefixtures("double", "recorded_alone")

X2 = X.double()
COMPILE = capture.Graph.compile  # which `recorded_alone` leaves out
Steps = Callable[[Any], list[Any]]


def both(steps: Steps, *, compiled: int) -> None:
    """Runs steps with and without records, and compares what they give."""
    found = []
    for compile in (False, True):
        made: list[SVI] = []

        def make(*args: Any, compile: bool = compile, made: list[SVI] = made) -> SVI:
            made.append(SVI(*args, compile=compile))
            return made[-1]

        pyro.clear_param_store()
        torch.manual_seed(0)
        values = [torch.as_tensor(value).detach().clone() for value in steps(make)]
        values += [p.detach().clone() for p in pyro.get_param_store().values()]
        found.append(values)
    assert sum(svi.compiled_steps for svi in made) == compiled
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


KEPT: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "list": (lambda h: [h], lambda kept: kept[0]),
    "pairs": (lambda h: [(h, h)], lambda kept: kept[0][1]),
    "dictionary": (lambda h: {"h": h}, lambda kept: kept["h"]),
    "distribution": (lambda h: dist.Normal(h, 1.0), lambda kept: kept.mean),
    "partial": (lambda h: partial(torch.add, h), lambda kept: kept(0.0)),
    "number": (lambda h: [h.dim() + 0.1], lambda kept: torch.tensor(kept[0])),
}


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("kind", KEPT)
def test_what_a_run_keeps_for_the_next_is_not_frozen(kind: str, reads: bool) -> None:
    keep, get = KEPT[kind]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = keep(torch.tensor(0.0))

        def forward(self, z: Tensor) -> Tensor:
            h = 0.5 * get(self.kept) + z if reads else z
            self.kept = keep(h.detach())
            return h.sum()

    def steps(make: Any) -> list[Any]:
        network = Network()

        def model(x: Tensor) -> None:
            observe(network(draw()), x)

        svi = make(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        found = []
        for _ in range(8):
            found += [svi.step(X2), get(network.kept)]
        return found

    if kind == "number":  # the same in every run
        both(steps, compiled=5)
    else:
        with pytest.warns(UserWarning, match="stay eager: Network sets its 'kept' in a run"):
            both(steps, compiled=0)


def heads() -> tuple[nn.Module, Callable[..., Any], Callable[..., Any]]:
    network = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])

    def model(x: Tensor, head: int) -> None:
        pyro.module("network", network)
        observe(network[head](draw().reshape(1))[0], x)

    return network, model, lambda x, head: guide(x)


@pytest.mark.parametrize(
    "optim",
    [
        pyro.optim.RMSprop({"lr": 0.02, "weight_decay": 0.1}),
        pyro.optim.NAdam({"lr": 0.02, "weight_decay": 0.1}),
        pyro.optim.Adagrad({"lr": 0.02}),
        pyro.optim.AdamW({"lr": 0.02, "weight_decay": 0.1}),
    ],
    ids=lambda optim: optim.pt_optim_constructor.__name__,
)
def test_a_parameter_without_a_gradient_stays(optim: Any) -> None:
    def steps(make: Any) -> list[Any]:
        network, model, guide = heads()
        svi = make(model, guide, copy.deepcopy(optim), Trace_ELBO())
        found = [svi.step(X2, 0) for _ in range(8)]
        assert [p.grad is None for p in network.parameters()] == [False, False, True, True]
        return [*found, *network.parameters()]

    both(steps, compiled=5)


def test_a_gradient_of_zero_is_another_than_none() -> None:
    """Weight decay moves the one."""

    def steps(make: Any) -> list[Any]:
        _, model, guide = heads()
        svi = make(model, guide, pyro.optim.SGD({"lr": 0.01, "weight_decay": 0.1}), Trace_ELBO())
        return [svi.step(X2, head) for head in [0] * 8 + [1] + [0] * 25]

    with pytest.warns(UserWarning, match="does not use has now"):
        both(steps, compiled=5 + 4)


@pytest.mark.parametrize("optim", [pyro.optim.Adam, pyro.optim.RMSprop])
def test_gradients_that_were_taken_away_are_zeros_after_a_step(optim: Any) -> None:
    def steps(make: Any) -> list[Any]:
        svi = make(times(lambda: 1.0), guide, optim({"lr": 0.02}), Trace_ELBO())
        found: list[Any] = []
        for _ in range(8):
            found.append(svi.step(X2))
            for p in pyro.get_param_store()._params.values():
                found.append(p.grad)
                p.grad = None
        return found

    both(steps, compiled=5)


@pytest.mark.parametrize("between", ["another SVI", "another shape", "set back"])
def test_steps_that_are_numbers_are_followed(between: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of ClippedAdam."""
    monkeypatch.setattr(recorder, "_OTHER", 3)

    def steps(make: Any) -> list[Any]:
        optim = pyro.optim.ClippedAdam({"lr": 0.02})
        model = times(lambda: 1.0)
        svi, other = (make(model, guide, optim, Trace_ELBO()) for _ in range(2))
        found = []
        for _ in range(10):
            found.append(svi.step(X2))
            if between == "another SVI":
                found.append(other.step(X2))
            elif between == "another shape":
                found.append(svi.step(X2[:2]))
            else:
                for one in optim.optim_objs.values():
                    for state in one.state.values():
                        state["step"] = 3
        return found

    both(steps, compiled=7 if between == "set back" else 14 if between == "another SVI" else 13)


def test_a_batch_that_is_a_view_of_a_parameter_is_eager() -> None:
    """It would be read while it is moved."""

    def steps(make: Any) -> list[Any]:
        def model(x: Tensor, prior: Tensor) -> None:
            observe(pyro.sample("z", dist.Normal(prior, 1.0)), x)

        svi = make(model, lambda x, prior: guide(x), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        found = [svi.step(X2, torch.tensor(0.0)) for _ in range(8)]
        return found + [svi.step(X2, pyro.param("loc").detach()) for _ in range(4)]

    both(steps, compiled=5)


def test_tensors_without_elements_are_no_views() -> None:
    def steps(make: Any) -> list[Any]:
        def model(x: Tensor, none: Tensor) -> None:
            pyro.param("nothing", torch.zeros(0))
            observe(draw() + none.sum(), x)

        svi = make(model, lambda x, none: guide(x), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        return [svi.step(X2, torch.zeros(0)) for _ in range(8)]

    both(steps, compiled=5)


def test_a_view_of_a_parameter_in_a_program_is_refused() -> None:
    start = torch.tensor(0.1)
    view = start.view(())

    def steps(make: Any) -> list[Any]:
        start.fill_(0.1)
        parameter = nn.Parameter(start)

        class Centre(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.centre = parameter

        module = Centre()

        def model(x: Tensor) -> None:
            observe(pyro.sample("z", dist.Normal(view, 1.0)), x)

        def guide(x: Tensor) -> None:
            pyro.module("centre", module)
            pyro.sample("z", dist.Normal(module.centre, 0.5))

        svi = make(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        return [svi.step(X2) for _ in range(8)]

    with pytest.warns(UserWarning, match="is a view of a parameter"):
        both(steps, compiled=0)


def test_what_inductor_makes_draws_as_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws_more(module: Any, inputs: Any) -> Any:
        return lambda *inputs: (module(*inputs), torch.rand(()))[0]

    monkeypatch.setattr(capture.Graph, "compile", COMPILE)
    monkeypatch.setattr(capture, "_compiled", draws_more)

    def steps(make: Any) -> list[Any]:
        svi = make(times(lambda: 1.0), guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        return [svi.step(X2) for _ in range(8)]

    with pytest.warns(UserWarning, match="Inductor made of the record has another number of draws"):
        both(steps, compiled=0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_all_optimizers_are_called(when: str) -> None:
    def steps(make: Any) -> list[Any]:
        called: list[int] = []

        def hook() -> Any:
            return register_optimizer_step_post_hook(lambda *args: called.append(1))

        svi = make(times(lambda: 1.0), guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        handle = hook() if when == "before" else None
        for _ in range(6):
            svi.step(X2)
        handle = handle or hook()
        found = [svi.step(X2) for _ in range(3)]
        handle.remove()
        return [*found, len(called)]

    if when == "before":
        both(steps, compiled=6)  # outside of the graph
    else:
        with pytest.warns(UserWarning, match="hooks of all optimizers"):
            both(steps, compiled=3)


def test_a_copy_has_records_of_its_own() -> None:
    def steps(make: Any) -> list[Any]:
        svi = make(times(lambda: 1.0), guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        found = [svi.step(X2) for _ in range(6)]
        other = copy.copy(svi)
        other.model = times(lambda: 2.0)
        return found + [other.step(X2) for _ in range(6)] + [svi.step(X2)]

    both(steps, compiled=4)


def test_a_copy_of_a_guide_leaves_its_step_compiled() -> None:
    """Pyro takes the model from a guide that is copied."""

    def model(x: Tensor) -> None:
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    def steps(make: Any) -> list[Any]:
        guide = AutoNormal(model)
        svi = make(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        found = [svi.step(X2) for _ in range(6)]
        copy.deepcopy(guide)
        return found + [svi.step(X2) for _ in range(3)]

    both(steps, compiled=6)


NUMBERS = array("d", [1.0]), bytearray([1]), OrderedDict(a=1.0, b=2.0)
CHANGES: dict[str, tuple[Callable[[], float], Callable[[], object], Callable[[], object]]] = {
    "array": (
        lambda: NUMBERS[0][0],
        lambda: NUMBERS[0].__setitem__(0, 3.0),
        lambda: NUMBERS[0].__setitem__(0, 1.0),
    ),
    "bytearray": (
        lambda: float(NUMBERS[1][0]),
        lambda: NUMBERS[1].__setitem__(0, 3),
        lambda: NUMBERS[1].__setitem__(0, 1),
    ),
    "order": (
        lambda: next(iter(NUMBERS[2].values())),
        lambda: NUMBERS[2].move_to_end("a"),
        lambda: NUMBERS[2].move_to_end("a", last=False),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_numbers_that_lie_elsewhere_are_seen(name: str) -> None:
    read, change, reset = CHANGES[name]

    def steps(make: Any) -> list[Any]:
        reset()
        svi = make(times(read), guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        found = [svi.step(X2) for _ in range(6)]
        change()
        return found + [svi.step(X2) for _ in range(3)]

    with pytest.warns(UserWarning, match="the next 20 steps"):
        both(steps, compiled=3)


class Doubled(TorchFunctionMode):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * self.factor if func is torch.sin else found


def test_another_mode_around_a_step_is_another_kind() -> None:
    def steps(make: Any) -> list[Any]:
        def model(x: Tensor) -> None:
            observe(torch.sin(draw()), x)

        svi = make(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        found = []
        for mode in (Doubled(1.0), Doubled(2.0)):
            with mode:
                found += [svi.step(X2) for _ in range(6)]
        return found

    both(steps, compiled=3)


def test_an_interrupt_waits_for_the_recording(caplog: pytest.LogCaptureFixture) -> None:
    def model(x: Tensor) -> None:
        if torch.compiler.is_compiling():
            signal.raise_signal(signal.SIGINT)
            logging.getLogger(__name__).warning("goes on")
        observe(draw(), x)

    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), compile=True)
    svi.step(X2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        svi.step(X2)
    assert signal.getsignal(signal.SIGINT) is before
    assert "goes on" in caplog.messages
    assert not svi._recorder.recorded  # type: ignore[union-attr]


def test_programs_without_parameters_stay_eager() -> None:
    def model(x: Tensor) -> None:
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    def steps(make: Any) -> list[Any]:
        empty = pyro.optim.Adam({"lr": 0.02})
        svi = make(model, lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), empty, Trace_ELBO())
        return [svi.step(X2) for _ in range(8)]

    with pytest.warns(UserWarning, match="the programs have no parameters"):
        both(steps, compiled=0)
