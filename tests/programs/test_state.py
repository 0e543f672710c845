"""State: a private copy of all that programs keep, and nothing else touched."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import eight_schools, normal_mean, normal_mean_guide
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.process_state import seeded
from pyro_vi.programs import Program, State, reachable


def test_modules_are_swapped_whole_and_put_back() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weight = module[0].weight
    state = State({"model": module})
    with state.installed():
        assert module[0].weight is not weight
        module(torch.randn(8, 2))  # moves the running mean
        nn.init.constant_(module[0].weight, 5.0)
    assert module[0].weight is weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    held = state.tensors()
    assert set(held) == {f"model.{name}" for name in module.state_dict()}
    assert bool((held["model.0.weight"] == 5).all())
    assert bool((held["model.1.running_mean"] != 0).all())


def test_an_error_inside_puts_everything_back() -> None:
    module = nn.Linear(2, 3)
    weight = module.weight
    state = State({"model": module})
    with pytest.raises(KeyError), state.installed():
        pyro.param("made", torch.tensor(1.0))
        raise KeyError
    assert module.weight is weight
    assert "made" not in pyro.get_param_store()


def test_tied_weights_stay_tied() -> None:
    module = nn.Module()
    module.a, module.b = nn.Linear(2, 2), nn.Linear(2, 2)
    module.b.weight = module.a.weight
    state = State({"model": module})
    with state.installed():
        assert module.a.weight is module.b.weight
    assert set(state.tensors()) == {"model.a.weight", "model.a.bias", "model.b.bias"}


def test_recurrent_layers_run_on_the_copy() -> None:
    layer = nn.GRU(2, 3)
    state = State({"model": layer})
    x = torch.randn(4, 1, 2)
    with state.installed():
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        assert bool((layer(x)[0] == 0).all())
    assert bool((layer(x)[0] != 0).any())


def test_lazy_layers_must_have_seen_a_batch() -> None:
    layer = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"'model\.weight' has no shape yet"):
        State({"model": layer})
    layer(torch.randn(5, 2))
    assert State({"model": layer}).tensors()["model.weight"].shape == (3, 2)


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_an_autoguide_is_set_up_in_the_copy_alone(kind: type) -> None:
    guide = kind(normal_mean)
    state = State({"model": normal_mean, "guide": guide})
    with state.installed():
        guide(torch.ones(3))
    assert guide.prototype_trace is None
    assert list(guide.parameters()) == []
    assert len(state.tensors()) == 2


def test_the_store_is_private() -> None:
    pyro.param("loc", torch.tensor(7.0))
    state = State({"guide": normal_mean_guide})
    with state.installed():
        normal_mean_guide(torch.ones(3))
        assert float(pyro.param("loc").detach()) == pytest.approx(0.3)
    assert float(pyro.param("loc").detach()) == 7.0
    assert set(pyro.get_param_store()) == {"loc"}
    assert set(state.tensors()) == {"param.loc", "param.scale"}
    assert state.tensors()["param.scale"].item() == pytest.approx(torch.tensor(0.5).log().item())


def test_a_tensor_given_to_param_is_neither_trained_nor_marked() -> None:
    start = torch.zeros(2)

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", start), 1.0).to_event(1))

    state = State({"guide": guide})
    with state.installed():
        guide()
    with torch.no_grad():
        state.tensors()["param.loc"].add_(1)
    assert bool((start == 0).all()) and not start.requires_grad
    with state.installed():
        guide()
    assert bool((state.tensors()["param.loc"] == 1).all())


def test_methods_run_on_the_fits_parameters() -> None:
    guide = AutoDiagonalNormal(normal_mean)
    state = State({"guide": guide})
    with state.installed():
        guide(torch.ones(3))
        nn.init.constant_(
            guide.loc_unconstrained if hasattr(guide, "loc_unconstrained") else guide.loc, 4.0
        )
    state.freeze()
    program = Program(guide, state, "guide")
    assert float(program.median()["mean"]) == 4.0
    with pytest.raises(AttributeError, match="no method 'nothing'"):
        _ = program.nothing


class Net(PyroModule):
    """Parameters of every kind that a PyroModule has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.scale = PyroParam(torch.tensor(2.0), constraint=constraints.positive)
        self.weight = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        shift = pyro.param("shift", torch.tensor(0.5))
        return self.weight * self.layer(x) * self.scale + shift


