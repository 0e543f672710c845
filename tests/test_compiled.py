"""SVI and fit with recorded steps: when there are any, and that they are as eager ones."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import PyroOptim
from steps import (
    IMAGES,
    adam,
    by_pyro_module,
    coin,
    coin_guide,
    run,
    vae,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils._pytree import tree_flatten

from pyro_vi import NonFiniteError, fit, fitting, recorder, warmup
from pyro_vi.calls import Calls
from pyro_vi.compiled import Recorded, record
from pyro_vi.elbo import told
from pyro_vi.engine import Engine
from pyro_vi.families import FullCovariance
from pyro_vi.optimizers import OneOptimizer
from pyro_vi.svi import SVI, eager_steps

pytestmark = pytest.mark.usefixtures("double")


OPTIMIZERS: dict[str, Callable[[], PyroOptim]] = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05, "betas": (0.8, 0.99)}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.05, "weight_decay": 0.1}),
    "AMSGrad": lambda: pyro.optim.Adam({"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    "SGD": lambda: pyro.optim.SGD({"lr": 1e-3}),
    "SGD with momentum": lambda: pyro.optim.SGD(
        {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    ),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam(
        {"lr": 0.05, "lrd": 0.9, "clip_norm": 0.5, "weight_decay": 0.1}
    ),
    "clipped by tensor": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.3}),
    "clipped by value": lambda: pyro.optim.SGD({"lr": 0.01}, {"clip_value": 0.3}),
    "arguments by parameter": lambda: pyro.optim.Adam(
        lambda name: {"lr": 0.1 if name == "a" else 0.01}
    ),
    "one for all": lambda: OneOptimizer(
        partial(torch.optim.AdamW, lr=0.05),
        schedule=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.8),
        clip_norm=0.7,
    ),
    "outside the graph": lambda: pyro.optim.RMSprop({"lr": 0.01}),
}


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_the_optimizer(name: str) -> None:
    _, expected, theirs = run(OPTIMIZERS[name](), False)
    svi, found, mine = run(OPTIMIZERS[name](), True)
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(svi._recorder.recorded) == 1
    (numbers, spec), (others, other) = tree_flatten(mine), tree_flatten(theirs)
    assert spec == other
    for one, another in zip(numbers, others, strict=True):
        if one is not None and another is not None:
            one, another = (torch.as_tensor(value).double() for value in (one, another))
            torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-9)


def test_a_compiled_step_is_the_eager_one() -> None:
    """By Inductor, the optimizer in it; the second time from Inductor's cache."""
    _, expected, _ = run(pyro.optim.Adam({"lr": 0.05}), False)
    with fresh_cache():
        for hits in (0, 1):
            counters.clear()
            svi, found, _ = run(pyro.optim.Adam({"lr": 0.05}), True)
            assert found == pytest.approx(expected, rel=1e-9)
            assert isinstance(found[-1], float)
            (recorded,) = svi._recorder.recorded
            assert recorded._graph._run is not recorded._graph.module
            assert counters["inductor"]["fxgraph_cache_hit"] == hits


@pytest.mark.usefixtures("recorded_alone")
def test_batches_of_another_shape_stay_eager() -> None:
    torch.manual_seed(0)
    svi = SVI(coin, coin_guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), compile=True)
    x = torch.tensor([1.0, 0.0, 1.0, 1.0])
    losses = [svi.step(x) for _ in range(4)]
    assert len(svi._recorder.recorded) == 1
    assert all(isinstance(svi.step(x[:3]), float) for _ in range(3))
    assert len(svi._recorder.recorded) == 1 and losses[0] != losses[-1]
    svi.step(x.float())  # of another dtype
    svi.step(torch.stack([x, x], -1)[:, 0])  # of other strides
    assert len(svi._recorder.recorded) == 1


@pytest.mark.usefixtures("recorded_alone")
def test_recording_leaves_generators_and_buffers() -> None:
    torch.manual_seed(0)
    model, guide, loss, args = by_pyro_module()
    decoder = model.__closure__[0].cell_contents  # type: ignore[attr-defined]
    svi = SVI(model, guide, adam(), loss)
    _, parameters = svi._evaluate(*args)
    svi._update(parameters)
    buffers = [b.clone() for b in decoder.buffers()]
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    recorded = record(svi, Calls(), parameters, args, {})
    assert torch.equal(before, torch.get_rng_state())
    assert (numbers == np.random.get_state()[1]).all()
    assert all(torch.equal(b, old) for b, old in zip(decoder.buffers(), buffers, strict=True))
    recorded(list(args))
    assert not torch.equal(next(decoder.buffers()), buffers[0])  # batch norm's, by the graph


