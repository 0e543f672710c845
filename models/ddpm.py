r"""Denoising diffusion as Pyro programs: the reverse chain is the model.

    y_T ~ N(0, I),    y_{t-1} | y_t ~ kernel(denoiser(y_t, t)),    x_0 | y_1 ~ likelihood,

for every data point in plate "data". The other half is the forward process, a guide:
:mod:`pyro_vi.guides.forward_process`. Pyro's ELBO of the two is the bound

    log p(x_0) >= - KL(q(y_T | x_0) || p(y_T))
                  - sum_{t > 1} E KL(q(y_{t-1} | y_t, x_0) || p(y_{t-1} | y_t))
                  + E log p(x_0 | y_1)

of Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models (arXiv:2006.11239). Two programs
give it, from one set of parameters:

    DDPMChain   all T steps one after the other: for few steps, and for posteriors
    DDPM        some steps of each data point, at random: the same in expectation, at a cost that
                does not grow with T. This is what trains.
"""

__all__ = ["DDPM", "DDPMChain"]

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, cast

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vi.checks import check_sizes
from pyro_vi.diffusion import (
    Diffusion,
    Noise,
    SmallVariance,
    StratifiedSteps,
    TimeEmbedding,
    Transition,
)
from pyro_vi.models.likelihoods import Bernoulli, ContinuousBernoulli, LearnedGaussian


