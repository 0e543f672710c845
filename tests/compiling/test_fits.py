"""Compiled fits: the eager ones, whatever a block of steps is, and their errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import normal_mean, normal_mean_guide
from pyro.distributions import constraints
from pyro.infer import RenyiELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from steps import IMAGES, small_decoder, small_encoder, vae
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from pyro_vi import Fit, NonFiniteError, fit, warmup
from pyro_vi.families import MeanField
from pyro_vi.guides import Encoder, Joint
from pyro_vi.inference import trainer
from pyro_vi.models import VAE
from pyro_vi.weight_prior import WeightPrior
from pyro_vi.weighting import cyclical

fit = partial(fit, progress=False)
Adam, SGD = torch.optim.Adam, torch.optim.SGD
X = torch.tensor([0.3, -0.8, 1.9, 0.4, 1.0]).double()


def images() -> tuple[Any, Any, Any]:
    model, guide, _, (data,) = vae(MeanField, TraceMeanField_ELBO())
    return model, guide, data


def mean() -> tuple[Any, Any, Any]:
    return normal_mean, normal_mean_guide, X


def weight_prior() -> tuple[Any, Any, Any]:
    model = VAE((1, 4, 4), 2, decoder=small_decoder)
    prior = WeightPrior(model, model.decoder, 1.0)
    weights = AutoNormal(prior.weights, init_loc_fn=prior.init_loc_fn)
    encoder = Encoder((1, 4, 4), MeanField(2, 8), network=small_encoder)
    return prior, Joint(weights, encoder), IMAGES


def batch_norm() -> tuple[Any, Any, Any]:
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 16))
    encoder = nn.Sequential(nn.Dropout(0.3), nn.Linear(16, 2))

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x.flatten(1))

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x.flatten(1)), 0.5).to_event(1))

    return model, guide, IMAGES


def binarize(x: Tensor) -> Tensor:
    return (torch.rand_like(x) < 0.2 + 0.6 * x).double()


decay = partial(ExponentialLR, gamma=0.9)
importance = RenyiELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
FITS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "all data": (mean, {}),
    "all data, other draws": (images, {}),
    "minibatches": (images, {"batch_size": 3, "loss": TraceMeanField_ELBO()}),
    "transform that draws": (images, {"batch_size": 4, "transform": binarize}),
    "transform of all data": (images, {"transform": binarize}),
    "KL warm-up": (mean, {"kl_weight": warmup(9)}),
    "two weights": (
        mean,
        {"batch_size": 2, "kl_weight": cyclical(5), "reconstruction_weight": warmup(9)},
    ),
    "schedule and clipping": (mean, {"schedule": decay, "clip_norm": 0.5}),
    "schedule of minibatches": (
        mean,
        {"batch_size": 2, "schedule": partial(CosineAnnealingLR, T_max=5)},
    ),
    "Pyro's schedule": (
        mean,
        {
            "optim": pyro.optim.ExponentialLR(
                {"optimizer": Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
            )
        },
    ),
    "Pyro's ClippedAdam": (mean, {"optim": pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9})}),
    "another optimizer": (mean, {"optim": partial(torch.optim.RMSprop, lr=0.1)}),
    "another optimizer, scheduled": (
        mean,
        {"optim": partial(torch.optim.RMSprop, lr=0.1), "schedule": decay},
    ),
    "average": (mean, {"average": 0.9}),
    "average and held-out": (
        images,
        {"batch_size": 3, "average": 0.9, "heldout": IMAGES[:2], "heldout_every": 3},
    ),
    "importance-weighted": (images, {"batch_size": 3, "loss": importance}),
    "prior on weights": (weight_prior, {"batch_size": 3}),
    "batch norm and dropout": (batch_norm, {"batch_size": 3, "heldout": IMAGES[:2]}),
}


def fitted(name: str, block: int | None, patch: pytest.MonkeyPatch, **options: Any) -> Fit:
    """A fit of some steps, eager without a block."""
    make, others = FITS[name]
    torch.manual_seed(0)
    model, guide, data = make()
    if block is not None:
        patch.setattr(trainer, "BLOCK", block)
    common = {"optim": partial(SGD, lr=0.05, momentum=0.9), "steps": 16}
    compile = block is not None
    found = fit(model, guide, data, **{**common, **others, **options}, compile=compile)
    assert not compile or "steps are compiled by the C compiler" in found.compiled, found.compiled
    return found


PARTS = "losses", "reconstruction", "kl", "weights", "heldout"


@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_the_same_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an eager one to rounding, and to the last bit whatever a block is."""
    eager, *found = (fitted(name, block, monkeypatch) for block in (None, 1, 5))
    for part in PARTS:
        for one in found:
            torch.testing.assert_close(
                getattr(one, part), getattr(eager, part), rtol=1e-9, atol=1e-10
            )
            assert torch.equal(getattr(one, part), getattr(found[0], part))
    for program in ("model", "guide"):
        theirs = getattr(eager, program).state.tensors()
        first = getattr(found[0], program).state.tensors()
        for one in found:
            for key, tensor in getattr(one, program).state.tensors().items():
                torch.testing.assert_close(tensor, theirs[key], rtol=1e-8, atol=1e-9)
                assert torch.equal(tensor, first[key])


