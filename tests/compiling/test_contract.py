"""What a compiled step promises: what is read anew, what drops it, and what stays eager."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from steps import X, both, draw, observe, plain, plain_adam, plain_guide
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vi import SVI
from pyro_vi.compiling import steps as compiler
from pyro_vi.compiling.compiled import Compiled

Model = Callable[..., None]


def compiled(model: Model = plain, guide: Any = plain_guide, loss: Any = None) -> SVI:
    """An SVI whose last two of six steps were compiled."""
    svi = SVI(model, guide, plain_adam(), loss or Trace_ELBO(), compile=True)
    for _ in range(6):
        svi.step(X)
    assert svi.compiled_steps == 2
    return svi


# ---------------------------------------------------------------------------- what is read anew


class Layer(nn.Module):
    """Holds a tensor as a buffer, as an attribute, and as a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.tensor(1.0))
        self.attribute = torch.tensor(1.0)
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        return z * self.buffer * self.attribute * self.frozen


GLOBAL = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    "where", ["buffer", "attribute", "frozen", "closure", "global", "default", "list", "mask"]
)
def test_tensors_that_programs_hold_are_read_anew(where: str) -> None:
    held: list[Tensor] = []

    def make() -> Model:
        layer, one = Layer(), torch.ones(3)
        kept = getattr(layer, where) if hasattr(layer, where) else GLOBAL.fill_(1.0)
        held[:] = [one if where in ("closure", "default", "list", "mask") else kept]

        def model(x: Tensor, default: Tensor = one) -> None:
            if where == "mask":
                seen = dist.Normal(draw(), 1.0).expand((3,)).mask(one > 0.5)
                pyro.sample("x", seen.to_event(1), obs=x)
                return
            kinds = {"closure": one, "global": GLOBAL, "default": default, "list": held[0]}
            observe(draw() * kinds[where] if where in kinds else layer(draw()), x)

        return model

    def change(i: int, svi: Any) -> None:
        if i in (6, 8):
            held[0].data.mul_(0.6)

    both(make, between=change)


@pytest.mark.parametrize("clamps", [Tensor.clamp_, lambda w, *to: w.data.clamp_(*to)])
@pytest.mark.parametrize("optim", [pyro.optim.RMSprop, pyro.optim.Adam])
def test_parameters_that_a_program_sets_are_set(clamps: Any, optim: Any) -> None:
    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.5))
        with torch.no_grad():
            clamps(w, -0.1, 0.1)
        observe(draw() * 0 + w, x)

    both(lambda: model, optim=lambda: optim({"lr": 0.3}))


@pytest.mark.parametrize("kind", ["Adam", "SGD", "RMSprop"])
def test_parameters_and_learning_rates_that_are_set_are_followed(kind: str) -> None:
    def change(i: int, svi: Any) -> None:
        for optimizer in svi.optim.optim_objs.values():
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + i)
        if i == 7:
            pyro.param("loc").data.fill_(1.0)

    both(optim=lambda: getattr(pyro.optim, kind)({"lr": 0.02}), between=change)


@pytest.mark.parametrize("other", ["another SVI", "an eager SVI", "set back"])
@pytest.mark.parametrize("kind", ["ClippedAdam", "Adam", "RMSprop"])
def test_the_optimizers_state_may_change_between_steps(kind: str, other: str) -> None:
    seconds: list[Any] = []

    def change(i: int, svi: Any) -> None:
        if i == 0 and other != "set back":
            options = {"compile": True} if other == "another SVI" and isinstance(svi, SVI) else {}
            seconds[:] = [SVI(plain, plain_guide, svi.optim, Trace_ELBO(), **options)]
        elif other != "set back":
            seconds[0].step(X + 1)
        else:
            for one in svi.optim.optim_objs.values():
                for state in one.state.values():
                    count = state["step"]
                    state["step"] = count.fill_(3.0) if isinstance(count, Tensor) else 3

    both(optim=lambda: getattr(pyro.optim, kind)({"lr": 0.02}), between=change)