class DDPM(PyroModule):
    r"""The time-sub-sampled program: a plate of steps inside the plate of data points.

    For each data point it draws k = ``diffusion.draws`` of the T steps from q
    (:class:`pyro_vi.diffusion.StratifiedSteps`), and y_t as the forward process does; both stand in
    the guide alike, and cancel. What is left is

    .. math::
        \log p(y_T) - \log q(y_T | x_0)
        + \frac{1}{k} \sum_{j=1}^k \frac{1}{q(t_j)} \left\{ \begin{array}{ll}
        \log p(y_{t_j - 1} | y_{t_j}) - \log q(y_{t_j - 1} | y_{t_j}, x_0) & t_j > 1 \\
        \log p(x_0 | y_1) & t_j = 1 \end{array} \right.

    Sites: "x_T" (under T's own number, "x_1000"), and in plate "steps" of dimension -2 the drawn
    steps "t", their "x_t" and the steps before, "x_s"; they are flat, (dim,), and in the
    diffusion's coordinates. The observed "x_0" has the data's shape.

    Args:
        diffusion: The forward process, which the guide has too.
        net: From y_t, (N, *shape), and t, (N,) integers from 1 to T, to an output of y_t's shape.
        prediction: What the output means (:mod:`pyro_vi.diffusion`); `Noise()` by default.
        kernel: The covariance of p(y_{t-1} | y_t) (:mod:`pyro_vi.diffusion`); `SmallVariance()` by
            default.
        likelihood: p(x_0 | y_1) given the mean of x_0, in the units of the data: a likelihood of
            :mod:`pyro_vi.models.likelihoods` with one output; `LearnedGaussian()` by default.

    Raises:
        TypeError: The diffusion, or the likelihood, is none.
        ValueError: The network or the kernel was made for another number of steps.

    References:
        Denoising Diffusion Probabilistic Models (arXiv:2006.11239)

    Example:
        >>> from pyro.infer import TraceMeanField_ELBO
        >>> from pyro_vi.diffusion import MLPDenoiser
        >>> from pyro_vi.guides import ForwardProcess
        >>> from pyro_vi.diffusion import CosineSchedule
        >>> diffusion = Diffusion((2,), CosineSchedule(100))
        >>> model = DDPM(diffusion, MLPDenoiser((2,), 100))
        >>> loss = TraceMeanField_ELBO().loss(model, ForwardProcess(diffusion), torch.randn(8, 2))
        >>> model.sample(5).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        diffusion: Diffusion,
        net: nn.Module,
        *,
        prediction: nn.Module | None = None,
        kernel: nn.Module | None = None,
        likelihood: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(diffusion, Diffusion):
            raise TypeError(f"expected a Diffusion, got {diffusion!r}")
        prediction = Noise() if prediction is None else prediction
        kernel = SmallVariance() if kernel is None else kernel
        likelihood = LearnedGaussian() if likelihood is None else likelihood
        for name, part, example in (
            ("network", net, "UNet((1, 28, 28), 100)"),
            ("prediction", prediction, "Velocity()"),
            ("kernel", kernel, "LearnedVariance(FullCovariance(2, 16), 100)"),
        ):
            if not isinstance(part, nn.Module):
                raise TypeError(
                    f"expected a {name} that is a module, such as {example}, got {part!r}"
                )
        if hasattr(kernel, "context_dim"):
            raise TypeError(
                f"expected a kernel, such as LearnedVariance(family, steps), got {kernel!r}"
            )
        logits = isinstance(likelihood, (Bernoulli, ContinuousBernoulli))
        module = isinstance(likelihood, nn.Module)
        if not module or getattr(likelihood, "outputs", None) != 1 or logits:
            raise TypeError(
                "expected a likelihood with one output, the mean, such as Gaussian(0.1) or"
                f" LearnedDiscretizedLogistic(256), got {likelihood!r}"
            )
        for name, whole in (("network", net), ("kernel", kernel)):
            for part in whole.modules():
                if isinstance(part, TimeEmbedding) and part.steps != diffusion.steps:
                    raise ValueError(
                        f"expected a {name} of {diffusion.steps} steps, as the diffusion has, got"
                        f" one of {part.steps}"
                    )
        self.diffusion = diffusion
        self.net = net
        self.prediction = prediction
        self.kernel = kernel
        self.likelihood = likelihood

    def forward(self, x_0: Tensor) -> None:
        """The program.

        Args:
            x_0: The data, shape (N, *shape).

        Raises:
            TypeError: The data are not floating point numbers.
            ValueError: The data have another shape, or values outside the likelihood's support; the
                guide has another forward process; the network's output has another shape.
        """
        parts = self._parts()  # before the plates, which would handle every parameter's message
        diffusion = parts.diffusion
        y_0 = diffusion.encode(x_0)
        drawn = torch.arange(diffusion.draws)
        with pyro.plate("data", len(x_0)):
            pyro.sample(f"x_{diffusion.steps}", diffusion.prior(y_0))
            with pyro.plate("steps", diffusion.steps, subsample=drawn):
                with _Same(diffusion):
                    steps = StratifiedSteps(diffusion.steps, device=y_0.device)
                    t = pyro.sample("t", steps, infer={"subsampled": True})
                step = diffusion.transition(t, y_0.dtype)
                y_t = pyro.sample("x_t", diffusion.noised(y_0, t, step=step))
                estimate = parts.estimate(y_t, t, step)
                with poutine.scale(scale=steps.weight(t, y_0.dtype)):
                    with poutine.mask(mask=t > 1), _Same(diffusion):
                        pyro.sample("x_s", parts.before(y_t, t, step, estimate))
                    with poutine.mask(mask=t == 1):
                        pyro.sample("x_0", parts.decode(estimate), obs=x_0)

    def denoise(self, y_t: Tensor, t: Tensor) -> Tensor:
        """The network's estimate of y_0.

        Args:
            y_t: Shape (..., dim).
            t: Steps from 1 to T, broadcastable with (...).

        Returns:
            Shape (..., dim).

        Raises:
            ValueError: The network's output has another shape than its input.
        """
        parts = self._parts()
        return parts.estimate(y_t, t, parts.diffusion.transition(t, y_t.dtype))

    def before(self, y_t: Tensor, t: Tensor) -> TorchDistribution:
        """The reverse kernel p(y_{t-1} | y_t), for t > 1.

        Args:
            y_t: Shape (..., dim).
            t: Steps from 2 to T, broadcastable with (...).

        Returns:
            A distribution of batch_shape (...) and event_shape (dim,).
        """
        parts = self._parts()
        step = parts.diffusion.transition(t, y_t.dtype)
        return parts.before(y_t, t, step, parts.estimate(y_t, t, step))

    def decode(self, estimate: Tensor) -> TorchDistribution:
        """The likelihood p(x_0 | y_1), given the estimate of y_0 at t = 1, shape (..., dim)."""
        return self._parts().decode(estimate)

    def _parts(self) -> "_Parts":
        """The modules, each asked for once: a PyroModule then announces its parameters to Pyro."""
        return _Parts(self.diffusion, self.net, self.prediction, self.kernel, self.likelihood)

    def sample(
        self,
        num: int,
        *,
        steps: int | None = None,
        eta: float | None = None,
        expected: bool = True,
        progress: bool = False,
    ) -> Tensor:
        r"""New data points.

        By itself it samples the chain, all T steps with their kernels. With fewer steps, evenly
        spaced, or with an `eta`, it takes the generalised ones of DDIM,

        .. math::
            y_s = \mathrm{signal}_s \hat y_0
                  + (\mathrm{noise}_s^2 - \eta^2 v)^{1/2} \hat\epsilon + \eta v^{1/2} e,

        with v the variance of q(y_s | y_t, y_0): at eta = 1 those of the chain with small
        variances, at eta = 0 a deterministic map of y_T.

        Args:
            num: How many.
            steps: How many of the T steps to take; all if None.
            eta: From 0 to 1, the share of fresh noise; 1 if None and there are fewer steps.
            expected: Means of x_0 given y_1, instead of draws.
            progress: Whether to show a progress bar.

        Returns:
            Shape (num, *shape). The draws are torch's: seed them outside.

        Raises:
            ValueError: A number of data points below one, of steps not from 1 to T, an eta outside
                [0, 1]; a `LearnedVariance` kernel of a flow with any but all steps.

        References:
            Denoising Diffusion Implicit Models (arXiv:2010.02502)
        """
        for t, y in self._states(num, steps, eta, progress):  # noqa: B007  # the last one counts
            pass
        return self._drawn(t, y, expected)

    def trajectory(
        self, num: int, frames: int = 9, *, steps: int | None = None, eta: float | None = None
    ) -> Tensor:
        """New data points as they come about: from noise to data.

        Args:
            num: How many.
            frames: How many states of each, evenly spaced, the noise first and the mean of x_0
                last; at least 2, and all of them where there are fewer.
            steps, eta: As `sample` has them.

        Returns:
            Shape (frames, num, *shape), in the units of the data.

        Raises:
            ValueError: As `sample`; fewer than two frames.
        """
        check_sizes(frames=frames)
        if frames < 2:
            raise ValueError(f"expected at least 2 frames, got {frames}")
        total = self.diffusion.steps if steps is None else steps
        frames = min(frames, total + 1)
        wanted = {round(i * total / (frames - 1)) for i in range(frames - 1)}
        states = enumerate(self._states(num, steps, eta, False))
        kept = {i: state for i, state in states if i in wanted or i == total - 1}
        shown = [self.diffusion.decode(kept[i][1]) for i in sorted(wanted & kept.keys())]
        return torch.stack([*shown, self._drawn(*kept[total - 1], True)])

    def _states(
        self, num: int, steps: int | None, eta: float | None, progress: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """(t, y_t) from t = T down to the step before the data."""
        diffusion = self.diffusion
        check_sizes(num=num)
        if steps is not None:
            check_sizes(steps=steps)
            if steps > diffusion.steps:
                raise ValueError(f"expected at most {diffusion.steps} steps, got {steps}")
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"expected an eta from 0 to 1, got {eta}")
        taken = diffusion.steps if steps is None else steps
        times = torch.linspace(diffusion.steps, 1, taken).round().long().tolist()
        held = (*self.parameters(), *diffusion.coordinates.buffers())
        like = next((part for part in held if part.is_floating_point()), torch.zeros(()))
        chain = eta is None and taken == diffusion.steps
        if not chain and not getattr(self.kernel, "centred", True):
            raise ValueError(
                "fewer steps, and an eta, need kernels around the estimate of y_0, and that of a"
                " flow is not: sample all steps"
            )
        with torch.no_grad():
            y = diffusion.prior(like).sample((num,))
            yield times[0], y
            pairs = tqdm(list(pairwise(times)), disable=not progress, desc="sampling", unit="step")
            for now, then in pairs:
                t, s = (torch.tensor(step, device=y.device) for step in (now, then))
                y = self.before(y, t).sample() if chain else self._stride(y, t, s, eta)
                yield then, y

    def _stride(self, y: Tensor, t: Tensor, s: Tensor, eta: float | None) -> Tensor:
        """A draw of y_s from y_t, by DDIM's kernel."""
        share = 1.0 if eta is None else eta
        step = self.diffusion.transition(t, y.dtype, s=s)
        estimate = self.denoise(y, t)
        eps = (y - step.signal * estimate) / step.noise
        signal, noise = (a.to(y.dtype).unsqueeze(-1) for a in self.diffusion.schedule.levels(s))
        fresh = share**2 * step.small
        mean = signal * estimate + (noise.square() - fresh).clamp(min=0).sqrt() * eps
        return mean + fresh.sqrt() * torch.randn_like(y)

    def _drawn(self, t: int, y: Tensor, expected: bool) -> Tensor:
        """x_0 given the last state."""
        with torch.no_grad():
            p = self.decode(self.denoise(y, torch.tensor(t, device=y.device)))
            return cast(Tensor, p.mean if expected else p.sample())