@pytest.mark.parametrize("name", ["transform that draws", "KL warm-up"])
def test_looking_at_held_out_data_changes_no_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, data = FITS[name][0]()
    alone = fitted(name, 50, monkeypatch)
    if name == "transform that draws":
        for every in (1, 7):
            looked = fitted(name, 50, monkeypatch, heldout=data[:2], heldout_every=every)
            assert torch.equal(looked.losses, alone.losses)
            assert len(looked.heldout) == -(-16 // every)
    shorter = fitted(name, 50, monkeypatch, steps=9)
    assert torch.equal(shorter.losses, alone.losses[:9])


@pytest.mark.filterwarnings("ignore:the restarts disagree")
def test_restarts_are_fits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [fitted("minibatches", block, monkeypatch, restarts=2) for block in (None, 2, 50)]
    for one in found[1:]:
        for mine, eager, first in zip(
            one.restarts, found[0].restarts, found[1].restarts, strict=True
        ):
            torch.testing.assert_close(mine.losses, eager.losses, rtol=1e-9, atol=1e-10)
            assert torch.equal(mine.losses, first.losses)
    assert len({float(one.losses[-1]) for one in found[1].restarts}) == 2


def test_a_fit_leaves_the_generator_as_an_eager_one() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fit(*mean(), steps=12, compile=True)
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------- what ends a fit


def falling(use: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], None]:
    """A model whose parameter falls by 1 / 32 a step, from 7 / 16, whatever it is used for."""

    def model(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.4375))
        pyro.factor("slope", -len(x) * a)
        with pyro.plate("data", len(x)):
            pyro.sample("seen", dist.Normal(torch.zeros(()), 1.0), obs=x)
        use(a, x)

    return model


def nothing(x: Tensor) -> None:
    """A guide of no latents."""


def given(make: Callable[[Tensor], Any], value: float = 0.0) -> Callable[[Tensor, Tensor], None]:
    """Observes a value under a distribution of the parameter, which moves it no more."""

    def use(a: Tensor, x: Tensor) -> None:
        pyro.sample("x", make(a.detach()), obs=torch.tensor(value))

    return use


def bare(how: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], None]:
    """Adds a zero to the loss that is not checked."""
    free = partial(dist.Delta, torch.tensor(0.0), validate_args=False)
    return lambda a, x: pyro.sample("free", free(log_density=how(a)), obs=torch.tensor(0.0))


def latent_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(10 * pyro.param("a", torch.tensor(0.4375)).detach(), 0.7))


def gamma_guide(x: Tensor) -> None:
    """How many random numbers a draw takes depends on the parameter."""
    pyro.sample("z", dist.Gamma(2 - pyro.param("a", torch.tensor(0.4375)).detach(), 1.0))