# --------------------------------------------------------------------------------- kinds of batches


def rows(x: Tensor) -> None:
    z = draw()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_other_shapes_and_dtypes_have_records_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "_EAGER_STEPS_OF_OTHERS", 4)
    sizes = [3] * 6 + [2] * 8 + [3, 2] * 3 + [1] * 2
    both(lambda: rows, lambda i: (X[: sizes[i]],), steps=len(sizes), compiled=2 + 2 + 6)
    both(lambda: rows, lambda i: (X.float() if i > 5 else X,), compiled=2)


def test_a_batch_may_lie_anywhere_in_memory() -> None:
    """In a parameter too, which is read while it is moved."""
    wide = torch.stack([X, 2 * X], 1)
    views = [X, wide[:, 0], wide[:, 1], X.flip(0), torch.complex(X, X + 1).conj().imag]

    def model(x: Tensor, prior: Tensor) -> None:
        observe(pyro.sample("z", dist.Normal(prior, 1.0)), x)

    def batches(i: int) -> tuple[Any, ...]:
        return views[i % 5 * (i > 3)], pyro.param("loc").detach() if i > 6 else torch.tensor(0.0)

    both(lambda: model, batches, steps=15, compiled=11)


def test_arguments_have_names_and_may_be_empty() -> None:
    def model(x: Tensor, *, none: Tensor, scale: float = 1.0) -> None:
        observe(draw() * scale + none.sum(), x)

    svi = SVI(model, plain_guide, plain_adam(), Trace_ELBO(), compile=True)
    for _ in range(6):
        svi.step(X, none=torch.zeros(0))
    svi.step(X, none=torch.zeros(0), scale=2.0)
    assert svi.compiled_steps == 2