class _Parts(NamedTuple):
    """What a DDPM is made of."""

    diffusion: Diffusion
    net: nn.Module
    prediction: nn.Module
    kernel: nn.Module
    likelihood: nn.Module

    def estimate(self, y_t: Tensor, t: Tensor, step: Transition) -> Tensor:
        own = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), y_t.dtype)
        if y_t.dtype != own:
            raise TypeError(
                f"expected data of the network's dtype, {own}, got {y_t.dtype}: convert the data"
                " (.float()) or the programs (.double())"
            )
        flat = y_t.reshape(-1, *self.diffusion.shape)
        out = self.net(flat, t.expand(y_t.shape[:-1]).reshape(-1))
        if not isinstance(out, Tensor) or out.shape != flat.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"expected a network whose output has its input's shape, {tuple(flat.shape)}, got"
                f" {got}"
            )
        return cast(Tensor, self.prediction(out.reshape(y_t.shape), y_t, step))

    def before(
        self, y_t: Tensor, t: Tensor, step: Transition, estimate: Tensor
    ) -> TorchDistribution:
        mean = step.on_t * y_t + step.on_0 * estimate
        return cast(TorchDistribution, self.kernel(mean, y_t, t, step))

    def decode(self, estimate: Tensor) -> TorchDistribution:
        events = len(self.diffusion.shape)
        raw = self.diffusion.decode(estimate).unsqueeze(-1 - events)
        return cast(TorchDistribution, self.likelihood(raw, event_dim=events))