class Remembering(nn.Module):
    """A decoder that keeps something from run to run, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.seen = how, 0, torch.zeros(())
        self.register_buffer("mean", torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        if self.how == "buffer":
            self.mean = 0.9 * self.mean + 0.1 * z.detach()
            return z + self.mean + self.shift
        if self.how == "attribute":
            self.seen = self.seen + 1.0
            return z + self.seen + self.shift
        if self.how == "number":
            self.calls += 1
            return z + self.calls + self.shift
        self.seen = z.detach()  # which is never read
        return z + self.shift


def remembering(how: str) -> tuple[SVI, Tensor]:
    pyro.clear_param_store()
    net = Remembering(how)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(net(z), 1.0).expand(x.shape).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))

    torch.manual_seed(0)
    return SVI(model, guide, adam(), Trace_ELBO(), compile=True), torch.ones(3)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize("how", ["buffer", "cache"])
def test_buffers_that_are_bound_anew_are_followed(how: str) -> None:
    svi, x = remembering(how)
    found = [svi.step(x) for _ in range(6)]
    assert svi._recorder.recorded
    svi, x = remembering(how)
    svi._recorder = None
    assert found == pytest.approx([svi.step(x) for _ in range(6)], rel=1e-10)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize(("how", "name"), [("attribute", "seen"), ("number", "calls")])
def test_what_a_module_remembers_besides_is_refused(how: str, name: str) -> None:
    svi, x = remembering(how)
    with pytest.warns(UserWarning, match=f"Remembering sets its '{name}' in a run"):
        for _ in range(3):
            svi.step(x)
    assert not svi._recorder.recorded


class Odd:
    """Programs of one latent, whose model does something that no graph can follow."""

    calls = 0

    def __init__(self, does: str) -> None:
        self.does = does

    def __call__(self, x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        shift = 0.0
        if self.does == "item":
            shift = z.item()  # here
        elif self.does == "branch" and z > 0:  # here
            shift = 1.0
        elif self.does == "numpy":
            shift = float(np.random.rand())
        elif self.does == "random":
            shift = random.random()
        elif self.does == "counter":
            self.calls += 1
            shift = float(self.calls)
        elif self.does == "nonzero":
            x = x[x > 0]  # here
        pyro.sample("x", dist.Normal(z + shift, 1.0).expand(x.shape).to_event(1), obs=x)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("item", r"test_compiled\.py:\d+\)"),
        ("branch", r"test_compiled\.py:\d+\)"),
        ("nonzero", r"test_compiled\.py:\d+\)"),
        ("numpy", "random numbers of Python or NumPy"),
        ("random", "random numbers of Python or NumPy"),
        ("counter", "Odd sets its 'calls' in a run, and the next may read it"),
    ],
)
def test_what_no_graph_follows_stays_eager_and_is_said_once(does: str, reason: str) -> None:
    model = Odd(does)
    x = torch.tensor([0.3, -0.2, 1.5])

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), compile=True)
    svi.step(x)
    with pytest.warns(UserWarning, match=f"steps stay eager: .*{reason}") as caught:
        for _ in range(4):
            svi.step(x)
    assert len([w for w in caught if "stay eager" in str(w.message)]) == 1
    assert not svi._recorder.recorded


def test_the_line_of_a_notebooks_cell_is_named() -> None:
    cell = "def model(x):\n    z = pyro.sample('z', dist.Normal(0.0, 1.0))\n    z.item()"
    space = {"__name__": "__main__", "pyro": pyro, "dist": dist}
    exec(compile(cell, "<ipython-input-1>", "exec"), space)
    model = space["model"]
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), compile=True)
    with pytest.warns(UserWarning, match=r"\(<ipython-input-1>:3\)"):
        for _ in range(4):
            svi.step(torch.tensor(0.5))


FITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm-up": {"kl_weight": warmup(6)},
    "schedule and clipping": {
        "schedule": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.8),
        "clip_norm": 0.5,
    },
    "average and held-out": {"average": 0.9, "heldout": IMAGES[:2], "heldout_every": 3},
    "importance-weighted": {
        "loss": RenyiELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    },
}


@pytest.fixture
def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps are read as on a GPU, many at once."""
    monkeypatch.setattr(
        fitting, "Engine", lambda *args, **options: Engine(*args, **{**options, "late": True})
    )


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize(
    ("name", "late"),
    [*((name, False) for name in FITS), ("warm-up", True), ("schedule and clipping", True)],
)
def test_a_fit_is_the_same_compiled(name: str, late: bool, request: pytest.FixtureRequest) -> None:
    model, guide, loss, _ = vae(FullCovariance, TraceMeanField_ELBO())
    options = {"loss": loss, "steps": 8, "batch_size": 3, "progress": False, **FITS[name]}
    eager = fit(model, guide, IMAGES, **options)
    if late:
        request.getfixturevalue("read_late")
    compiled = fit(model, guide, IMAGES, compile=True, **options)
    for part in ("losses", "reconstruction", "kl", "heldout"):
        torch.testing.assert_close(
            getattr(compiled, part), getattr(eager, part), rtol=1e-6, atol=1e-8
        )


