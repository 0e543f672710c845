"""`pyro_vi.SVI` stands in for Pyro's, whatever is strange in a program or a batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from places import X, draw, guide, observe, times
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuide, AutoIAFNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vi import SVI, recorder
from pyro_vi.capture import Graph
from pyro_vi.compiled import Recorded

pytestmark = pytest.mark.usefixtures("double", "recorded_alone")

Batches = Callable[[int], tuple[Any, ...]]
X2 = X.double()


def run(
    svi: type[pyro.infer.SVI],
    model: Callable[..., Any],
    batches: Batches = lambda i: (X2,),
    steps: int = 12,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    optim: Any = None,
    **options: Any,
) -> tuple[Any, list[float], str]:
    """An SVI after some steps, its losses, and the error that ended them."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    made = svi(model, guide, optim or pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), **options)
    losses, error = list[float](), ""
    try:
        for i in range(steps):
            with around():
                losses.append(made.step(*batches(i)))
    except (ValueError, RuntimeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return made, losses, error


def same(model: Callable[[], Callable[..., Any]], *args: Any, **kwargs: Any) -> tuple[SVI, str]:
    """Ours, compiled, after it has done as Pyro's; and the error of both."""
    optim = kwargs.pop("optim", lambda: None)
    _, expected, error = run(pyro.infer.SVI, model(), *args, optim=optim(), **kwargs)
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    ours, found, other = run(SVI, model(), *args, optim=optim(), compile=True, **kwargs)
    assert found == pytest.approx(expected, rel=1e-9)
    assert error == other
    for name, value in pyro.get_param_store().items():
        torch.testing.assert_close(value.detach(), store[name], rtol=1e-9, atol=1e-12)
    return ours, error


def one() -> Callable[..., Any]:
    return times(lambda: 1.0)


def test_torchs_own_validation_stays_off() -> None:
    def model(x: Tensor) -> None:
        rate = draw().exp()
        pyro.sample("x", dist.Exponential(rate).expand((3,)).to_event(1), obs=x)  # -1 among them

    Distribution.set_default_validate_args(False)
    try:
        ours, error = same(lambda: model)
        assert not error and ours.compiled_steps == 9
        assert Distribution._validate_args is False
    finally:
        Distribution.set_default_validate_args(True)


def test_an_index_out_of_bounds_is_pyros_error() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Categorical(torch.tensor([0.5, 0.5]) + 0 * draw()), obs=x)

    ours, error = same(lambda: model, lambda i: (torch.tensor(1.0 if i < 8 else 3.0),))
    assert error.startswith("ValueError: ") and "site 'x'" in error
    assert ours.compiled_steps == 5


def test_a_nan_leaves_the_parameters() -> None:
    bad = X2.clone().fill_(torch.nan)
    ours, error = same(one, lambda i: (X2 if i < 8 else bad,))
    assert error.startswith("ValueError: ") and ours.compiled_steps == 5
    assert pyro.param("loc").isfinite()


@pytest.mark.parametrize("clamps", [Tensor.clamp_, lambda w, *to: w.data.clamp_(*to)])
@pytest.mark.parametrize("optim", [pyro.optim.RMSprop, pyro.optim.Adam])
def test_parameters_that_a_program_sets_are_set(clamps: Any, optim: Any) -> None:
    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.5))
        with torch.no_grad():
            clamps(w, -0.1, 0.1)
        observe(draw() * 0 + w, x)

    ours, _ = same(lambda: model, optim=lambda: optim({"lr": 0.3}))
    assert ours.compiled_steps == 9


def test_conjugates_are_another_kind_of_batch() -> None:
    z = torch.complex(X2, 2 * X2)
    ours, _ = same(one, lambda i: (z.imag if i < 6 else z.conj().imag,))
    assert ours.compiled_steps == 3


def test_one_tensor_given_twice_is_another_kind_of_batch() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        observe(draw() * (2.0 if x is y else 1.0), x)

    other = X2 + 1
    found = []
    for options in ({}, {"compile": True}):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = (SVI if options else pyro.infer.SVI)(
            model, lambda x, y: guide(x), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), **options
        )
        found.append([svi.step(X2, other if i < 6 else X2) for i in range(9)])
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("form", ["coo", "csr"])
def test_sparse_tensors_stay_eager(form: str) -> None:
    eye = torch.eye(3).to_sparse_csr() if form == "csr" else torch.eye(3).to_sparse()

    def given(x: Tensor) -> None:
        observe(draw(), (x @ X2[:, None])[:, 0])

    def held(x: Tensor) -> None:
        observe(draw(), (eye @ x[:, None])[:, 0])

    with pytest.warns(UserWarning, match="steps stay eager: an argument .* is not plain"):
        same(lambda: given, lambda i: (eye,))
    with pytest.warns(UserWarning, match="steps stay eager: "):
        same(lambda: held)