class _Same(Messenger):
    """Holds the forward process that the guide names at a site against the model's own."""

    def __init__(self, diffusion: Diffusion) -> None:
        super().__init__()
        self._diffusion = diffusion

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["infer"].get("weighted") is not None and msg.get("weighted") is None:
            raise ValueError(
                "the guide's steps are weighted and the model's are not: StepWeight both"
            )
        theirs = msg["infer"].get("diffusion")
        if theirs is None:
            return
        mine = self._diffusion.signature()
        if torch.equal(mine, theirs):
            return
        if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5):
            raise ValueError(
                "the guide has another forward process than the model (its steps, schedule, draws"
                " or coordinates differ): give both the same Diffusion, and a fitted model the"
                " guide of its fit if the schedule was learned"
            )


class DDPMChain(PyroModule):
    """The whole chain: every step a sample site.

    Sites: the latents "x_T" (under T's own number) down to "x_1", flat and in the diffusion's
    coordinates, and the observed "x_0", of the data's shape.

    A trained one has a posterior over trajectories without further training:

        chain, guide = DDPMChain(fitted.model), ReverseOrder(fitted.model.diffusion)
        posterior = fit(chain, guide, x, steps=0).posterior(x)

    Args:
        ddpm: The model, trained or not; or a fitted one (`Fit.model`), which stays frozen.

    Example:
        >>> from pyro_vi.diffusion import MLPDenoiser
        >>> from pyro_vi.diffusion import CosineSchedule
        >>> chain = DDPMChain(DDPM(Diffusion((2,), CosineSchedule(3)), MLPDenoiser((2,), 3)))
        >>> trace = pyro.poutine.trace(chain).get_trace(torch.randn(8, 2))
        >>> [name for name in trace.nodes if name.startswith("x_")]
        ['x_3', 'x_2', 'x_1', 'x_0']
    """

    def __init__(self, ddpm: DDPM) -> None:
        super().__init__()
        self.ddpm = ddpm

    def forward(self, x_0: Tensor) -> None:
        """The program; arguments and errors as those of `DDPM`."""
        diffusion = self.ddpm.diffusion
        y_0 = diffusion.encode(x_0)
        with pyro.plate("data", len(x_0)):
            with _Same(diffusion):
                y = pyro.sample(f"x_{diffusion.steps}", diffusion.prior(y_0))
            for step in range(diffusion.steps, 1, -1):
                t = torch.tensor(step, device=y_0.device)
                y = pyro.sample(f"x_{step - 1}", self.ddpm.before(y, t))
            first = torch.tensor(1, device=y_0.device)
            pyro.sample("x_0", self.ddpm.decode(self.ddpm.denoise(y, first)), obs=x_0)