class Scaled(Messenger):
    """A handler around steps."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = 2.0 * msg["scale"]


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return 2 * found if func is torch.sin else found


SCALED, DOUBLED = Scaled(), Doubled()


@pytest.mark.parametrize(
    "kind", [lambda: SCALED, lambda: DOUBLED, lambda: pyro.validation_enabled(False)]
)
def test_what_is_around_a_step_is_part_of_its_kind(kind: Callable[[], Any]) -> None:
    def model(x: Tensor) -> None:
        observe(torch.sin(draw()), x)

    both(lambda: model, around=lambda i: kind() if i >= 6 else nullcontext(), compiled=2)


def test_many_kinds_of_batches_leave_room_for_one(recwarn: pytest.WarningsRecorder) -> None:
    """A weight as a number that rises for long, and then stays."""

    def model(x: Tensor, weight: float) -> None:
        observe(draw() * weight, x)

    for rise, steps, found in ((105, 120, 0), (20, 40, 16)):
        svi = SVI(model, plain_guide, plain_adam(), Trace_ELBO(), compile=True)
        for i in range(steps):
            svi.step(X, min(1.0, i / rise))
        assert svi.compiled_steps == found
    (said,) = [str(one.message) for one in recwarn if "stay eager" in str(one.message)]
    assert "100 kinds of batches so far" in said


# ------------------------------------------------------------------------------ what drops a record


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.5), nn.Linear(1, 1)
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.held = torch.tensor(1.0)

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(self.drop(z.reshape(1)))[0] * self.frozen + self.held


def replace(svi: Any, net: Net) -> None:
    net.layer.weight = nn.Parameter(torch.ones(1, 1))


def exchange(svi: Any, net: Net) -> None:
    net.drop = nn.Dropout(0.2)


def move(svi: Any, net: Net) -> None:
    net.layer.bias.data = net.layer.bias.data.clone()


def move_frozen(svi: Any, net: Net) -> None:
    net.frozen.data = torch.tensor(2.0)


def move_held(svi: Any, net: Net) -> None:
    net.held.data = torch.tensor(2.0)


def option(svi: Any, net: Net) -> None:
    for optimizer in svi.optim.optim_objs.values():
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def load(svi: Any, net: Net) -> None:
    for optimizer in svi.optim.optim_objs.values():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def optimizer_hook(svi: Any, net: Net) -> None:
    for optimizer in svi.optim.optim_objs.values():
        optimizer.register_step_pre_hook(lambda one, *args: one.param_groups[0].update(lr=1e-3))


def another_loss(svi: Any, net: Net) -> None:
    loss = Trace_ELBO(num_particles=2)
    svi.loss, svi.loss_and_grads = loss.loss, loss.loss_and_grads


def another_optimizer(svi: Any, net: Net) -> None:
    svi.optim = pyro.optim.SGD({"lr": 0.01})


def another_model(svi: Any, net: Net) -> None:
    svi.model = poutine.scale(svi.model, scale=2.0)


PART = "a parameter, a buffer, a hook or another part of a module"
SVIS = "the model, the guide, the loss or the optimizer"
CHANGES: dict[str, tuple[Callable[[Any, Net], Any], str]] = {
    "eval": (lambda svi, net: net.eval(), "the mode of a module"),
    "frozen": (lambda svi, net: net.layer.bias.requires_grad_(False), "whether a tensor has a"),
    "trained": (lambda svi, net: net.frozen.requires_grad_(), "whether a tensor has a"),
    "a parameter replaced": (replace, PART),
    "a module replaced": (exchange, PART),
    "a hook": (lambda svi, net: net.register_forward_hook(lambda m, args, out: out + 1), PART),
    "moved": (move, "the place of a tensor in memory"),
    "a frozen parameter moved": (move_frozen, "the place of a tensor in memory"),
    "a held tensor moved": (move_held, "the place of a tensor in memory"),
    "store cleared": (lambda svi, net: pyro.clear_param_store(), "a parameter in Pyro's store"),
    "an option": (option, "an option of the optimizer"),
    "a state that is loaded": (load, "the state of the optimizer"),
    "a hook of an optimizer": (optimizer_hook, ""),
    "another loss": (another_loss, SVIS),
    "another optimizer": (another_optimizer, SVIS),
    "another model": (another_model, SVIS),
}


@pytest.mark.filterwarnings("ignore:.*are not trained", "ignore:.*because requires_grad=False")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_drops_the_compiled_step_once_and_is_named(name: str) -> None:
    change, words = CHANGES[name]
    nets: list[Net] = []

    def make() -> Model:
        nets.append(Net())
        net = nets[-1]

        def model(x: Tensor) -> None:
            pyro.module("net", net)
            observe(net(draw()), x)

        return model

    def between(i: int, svi: Any) -> None:
        if i == 7:
            change(svi, nets[-1])

    with pytest.warns(UserWarning, match="compiled step is dropped") as caught:
        if name == "eval":  # and 20 eager steps later there is another record
            svi = both(make, between=between, steps=32, compiled=3 + 3)
        else:
            svi = both(make, between=between, steps=9, compiled=3)
    (said,) = [str(one.message) for one in caught if "dropped" in str(one.message)]
    assert f"the next 20 steps are eager: {words}" in said and words in svi.explain()


def test_an_option_of_the_loss_is_seen() -> None:
    loss = Trace_ELBO()
    svi = compiled(loss=loss)
    loss.num_particles = 3
    with pytest.warns(UserWarning, match="an option of the loss changed"):
        svi.step(X)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_all_optimizers_are_called(when: str) -> None:
    called: list[int] = []
    handles: list[Any] = []

    def change(i: int, svi: Any) -> None:
        if i == (0 if when == "before" else 7):
            handles.append(register_optimizer_step_post_hook(lambda *args: called.append(1)))
        if i == 9:
            handles.pop().remove()

    try:
        with pytest.warns(UserWarning, match="is dropped"):
            both(between=change, compiled=None)
    finally:
        for handle in handles:
            handle.remove()
    assert len(called) == 2 * (9 if when == "before" else 2)


def test_python_values_are_constants_until_recompile() -> None:
    """As the contract says."""
    scale = {"is": 1.0}

    def model(x: Tensor) -> None:
        observe(draw() * scale["is"], x)

    svi = compiled(model)
    scale["is"] = 100.0
    torch.manual_seed(0)
    first = svi.step(X)
    svi.recompile()
    assert "dropped on request" in svi.explain()
    torch.manual_seed(0)
    assert svi.step(X) > 5 * first
    for _ in range(5):
        svi.step(X)
    assert svi.compiled_steps == 2 + 1 + 2


# --------------------------------------------------------------------------------- what stays eager


class Odd:
    """A model that does something that no record repeats."""

    def __init__(self, does: str) -> None:
        self.does, self.generator = does, torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor) -> None:
        z, shift, does = draw(), 0.0, self.does
        if does == "item":
            shift = 0.1 * z.item()
        elif does == "branch" and z > 0:
            shift = 1.0
        elif does == "list":
            shift = sum(z.detach().reshape(1).tolist())
        elif does == "array":
            shift = 0.1 * float(z.detach().numpy())
        elif does == "numpy":
            shift = float(np.random.rand())
        elif does == "random":
            shift = random.random()
        elif does == "nonzero":
            x = torch.cat([x[x > z.detach()], x])
        elif does == "generator":
            shift = torch.rand((), generator=self.generator, dtype=X.dtype)
        elif does == "sparse":
            x = (torch.eye(3).to_sparse() @ x[:, None])[:, 0]
        elif does == "argument":
            x.add_(0.0)
        elif does == "resized":
            z = z + torch.zeros(4).resize_(2).sum()
        elif does == "complex":
            shift = pyro.param("c", torch.tensor(0.1 + 0.1j)).abs()
        elif does == "hook":
            p = pyro.get_param_store()._params["loc"]
            if not p._backward_hooks:
                p.register_hook(lambda gradient: 2 * gradient)
        observe(z + shift, x)


LINE = r".*test_contract\.py:\d+\)"
ODD = {
    "item": f"a tensor was asked for its value{LINE}",
    "branch": f"a tensor was asked for its value{LINE}",
    "list": LINE,
    "array": LINE,
    "nonzero": f"a mask that is not fixed{LINE}",
    "generator": f"a generator of the programs' own{LINE}",
    "resized": LINE,
    "numpy": "random numbers of Python or NumPy",
    "random": "random numbers of Python or NumPy",
    "argument": "a step changes its argument in place",
    "complex": "parameters that are complex",
    "hook": "hooks on parameters",
    "sparse": "",
}


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:non-inplace resize is deprecated")
@pytest.mark.parametrize("does", ODD)
def test_what_cannot_be_recorded_stays_eager_and_is_said_once(does: str) -> None:
    def between(i: int, svi: Any) -> None:
        random.seed(i)
        np.random.seed(i)

    with pytest.warns(UserWarning, match=f"steps stay eager: .*{ODD[does]}") as caught:
        svi = both(lambda: Odd(does), lambda i: (X.clone(),), between=between, compiled=0)
    assert len(caught) == 1 and "stay eager" in svi.explain()


def test_the_line_of_a_notebooks_cell_is_named() -> None:
    cell = "def model(x):\n    z = pyro.sample('z', dist.Normal(0.0, 1.0))\n    z.item()"
    space = {"__name__": "__main__", "pyro": pyro, "dist": dist}
    exec(compile(cell, "<ipython-input-1>", "exec"), space)
    svi = SVI(space["model"], plain_guide, plain_adam(), Trace_ELBO(), compile=True)
    with pytest.warns(UserWarning, match=r"\(<ipython-input-1>:3\)"):
        for _ in range(4):
            svi.step(X)


@dataclass
class Tempered(Messenger):
    """Handlers that are equal and have no hash."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__init__()


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("around", "words"),
    [
        (Tempered, "a handler around a step that cannot be told"),
        (Seeing, "a mode of torch's around a step"),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast around a step"),
    ],
)
def test_what_is_around_a_step_may_keep_it_eager(around: Any, words: str) -> None:
    with pytest.warns(UserWarning, match=f"steps stay eager: {words}") as caught:
        both(around=lambda i: around(), compiled=0)
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("form", ["coo", "csr", "object", "gradient"])
def test_strange_arguments_stay_eager(form: str) -> None:
    eye = {
        "coo": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "object": type("Eye", (), {"__matmul__": lambda self, x: x})(),
        "gradient": torch.eye(3).requires_grad_(),
    }[form]

    def model(eye: Any) -> None:
        observe(draw(), (eye @ X[:, None])[:, 0].detach())

    with pytest.warns(UserWarning, match="steps stay eager: an argument ") as caught:
        both(lambda: model, lambda i: (eye,), compiled=0)
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_what_is_no_loss_of_ours_or_trains_nothing_stays_eager() -> None:
    with pytest.warns(UserWarning, match="steps stay eager: those of TraceEnum_ELBO are not rec"):
        svi = SVI(plain, plain_guide, plain_adam(), TraceEnum_ELBO(), compile=True)
    svi.step(X)
    assert svi.explain().startswith("steps are eager")
    svi = SVI(plain, lambda x: draw(), plain_adam(), Trace_ELBO(), compile=True)
    with pytest.warns(UserWarning, match="the programs have no parameters"):
        for _ in range(6):
            svi.step(X)
    for value in (0, 1, "auto", None):
        with pytest.raises(ValueError, match="expected compile to be True or False, got"):
            SVI(plain, plain_guide, plain_adam(), Trace_ELBO(), compile=value)  # type: ignore
    for loss in ("elbo", Trace_ELBO, None):
        with pytest.raises(TypeError, match=r"expected one of Pyro's ELBOs as loss, such as Tra"):
            SVI(plain, plain_guide, plain_adam(), loss)  # type: ignore