def test_pyro_modules_with_params_samples_and_bare_param_statements() -> None:
    net = Net()
    state = State({"model": net})
    with state.installed():
        trace = poutine.trace(net).get_trace(torch.ones(3, 1))
    assert {n for n, s in trace.nodes.items() if s["type"] == "param"} == {
        "layer$$$weight",
        "layer$$$bias",
        "scale",
        "shift",
    }
    assert set(state.tensors()) == {
        "model.layer.weight",
        "model.layer.bias",
        "model.scale_unconstrained",
        "param.shift",
    }
    assert "shift" not in pyro.get_param_store()
    net(torch.ones(3, 1))  # Pyro's own way still works afterwards


class Holder:
    """A class of the user's own that is no module."""

    def __init__(self) -> None:
        self.net = nn.Linear(1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)

    def method(self, x: Tensor) -> Tensor:
        return self.net(x)


def reaching(net: nn.Linear) -> dict[str, object]:
    holder = Holder()
    holder.net = net

    def closure(x: Tensor) -> Tensor:
        return net(x)

    def default(x: Tensor, layer: nn.Module = net) -> Tensor:
        return layer(x)

    nets = {"a": [net]}
    return {
        "module": net,
        "closure": closure,
        "default": default,
        "in containers": lambda x: nets["a"][0](x),
        "partial": partial(lambda layer, x: layer(x), net),
        "object": holder,
        "method": holder.method,
        "handler": poutine.scale(closure, scale=2.0),
        "autoguide": AutoNormal(poutine.block(closure, hide=["z"])),
    }


@pytest.mark.parametrize("how", reaching(nn.Linear(1, 1)))
def test_modules_are_found_wherever_a_program_keeps_them(how: str) -> None:
    net = nn.Linear(1, 1)
    state = State({"model": reaching(net)[how]})
    assert [t.shape for t in state.parameters().values()] == [(1, 1), (1,)]
    original = net.weight
    with state.installed():
        assert net.weight is not original
    assert net.weight is original


def test_a_module_that_no_program_leads_to_is_an_error() -> None:
    hidden = iter([nn.Linear(1, 1)])
    kept: list[nn.Module] = []

    def model(x: Tensor) -> None:
        layer = kept[0] if kept else next(hidden)
        pyro.module("layer", layer)(x)

    state = State({"model": model})
    with state.installed():
        model(torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"'layer\.weight' belongs to a module"):
        state.check_registered()


def test_a_pyro_module_that_no_program_leads_to_is_an_error() -> None:
    hidden = iter([Net()])
    kept: list[Net] = []

    def model(x: Tensor) -> Tensor:
        net = kept[0] if kept else next(hidden)
        return net(x)

    state = State({"model": model})
    with (
        state.installed(),
        pytest.raises(ValueError, match="a PyroModule cannot be reached"),
        reachable(),
    ):
        model(torch.ones(1, 1))