ENDS: dict[str, tuple[Callable[[Tensor], None], Callable[[Tensor], None], str]] = {
    "a loss of NaN": (falling(bare(lambda a: 0 * a.detach().sqrt())), nothing, "the loss is nan"),
    "a gradient": (falling(bare(lambda a: 0 * a.sqrt())), nothing, "the gradient of 'a' is not"),
    "a scale": (falling(given(lambda a: dist.Normal(0.0, a))), nothing, "scale"),
    "a location of NaN": (falling(given(lambda a: dist.Normal(a.sqrt(), 1.0))), nothing, "loc"),
    "a probability": (falling(given(lambda a: dist.Bernoulli(a))), nothing, "probs"),
    "a latent": (
        falling(lambda a, x: pyro.sample("z", dist.HalfNormal(1.0))),
        latent_guide,
        "'z'",
    ),
    "a latent by rejection": (
        falling(lambda a, x: pyro.sample("z", dist.Uniform(0.0, 3.5))),
        gamma_guide,
        "'z'",
    ),
}


@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize("name", ENDS)
def test_a_fit_ends_as_an_eager_one(
    name: str, average: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same step, in the same words, with the same last good parameters."""
    model, guide, words = ENDS[name]
    errors = []
    for block in (None, 1, 7):
        monkeypatch.setattr(trainer, "BLOCK", block or 50)
        with pytest.raises(NonFiniteError, match=r"^step \d+") as caught:
            fit(
                model, guide, X, optim=partial(SGD, lr=1 / 32), steps=40, seed=1,
                average=average, compile=block is not None,
            )  # fmt: skip
        errors.append(caught.value)
    eager = errors[0]
    assert words in str(eager) and eager.step > 5
    for error in errors[1:]:
        assert (error.step, str(error)) == (eager.step, str(eager))
        assert "are compiled" in error.fit.compiled
        torch.testing.assert_close(error.fit.losses, eager.fit.losses, rtol=1e-9, atol=1e-10)
        assert len(error.fit.losses) == error.step
        for key, tensor in eager.fit.model.state.tensors().items():
            found = error.fit.model.state.tensors()[key]
            torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-12)
            assert bool(found.isfinite().all())


@pytest.mark.parametrize("block", [1, 4, 50])
def test_what_a_batch_brings_is_the_eager_error(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index out of bounds, in a batch late in a block."""
    monkeypatch.setattr(trainer, "BLOCK", block)
    table = nn.Embedding(4, 1)

    def model(k: Tensor) -> None:
        pyro.module("table", table)
        with pyro.plate("data", len(k)):
            pyro.sample("y", dist.Normal(table(k)[:, 0], 1.0), obs=k.double())

    def damage(k: Tensor) -> Tensor:
        seen.append(int(k[0]))
        return k + 9 * (k == 3)

    found = []
    for compile in (False, True):
        seen = list[int]()
        with pytest.raises(IndexError) as caught:
            fit(
                model, lambda k: None, torch.arange(4).repeat(10), transform=damage, batch_size=1,
                optim=partial(SGD, lr=0.1), steps=90, compile=compile, seed=5,
            )  # fmt: skip
        found.append((str(caught.value), getattr(caught.value, "__notes__", [])))
    assert found[0] == found[1]


def test_a_weight_that_no_schedule_gives_ends_a_block() -> None:
    def weight(step: int) -> float:
        return 1.0 if step < 10 else -1.0

    found = []
    for compile in (False, True):
        with pytest.raises(ValueError) as caught:
            fit(*mean(), kl_weight=weight, steps=30, compile=compile)
        found.append(str(caught.value))
    assert found[0] == found[1] and "10" in found[0]


def test_a_transform_that_fails_ends_a_block() -> None:
    def transform(x: Tensor) -> Tensor:
        if bool((x == 0.75).any()):
            raise RuntimeError("no more rows")
        return x

    found = []
    for compile in (False, True):
        with pytest.raises(RuntimeError, match="no more rows") as caught:
            fit(
                *(normal_mean, normal_mean_guide, torch.linspace(0, 1, 41)), transform=transform,
                batch_size=1, steps=60, compile=compile,
            )  # fmt: skip
        found.append(caught.value.__notes__[0].partition(",")[0])
    assert found[0] == found[1] and int(found[0].removeprefix("at step ")) > 5


# --------------------------------------------------------------------------- what leaves fits eager


def test_few_steps_stay_eager_and_warn_of_nothing() -> None:
    assert fit(*mean(), steps=20).compiled.startswith("steps are eager: ")
    assert "by the C compiler after 4 eager" in fit(*mean(), steps=300).compiled


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_other_losses_stay_eager() -> None:
    with pytest.warns(UserWarning, match="steps stay eager: those of TraceEnum_ELBO are not rec"):
        fit(*mean(), loss=TraceEnum_ELBO(), steps=6, compile=True)


def counter() -> tuple[Any, Any]:
    seen = {"calls": 0}

    def model(x: Tensor) -> None:
        seen["calls"] += 1
        m = pyro.sample("m", dist.Normal(0.0, 1.0 + 1 / seen["calls"]))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    return model, AutoNormal(model)


def appended() -> tuple[Any, Any]:
    seen: list[float] = []

    def model(x: Tensor) -> None:
        seen.append(0.1)
        m = pyro.sample("m", dist.Normal(sum(seen), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    return model, AutoNormal(model)


class Hidden(nn.Module):
    """A state that is bound anew in every run, and read in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(())
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, m: Tensor) -> Tensor:
        self.state = 0.5 * self.state + m.detach()
        return m + self.state + self.shift


def hidden() -> tuple[Any, Any]:
    net = Hidden()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        m = net(pyro.sample("m", dist.Normal(0.0, 1.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    return model, AutoNormal(model)


class Counting:
    """A program that is an object with a number."""

    calls = 0

    def __call__(self, x: Tensor) -> None:
        self.calls += 1
        with pyro.plate("data", len(x)):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(m, 1.0 + 1 / self.calls), obs=x)


def attribute() -> tuple[Any, Any]:
    model = Counting()
    return model, AutoNormal(model)


LEFT = {"'calls'": counter, "cell": appended, "'state'": hidden, "'calls' of": attribute}


@pytest.mark.parametrize("make", [counter, appended, hidden, attribute])
def test_what_a_step_leaves_behind_keeps_a_fit_eager(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    eager = fit(*make(), X, steps=12, compile=False)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="steps stay eager: a step changes '.*' of ") as caught:
        found = fit(*make(), X, steps=12, compile=True)
    assert len([one for one in caught if "stay eager" in str(one.message)]) == 1
    assert torch.equal(found.losses, eager.losses)
    assert "stay eager" in found.compiled and "by the C compiler" not in found.compiled


def test_buffers_may_change_in_place() -> None:
    """A tensor that a program registers and changes is as good as a parameter."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, m: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(0.1 * m.detach())
            return m + self.mean + self.shift

    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        net = Mean()

        def model(x: Tensor, net: Mean = net) -> None:
            pyro.module("net", net)
            m = net(pyro.sample("m", dist.Normal(0.0, 1.0)))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(m, 1.0), obs=x)

        found.append(fit(model, AutoNormal(model), X, steps=12, compile=compile))
    torch.testing.assert_close(found[1].losses, found[0].losses, rtol=1e-9, atol=1e-10)
    assert "by the C compiler" in found[1].compiled


def test_a_positive_parameter_stays_so() -> None:
    """Data outside of their support are no divergence, compiled or not."""

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        rate = pyro.param("rate_", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(2.0, rate))

    counts: list[int] = []

    def damage(x: Tensor) -> Tensor:
        counts.append(1)
        return x - 10 * (len(counts) > 12)

    with pytest.raises(ValueError, match="within the support") as caught:
        fit(model, guide, torch.arange(5.0), transform=damage, steps=30, compile=True)
    assert "at step" in caught.value.__notes__[0]