def test_modes_of_gradients_around_a_step_are_eager_once() -> None:
    def root(x: Tensor) -> None:
        z = draw()
        observe(z + (x * z.square()).sum().sqrt(), x)

    svi = SVI(root, plain_guide, plain_adam(), Trace_ELBO(), compile=True)
    for _ in range(6):
        svi.step(X.abs())
    with torch.autograd.graph.save_on_cpu():
        svi.step(X.abs())
    with torch.autograd.set_detect_anomaly(True):
        with pytest.warns(UserWarning, match="Error detected in"), pytest.raises(RuntimeError):
            svi.step(0 * X)  # whose root has no gradient
    svi.step(X.abs())
    assert svi.compiled_steps == 3


# ------------------------------------------------------------------- gradients, errors, conditions


@pytest.mark.filterwarnings("ignore:the compiled step is dropped")
@pytest.mark.parametrize("optim", [pyro.optim.RMSprop, pyro.optim.AdamW])
def test_a_gradient_of_zero_is_another_than_none(optim: Any) -> None:
    """By weight decay: a head that no step has used stays, and moves from then on."""

    def make() -> Model:
        network = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])

        def model(x: Tensor, head: int) -> None:
            pyro.module("network", network)
            observe(network[head](draw().reshape(1))[0], x)

        return model

    heads = [0] * 8 + [1] + [0] * 8
    decaying = {"lr": 0.02, "weight_decay": 0.1}
    both(make, lambda i: (X, heads[i]), optim=lambda: optim(decaying), steps=17, compiled=None)