def test_two_programs_of_one_attribute_name_do_not_share() -> None:
    # In Pyro's default mode both register "net$$$weight", and the second trains the first's.
    class One(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def forward(self) -> None:
            pyro.sample("z", dist.Normal(self.net.bias, 1.0).to_event(1))

    model, guide = One(), One()
    state = State({"model": model, "guide": guide})
    assert len(state.tensors()) == 4
    with state.installed():
        nn.init.constant_(guide.net.bias, 3.0)
    assert state.tensors()["model.net.bias"].item() != 3.0


def test_restore_names_what_does_not_fit() -> None:
    state = State({"model": nn.Linear(2, 2)})
    good = state.snapshot()
    state.restore(good)
    with pytest.raises(ValueError, match=r"lacks: \['model.bias'\]"):
        state.restore({"model.weight": good["model.weight"]})
    with pytest.raises(ValueError, match=r"programs lack: \['other'\]"):
        state.restore({**good, "other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'model.bias': expected shape \(2,\), got \(3,\)"):
        state.restore({**good, "model.bias": torch.ones(3)})


def test_a_program_runs_on_its_own_state_and_not_on_another() -> None:
    net = nn.Linear(1, 1, bias=False)
    programs = []
    for value in (2.0, 3.0):
        state = State({"model": net})
        with state.installed():
            nn.init.constant_(net.weight, value)
        state.freeze()
        programs.append(Program(net, state, "model"))
    x = torch.ones(1, 1)
    assert [p(x).item() for p in programs] == [2.0, 3.0]
    nested = Program(lambda x: programs[0](x) + programs[1](x), State({}), "model")
    assert nested(x).item() == 5.0
    assert not programs[0](x).requires_grad


def test_evaluating_puts_each_module_back_to_its_mode() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    state = State({"model": module})
    with state.installed():
        with state.evaluating():
            assert not module[0].training
        assert module[0].training and not module[1].training


def test_seeded_leaves_the_generator_as_it_was() -> None:
    before = torch.random.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded(3):
            draws.append(torch.randn(4))
    assert torch.equal(*draws)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_distribution_from_a_method_keeps_the_fits_parameters() -> None:
    """A flow asks its networks only when it is sampled, after the method has returned."""
    guide = Encoder((3,), Flow(2, 8))
    state = State({"guide": guide})
    with state.installed(), torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3)
    state.freeze()
    fitted = Program(guide, state, "guide")
    x, z = torch.randn(5, 3), torch.randn(5, 2)
    with state.installed():
        inside = guide.encode(x).log_prob(z)
    assert torch.equal(fitted.encode(x).log_prob(z), inside)
    assert not torch.allclose(guide.encode(x).log_prob(z), inside)


def test_a_tensor_from_a_callable_is_not_trained_in_place() -> None:
    start = torch.zeros(2)
    state = State({"guide": lambda: pyro.param("loc", lambda: start)})
    with state.installed(), torch.no_grad():
        pyro.param("loc", lambda: start).add_(1)
    assert bool((start == 0).all()) and not start.requires_grad


def test_hooks_of_parameters_are_kept() -> None:
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.register_hook(lambda gradient: gradient * torch.tensor([[1.0], [0.0]]))
    state = State({"model": layer})
    with state.installed():
        layer(torch.ones(1, 1)).sum().backward()
        assert layer.weight.grad.tolist() == [[1.0], [0.0]]
    assert layer.weight.grad is None


KEPT = {"net": nn.Linear(1, 1)}


class Wrapped:
    """Not callable, and not a module."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Wrapped(KEPT["net"])

    def forward(self, x: Tensor) -> Tensor:
        return self.helper.net(x)


class Naming(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return KEPT["net"](x)


class Calling:
    def __call__(self, x: Tensor) -> Tensor:
        return KEPT["net"](x)


def from_a_global(x: Tensor) -> Tensor:
    return KEPT["net"](x)


def from_inside(x: Tensor) -> list[Tensor]:
    return [KEPT["net"](row) for row in x]


@pytest.mark.parametrize(
    "program", [Outer(), Naming(), Calling(), from_a_global, from_inside], ids=lambda p: str(p)[:20]
)
def test_modules_are_found_behind_globals_and_helpers(program: object) -> None:
    original = KEPT["net"].weight
    state = State({"model": program})
    with state.installed():
        assert KEPT["net"].weight is not original
    assert KEPT["net"].weight is original


def test_constraints_and_autoguides_survive_the_copy() -> None:
    y, sigma = torch.randn(8), torch.ones(8)
    guide = AutoNormal(eight_schools)
    state = State({"model": eight_schools, "guide": guide})
    with state.installed():
        values = guide(y, sigma)
    assert float(values["tau"].detach()) > 0