@pytest.mark.usefixtures("recorded_alone")
def test_late_steps_after_a_bad_one_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that the graph finds bad and the eager step does not: as if nothing had been."""
    model, guide, loss, _ = vae(FullCovariance, TraceMeanField_ELBO())
    options = {"loss": loss, "steps": 12, "batch_size": 3, "progress": False}
    eager = fit(model, guide, IMAGES, **options)
    run, calls = Recorded.__call__, []

    def once_bad(self: Recorded, batch: Any) -> Tensor:
        calls.append(None)
        if len(calls) == 4:
            self._step.alive.fill_(False)
        status = run(self, batch)
        if len(calls) == 4:
            status[3] = 0.0
        return status

    monkeypatch.setattr(Recorded, "__call__", once_bad)
    monkeypatch.setattr(
        fitting, "Engine", lambda *args, **options: Engine(*args, **{**options, "late": True})
    )
    compiled = fit(model, guide, IMAGES, compile=True, **options)
    assert len(calls) == 9 + 5  # five after the bad one, twice
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize("late", [False, True])
def test_a_bad_step_names_its_site_and_keeps_the_last_finite_parameters(
    late: bool, request: pytest.FixtureRequest
) -> None:
    """Three steps to the cliff: the scale is the exponential of a parameter that runs away."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(5.0))
        pyro.sample("z", dist.Normal(0.0, 1.0 + 0 * (a - 2.0).sqrt()))

    optim = partial(torch.optim.SGD, lr=1.0)

    def slide(x: Tensor) -> None:
        guide(x)
        pyro.factor("slope", pyro.param("a"), has_rsample=True)

    errors = []
    for compile in (False, True):
        if compile and late:
            request.getfixturevalue("read_late")
        with pytest.raises(NonFiniteError) as caught:
            fit(
                model, slide, torch.zeros(4), optim=optim, steps=50, compile=compile, progress=False
            )
        errors.append(caught.value)
    assert errors[0].step == errors[1].step > 3
    assert str(errors[0]) == str(errors[1])
    for error in errors:
        assert all(t.isfinite().all() for t in error.fit.model.state.tensors().values())


def test_wrong_ways_to_compile_are_refused() -> None:
    with pytest.raises(ValueError, match="expected compile to be True, False or 'auto', got 'yes'"):
        SVI(coin, coin_guide, pyro.optim.Adam({}), Trace_ELBO(), compile="yes")  # type: ignore[arg-type]


def test_a_step_is_compiled_by_counts_alone() -> None:
    loss = told(Trace_ELBO())
    assert [eager_steps("auto", loss, steps) for steps in (4_999, 5_000)] == [None, 2]
    assert eager_steps("auto", loss) == 5_000
    assert (eager_steps(True, loss), eager_steps(False, loss)) == (2, None)


def test_other_losses_stay_eager() -> None:
    enumerated = TraceEnum_ELBO()
    with pytest.warns(UserWarning, match="steps stay eager: those of TraceEnum_ELBO are not rec"):
        svi = SVI(coin, coin_guide, pyro.optim.Adam({}), enumerated, compile=True)
    assert svi._recorder is None
    assert SVI(coin, coin_guide, pyro.optim.Adam({}), enumerated)._recorder is None


def test_graphs_that_share_an_optimizer_count_its_steps_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By Inductor, of two SVIs, and of two shapes: what it makes counts no versions itself."""
    monkeypatch.setattr(recorder, "_OTHER", 4)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))

    def losses(cls: type[pyro.infer.SVI], **options: Any) -> tuple[list[Any], list[float]]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        optim, x = pyro.optim.Adam({"lr": 0.1}), torch.arange(6.0)
        one, other = (cls(model, guide, optim, Trace_ELBO(), **options) for _ in range(2))
        found = []
        for _ in range(12):
            found += [one.step(x), one.step(x[:4]), other.step(x + 1)]
        return [one, other], found + [one.step(x) for _ in range(9)] + [other.step(x)]

    _, expected = losses(pyro.infer.SVI)
    ours, found = losses(SVI, compile=True)
    assert [svi.compiled_steps for svi in ours] == [25, 10]
    assert found == pytest.approx(expected, rel=1e-9)


def test_an_index_out_of_bounds_does_not_end_the_process() -> None:
    """In a thread of OpenMP's an exception cannot be caught."""
    script = """
import pyro, torch
import pyro.distributions as dist
from pyro.infer import Trace_ELBO
from pyro_vi import SVI
torch.set_num_threads(2)
layer = torch.nn.Linear(3, 4)
def model(x, k):
    pyro.module("layer", layer)
    with pyro.plate("data", len(k)):
        pyro.sample("k", dist.Categorical(logits=layer(x)), obs=k)
x, k = torch.randn(100_000, 3), torch.arange(100_000) % 4
svi = SVI(model, lambda x, k: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), compile=True)
for _ in range(5):
    svi.step(x, k)
k[17] = 9
try:
    svi.step(x, k)
except ValueError as error:
    print(svi.compiled_steps, str(error).partition(":")[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "2 Error while computing log_prob at site 'k'\n", done.stderr