@pytest.mark.parametrize("optim", [pyro.optim.Adam, pyro.optim.RMSprop])
def test_gradients_that_were_taken_away_are_no_other_step(optim: Any) -> None:
    def between(i: int, svi: Any) -> None:
        for p in pyro.get_param_store()._params.values():
            p.grad = None

    both(optim=lambda: optim({"lr": 0.02}), between=between)


@pytest.mark.parametrize("between", ["another batch", "the loss"])
@pytest.mark.parametrize("family", [AutoNormal, AutoIAFNormal])
def test_what_a_guide_makes_anew_is_its_own(between: str, family: type) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("columns", 2):
            mean = pyro.sample("z", dist.Normal(0.0, 1.0)).mean()
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    svi = SVI(model, family(model), plain_adam(), Trace_ELBO(), compile=True)
    for _ in range(8):
        svi.step(X)
        svi.evaluate_loss(X) if between == "the loss" else svi.step(X[:2])
    assert svi.compiled_steps == 4


@pytest.mark.parametrize("validates", [True, False])
def test_torchs_own_validation_stays_as_it_is(validates: bool) -> None:
    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Exponential(draw().exp()).expand((3,)).to_event(1), obs=x)

    before = Distribution._validate_args
    Distribution.set_default_validate_args(validates)
    try:
        fails = "ValueError: " if validates else ""  # of the -1 among the data
        both(lambda: model, fails=fails, compiled=0 if validates else 6)
        assert Distribution._validate_args is validates
    finally:
        Distribution.set_default_validate_args(before)