def test_what_recording_cannot_do_stays_eager() -> None:
    def model(x: Tensor) -> None:
        observe(draw(), x.as_subclass(Tensor))

    with pytest.warns(UserWarning, match="steps stay eager: "):
        same(lambda: model)


@dataclass
class Tempered(Messenger):
    """Handlers that are equal and have no hash."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__init__()


def test_a_handler_without_a_hash_stays_eager() -> None:
    with pytest.warns(UserWarning, match="a handler around a step that cannot be told"):
        same(one, around=Tempered)


def test_a_mode_of_torch_is_another_kind_of_batch() -> None:
    class Doubled(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            found = func(*args, **(kwargs or {}))
            return found * 2 if func is Tensor.exp else found

    def model(x: Tensor) -> None:
        observe(draw().exp(), x)

    calls = iter([*[nullcontext] * 6, *[Doubled] * 6] * 2)
    same(lambda: model, around=lambda: next(calls)())


def test_tensors_that_a_run_binds_are_bound() -> None:
    """What a program shows of itself, such as a layer its last activations."""
    found = []
    for svi, options in ((pyro.infer.SVI, {}), (SVI, {"compile": True})):
        net = nn.Identity()

        def model(x: Tensor, net: nn.Module = net) -> None:
            z = draw()
            net.last = z.detach() * 2
            observe(z, x)

        seen = list[float]()

        def batches(i: int, net: Any = net, seen: list[float] = seen) -> tuple[Any, ...]:
            seen.append(float(getattr(net, "last", 0.0)))
            return (X2,)

        made, *_ = run(svi, model, batches, **options)
        found.append(seen)
    assert made.compiled_steps == 9
    assert found[1] == pytest.approx(found[0], rel=1e-9) and len(set(found[1])) == 12


def test_a_recurrent_layer_is_recorded() -> None:
    def build() -> Callable[..., Any]:
        torch.manual_seed(0)
        layer = nn.LSTM(1, 2, batch_first=True)

        def model(x: Tensor) -> None:
            pyro.module("layer", layer)
            out, _ = layer(draw().expand(1, 4, 1))
            observe(out[0, -1, 0], x)

        return model

    ours, _ = same(build)
    assert ours.compiled_steps == 9


def test_many_kinds_of_batches_leave_room_for_one(recwarn: pytest.WarningsRecorder) -> None:
    """A weight of the KL as a number that rises for long, and then stays."""

    def model(x: Tensor, weight: float) -> None:
        observe(draw() * weight, x)

    pyro.clear_param_store()
    svi = SVI(
        model,
        lambda x, weight: guide(x),
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(),
        compile=True,
    )
    for i in range(170):
        svi.step(X2, min(1.0, i / 150))
    assert svi.compiled_steps == 17
    said = [str(one.message) for one in recwarn if "kinds of batches so far" in str(one.message)]
    assert len(said) == 1


@pytest.mark.parametrize("value", [0, 1, "yes", None, 1.0])
def test_compile_is_a_bool_or_auto(value: Any) -> None:
    with pytest.raises(ValueError, match="expected compile to be True, False or 'auto'"):
        SVI(one(), guide, pyro.optim.Adam({}), Trace_ELBO(), compile=value)


@pytest.mark.parametrize("loss", ["elbo", Trace_ELBO, None])
def test_a_loss_is_an_elbo_or_a_function(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"expected one of Pyro's ELBOs as loss, such as Trace_E"):
        SVI(one(), guide, pyro.optim.Adam({}), loss)


def test_no_steps_are_compiled_of_other_losses() -> None:
    svi = SVI(one(), guide, pyro.optim.Adam({}), TraceGraph_ELBO())
    svi.step(X2)
    assert svi.compiled_steps == 0


def test_what_inductor_makes_is_held_against_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Graph, batch: Any) -> None:
        graph._run = lambda *inputs: [one + 1 for one in graph.module(*inputs)]

    monkeypatch.setattr(Graph, "compile", wrong)
    with pytest.warns(UserWarning, match="what Inductor made of the record has another loss"):
        ours, _ = same(one)
    assert ours.compiled_steps == 0


def test_late_looks_are_at_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_AUDIT", 4)
    torch.manual_seed(0)
    pyro.clear_param_store()
    svi = SVI(one(), guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), compile=True)
    for _ in range(5):
        svi.step(X2)
    (recorded,) = svi._recorder.recorded
    graph = recorded._graph
    graph._run = lambda *inputs: [one + 1 for one in graph.module(*inputs)]
    svi.step(X2)
    with pytest.warns(UserWarning, match="after 4 compiled steps, one has another loss.*before"):
        svi.step(X2)


def test_late_looks_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_AUDIT", 1)
    monkeypatch.setattr(recorder, "_OFTEN", 3)
    pyro.clear_param_store()
    svi = SVI(one(), guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), compile=True)
    eager = []
    for i in range(20):
        before = svi.compiled_steps
        svi.step(X2)
        if svi.compiled_steps == before:
            eager.append(i - 2)
    assert eager == [-2, -1, 0, 1, 2, 3, 4, 6, 8, 9, 12, 15, 16]


@pytest.mark.parametrize("between", ["another batch", "the loss"])
@pytest.mark.parametrize("family", [AutoNormal, AutoIAFNormal])
def test_what_a_guide_makes_anew_is_its_own(between: str, family: type[AutoGuide]) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("columns", 2):
            mean = pyro.sample("z", dist.Normal(0.0, 1.0)).mean()
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    pyro.clear_param_store()
    guide = family(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), compile=True)
    for _ in range(8):
        svi.step(X2)
        if between == "the loss":
            svi.evaluate_loss(X2)
        else:
            svi.step(X2[:2])
    assert svi.compiled_steps == 5


def test_a_layer_that_nobody_uses_is_no_warning() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> None:
            observe(draw(), x)

    model = Model()
    model.head(torch.ones(1)).sum().backward()
    same(lambda: model)


@pytest.mark.parametrize("adds", ["a penalty", "loss_and_grads"])
def test_gradients_that_are_there_before_a_step_are_part_of_it(adds: str) -> None:
    def losses(svi: type[pyro.infer.SVI], **options: Any) -> tuple[Any, list[float]]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        model = one()
        made = svi(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), **options)
        found = []
        for i in range(16):
            if i % 4 == 3:
                if adds == "a penalty":
                    (5 * pyro.param("loc") ** 2).backward()
                else:
                    made.loss_and_grads(model, guide, X2)
            found.append(made.step(X2))
        return made, found

    _, expected = losses(pyro.infer.SVI)
    ours, found = losses(SVI, compile=True)
    assert found == pytest.approx(expected, rel=1e-9)
    assert ours.compiled_steps == 9  # of 16: three came before, four were given gradients


def test_an_optimizer_outside_of_the_graph_leaves_zero_gradients() -> None:
    ours, _ = same(one, optim=lambda: pyro.optim.RMSprop({"lr": 0.02}))
    (parameter,) = pyro.get_param_store()._params.values()
    assert ours.compiled_steps == 9
    assert parameter.grad is not None and not parameter.grad.any()


def test_a_first_step_has_pyros_parameters() -> None:
    """Autoguides make their parameters anew in it."""

    class Halved(pyro.optim.PyroOptim):
        def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            for p in params:
                p.grad.mul_(0.5)
            super().__call__(params, *args, **kwargs)

    found = []
    for svi in (pyro.infer.SVI, SVI):
        pyro.clear_param_store()
        torch.manual_seed(0)
        optim = Halved(torch.optim.Adam, {"lr": 0.02}, {"clip_value": 5.0})
        model = one()
        made = svi(model, AutoNormal(model), optim, Trace_ELBO())
        found.append((made.step(X2), made.step(X2), len(optim.optim_objs)))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_anomalies_are_looked_for_in_eager_steps() -> None:
    def root(x: Tensor) -> None:
        z = draw()
        observe(z + (x * z.square()).sum().sqrt(), x)

    svi = SVI(root, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), compile=True)
    for _ in range(6):
        svi.step(X2.abs())
    with torch.autograd.set_detect_anomaly(True):
        with pytest.warns(UserWarning, match="Error detected in"), pytest.raises(RuntimeError):
            svi.step(0 * X2)  # whose root has no gradient
    assert svi.compiled_steps == 3


def test_a_record_that_cannot_be_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(recorded: Recorded, batch: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(Recorded, "predict", broken)
    with pytest.warns(UserWarning, match="steps stay eager: the record ended with RuntimeE.*no ro"):
        ours, _ = same(one)
    assert ours.compiled_steps == 0


def test_an_option_that_changes_is_named() -> None:
    pyro.clear_param_store()
    svi = SVI(one(), guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), compile=True)
    for _ in range(4):
        svi.step(X2)
    (optimizer,) = svi.optim.optim_objs.values()
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)
    with pytest.warns(UserWarning, match=r"the optimizer's options are others \(betas\)"):
        svi.step(X2)