def test_an_index_out_of_bounds_is_the_error_of_an_eager_step() -> None:
    def make() -> Model:
        table = nn.Embedding(3, 3)

        def model(k: Tensor) -> None:
            pyro.module("table", table)
            observe(table(k)[:, 0] * draw(), X)

        return model

    def category(x: Tensor) -> None:
        pyro.sample("x", dist.Categorical(torch.tensor([0.5, 0.5]) + 0 * draw()), obs=x)

    def batches(i: int) -> tuple[Tensor]:
        return (torch.tensor([0, 1, 2 if i < 8 else 7]),)

    both(make, batches, fails="IndexError: ", compiled=4)
    both(lambda: category, lambda i: (batches(i)[0][-1] - 1.0,), fails="ValueError: ", compiled=4)


def test_a_nan_leaves_the_parameters() -> None:
    bad = torch.full_like(X, torch.nan)
    both(batches=lambda i: (X if i < 8 else bad,), fails="ValueError: ", compiled=4)
    assert pyro.param("loc").isfinite()


def test_conditions_that_often_fail_drop_the_compiled_step() -> None:
    """Masks that are alike in model and guide, and that is not always so."""

    def model(x: Tensor, keep: Tensor, other: Tensor) -> None:
        with poutine.mask(mask=keep):
            observe(draw(), x)

    def masked(x: Tensor, keep: Tensor, other: Tensor) -> None:
        with poutine.mask(mask=other):
            plain_guide(x)

    yes, no = torch.tensor(True), torch.tensor(False)
    batches = [(X, yes, other) for other in [yes] * 6 + [no, yes] * 2 + [no] * 3]
    runs = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(model, masked, plain_adam(), TraceMeanField_ELBO(), compile=compile)
        losses = [svi.step(*batch) for batch in batches[:10]]
        with pytest.warns(UserWarning, match="is dropped") if compile else nullcontext():
            losses += [svi.step(*batch) for batch in batches[10:]]
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-9)
    assert svi.compiled_steps == 4


def test_an_interrupted_recording_leaves_nothing() -> None:
    fails = {"is": False}

    def model(x: Tensor) -> None:
        if fails["is"]:
            raise KeyboardInterrupt
        observe(draw(), x)

    svi = SVI(model, plain_guide, plain_adam(), Trace_ELBO(), compile=True)
    for i in range(8):
        fails["is"] = i == 2  # the step that would be recorded
        with pytest.raises(KeyboardInterrupt) if fails["is"] else nullcontext():
            svi.step(X)
    assert svi.compiled_steps == 3


# ----------------------------------------------------------------------------------------- audits


def test_a_wrong_or_broken_record_is_found_when_it_is_proven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(self: Compiled, batch: Any) -> list[float]:
        return [one + 1 for one in run(self, batch)[:3]] + [1.0, 1.0]

    def broken(self: Compiled, batch: Any) -> Any:
        raise RuntimeError("no room")

    run = Compiled.run
    monkeypatch.setattr(Compiled, "run", wrong)
    with pytest.warns(UserWarning, match="the step after the recorded one has another loss"):
        both(compiled=0)
    monkeypatch.setattr(Compiled, "run", broken)
    with pytest.warns(UserWarning, match="steps stay eager: .* ended with RuntimeE.*no room"):
        both(compiled=0)


def test_audits_come_after_1_2_4_8_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    audited: list[int] = []
    audit = compiler.Compiler._audit

    def counted(self: Any, kind: Any, *args: Any) -> None:
        audited.append(kind.uses)
        audit(self, kind, *args)

    monkeypatch.setattr(compiler.Compiler, "_audit", counted)
    both(steps=40, compiled=36)
    assert audited == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("kind", ["Adam", "RMSprop"])
def test_an_audit_sees_a_python_value_that_changed(kind: str) -> None:
    scale = {"is": 1.0}

    def model(x: Tensor) -> None:
        observe(draw() * scale["is"], x)

    svi = SVI(model, plain_guide, getattr(pyro.optim, kind)({}), Trace_ELBO(), compile=True)
    for _ in range(7):
        svi.step(X)
    scale["is"] = 2.0
    with pytest.warns(UserWarning, match="after 3 uses of the compiled step, one has another loss"):
        svi.step(X)
    assert "another loss" in svi.explain() and svi.compiled_steps == 3


@pytest.mark.parametrize("kind", ["SGD", "Adam", "ClippedAdam", "RMSprop"])
def test_audits_change_no_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, with the optimizer's counts and batch norm's buffers."""
    runs = []
    for audits in (True, False):
        if not audits:
            monkeypatch.setattr(compiler.Compiler, "_audit", lambda *args: None)
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 1))

        def model(x: Tensor, net: nn.Module = net) -> None:
            pyro.module("net", net)
            observe(net((draw() + x)[:, None])[:, 0], x)

        optim = getattr(pyro.optim, kind)({"lr": 0.01})
        svi = SVI(model, plain_guide, optim, Trace_ELBO(), compile=True)
        losses = [svi.step(X) for _ in range(16)]
        assert svi.compiled_steps == 12
        runs.append((losses, [b.clone() for b in net.buffers()], torch.get_rng_state()))
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1])) and torch.equal(runs[0][2], runs[1][2])


# ------------------------------------------------------------------------- explanations and copies


def test_what_was_compiled_is_explained() -> None:
    svi = SVI(plain, plain_guide, plain_adam(), Trace_ELBO(), compile=True)
    assert svi.explain() == "no step was compiled yet: the first ones are eager"
    for _ in range(4):
        svi.step(X)
    assert svi.explain() == "steps are compiled by the C compiler after 4 eager ones"
    eager = SVI(plain, plain_guide, plain_adam(), Trace_ELBO())
    eager.recompile()
    assert eager.explain().startswith("steps are eager: compile=False")


class Program(PyroModule):
    """A model or a guide that can be pickled."""

    def __init__(self, is_guide: bool) -> None:
        super().__init__()
        self.is_guide = is_guide
        self.loc = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(self.loc, 0.5 if self.is_guide else 1.0))
        if not self.is_guide:
            observe(z, x)


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_copies_have_records_of_their_own(how: str) -> None:
    with pyro.settings.context(module_local_params=True):
        svi = compiled(Program(False), Program(True))
        if how == "pickle":
            other = pickle.loads(pickle.dumps(svi))
        else:
            other = getattr(copy, how)(svi)
        assert other._compiler.svi is other and svi._compiler.svi is svi
        before = float(svi.guide.loc.detach())
        for _ in range(6):
            other.step(X)
        assert other.compiled_steps == 4
        assert float(other.guide.loc.detach()) != before
        assert (float(svi.guide.loc.detach()) == before) == (how != "copy")
        svi.step(X)
        assert svi.compiled_steps == 3


def test_a_copy_of_a_guide_leaves_its_step_compiled() -> None:
    """Pyro takes the model from a guide that is copied."""
    guide = AutoNormal(plain)
    svi = compiled(guide=guide)
    copy.deepcopy(guide)
    svi.step(X)
    assert svi.compiled_steps == 3
