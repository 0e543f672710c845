r"""Noise on what a program reads, drawn inside the program: augmentation as auxiliary sample sites.

    x_t = signal_t x_0 + noise_t eps,    t ~ U{0, ..., t_max},    eps ~ N(0, I),

with the levels of a schedule (:mod:`pyro_vi.diffusion`), cut off at t_max, where little noise is in
yet; t = 0 is no noise. The data stay as they are. t and eps do not depend on them, and whoever
draws them has the same p(t) p(eps): in a bound the two cancel, whatever the rest is. So they are
left out of it (a mask), which is exact, and what is left is an average over them of bounds:

    in a guide alone, q(z | x_t) of a model of x_0    E ELBO(x_0; q(z | x_t)) <= log p(x_0)
    in a model and its guide, p(y | x_t)              E ELBO(y | x_t) <= E log p(y | x_t)

The first is a bound on what it was without the noise, since it is one at every (t, eps):

    log p(x_0) - E ELBO(x_0; q(z | x_t)) = E KL(q(z | x_t) || p(z | x_0)) >= 0.

The second is a bound on another density, that of y given a noisy input, and none on p(y | x_0).
(`RenyiELBO` averages inside the logarithm, over the noise too: its bounds are those on log p(x_0)
and on log E p(y | x_t).)

Noise is there in training alone, as dropout is: in `eval()`, and so in a fit's programs, posteriors
and predictions, the input is that of t = 0 and nothing is drawn.
"""

__all__ = ["InputNoise", "UniformSteps", "check_noise", "noises"]

from collections.abc import Iterable, Sequence
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Normal, TorchDistribution, constraints
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor, nn

from pyro_vi.diffusion import Schedule


class InputNoise(nn.Module):
    r"""Noise that a program draws on its input, a level for each data point.

    .. math:: x_t = \mathrm{signal}_t x_0 + \mathrm{noise}_t \epsilon, \quad
              t \sim U\{0, \dots, t_{\max}\}, \; \epsilon \sim N(0, I)

    Programs that take one call it inside their plate "data". In `train()` it draws the sites "t"
    and "eps", whose densities are left out of the bound; see the module for which bound that is. In
    `eval()` it draws nothing and gives the input at t = 0; so it does, whatever the mode, if
    t_max = 0, where the input is x_0 itself and the programs are what they are without it.

    With `add_back` the input is

    .. math:: x_t + x_0 = (1 + \mathrm{signal}_t) x_0 + \mathrm{noise}_t \epsilon,

    as informative as x_t at the larger ratio of signal to noise (1 + signal_t) / noise_t, about
    twice its own where noise is low. So the same t are spread over lower noise: low noise weighs
    more, and even where x_t is all noise the input is not. At t = 0 it is 2 x_0.

    A `LearnedSchedule` learns to have no noise: what it adds only loosens the first of the bounds.

    A model and a guide that read one (t, eps) need the same noise: the guide draws t, so that it
    would decide the levels of a model that has others. Replayed, a model refuses that.

    Args:
        schedule: The noise schedule (:mod:`pyro_vi.diffusion`).
        t_max: The last level, from 0 to the schedule's T.
        add_back: Whether x_0 is added to the noisy input.

    Raises:
        TypeError: The schedule is none, `t_max` not an int, or `add_back` not a bool.
        ValueError: `t_max` is outside 0, ..., T.

    References:
        Auxiliary Deep Generative Models (arXiv:1602.05473), for auxiliary variables of a guide;
        Denoising Criterion for Variational Auto-Encoding Framework (arXiv:1511.06406), for noise
        in front of an encoder

    Example:
        >>> from pyro_vi.diffusion import CosineSchedule
        >>> noise = InputNoise(CosineSchedule(100), t_max=20)
        >>> def program(x):
        ...     with pyro.plate("data", len(x)):
        ...         return noise(x)
        >>> x = torch.rand(5, 1, 8, 8)
        >>> trace = poutine.trace(program).get_trace(x)
        >>> trace.nodes["t"]["value"].shape, trace.nodes["eps"]["value"].shape
        (torch.Size([5]), torch.Size([5, 1, 8, 8]))
        >>> float(trace.log_prob_sum())
        0.0
        >>> noise = noise.eval()
        >>> program(x) is x
        True
    """

    def __init__(self, schedule: Schedule, t_max: int, *, add_back: bool = False) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise TypeError(f"expected a Schedule, such as CosineSchedule(100), got {schedule!r}")
        if isinstance(t_max, bool) or not isinstance(t_max, int):
            raise TypeError(f"expected t_max to be an int, got {t_max!r}")
        if not 0 <= t_max <= schedule.steps:
            raise ValueError(
                f"expected t_max from 0 to the schedule's {schedule.steps}, got {t_max}"
            )
        if not isinstance(add_back, bool):
            raise TypeError(f"expected add_back to be True or False, got {add_back!r}")
        schedule.check()
        self.schedule = schedule
        self.t_max = t_max
        self.add_back = add_back

    def __repr__(self) -> str:
        schedule = f"{type(self.schedule).__name__}({self.schedule.steps})"
        back = ", add_back=True" if self.add_back else ""
        return f"InputNoise({schedule}, t_max={self.t_max}{back})"

    def forward(self, x: Tensor, *, name: str = "", auxiliary: bool = False) -> Tensor:
        """The input of a program, inside its plate over data points.

        Args:
            x: The data, shape (N, *shape).
            name: What the names of the sites end in, where a program has noise twice.
            auxiliary: Whether this is a guide whose model does not draw the sites.

        Returns:
            Shape (..., N, *shape), with the dimensions of plates around that over data points.

        Raises:
            TypeError: Data that are no tensor of a floating point dtype.
            ValueError: The guide draws the sites by another noise.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"expected a tensor of a floating point dtype, got {got}")
        if not self.training or self.t_max == 0:
            return self.clean(x)
        steps = UniformSteps(self.t_max, device=x.device)
        normal = Normal(x.new_zeros(x.shape[1:]), 1.0).to_event(x.dim() - 1)
        infer = {"is_auxiliary": auxiliary, "noise": self}
        # Alike in model and guide: their densities cancel.
        with poutine.mask(mask=False), _Same(self):
            t = pyro.sample(f"t{name}", steps, infer=infer)
            eps = pyro.sample(f"eps{name}", normal, infer=infer)
        return self.noisy(x, t, eps)

    def clean(self, x: Tensor) -> Tensor:
        """The input at t = 0: x_0, or 2 x_0 where it is added back (not if t_max = 0)."""
        return x + x if self.add_back and self.t_max > 0 else x

    def noisy(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The input at given levels and noise: x_t, or x_t + x_0 where it is added back.

        Args:
            x: Data, shape (N, *shape).
            t: Levels from 0 to the schedule's T, integers, shape (..., N).
            eps: Standard normal noise, shape (..., N, *shape).
        """
        none = t == 0
        signal, noise = self.schedule.levels(t.clamp(min=1))
        signal, noise = signal.masked_fill(none, 1.0), noise.masked_fill(none, 0.0)
        wide = t.shape + (1,) * (x.dim() - 1)
        signal, noise = (level.to(x.dtype).reshape(wide) for level in (signal, noise))
        x_t = signal * x + noise * eps
        return x_t + x if self.add_back and self.t_max > 0 else x_t

    def is_like(self, other: "InputNoise") -> bool:
        """Whether another noise gives the same input at every level, and has the same ones."""
        if self is other:
            return True
        if (self.t_max, self.add_back) != (other.t_max, other.add_back):
            return False
        mine, theirs = (noise.gamma() for noise in (self, other))
        return torch.allclose(mine, theirs.to(mine.device), rtol=1e-5, atol=1e-5)

    def gamma(self) -> Tensor:
        """Minus the log signal-to-noise ratios of the levels 1, ..., t_max; float64, (t_max,)."""
        held = (*self.schedule.parameters(), *self.schedule.buffers())
        device = next((tensor.device for tensor in held), None)
        with torch.no_grad():
            return self.schedule.gamma(torch.arange(1, self.t_max + 1, device=device)).double()


class _Same(Messenger):
    """Holds the noise by which the guide drew a site against the program's own."""

    def __init__(self, noise: InputNoise) -> None:
        super().__init__()
        self._noise = noise

    def _pyro_post_sample(self, msg: Any) -> None:
        theirs = msg["infer"].get("noise")  # replay brings the guide's
        if isinstance(theirs, InputNoise) and not self._noise.is_like(theirs):
            raise ValueError(
                f"site {msg['name']!r}: the model has {self._noise} and the guide {theirs}, which"
                " differ in t_max, add_back or the schedule's levels: give both the same noise"
            )


class UniformSteps(TorchDistribution):
    r"""The steps 0, ..., T, each as likely as the others.

    .. math:: p(t) = 1 / (T + 1)

    It has no parameters, and thus counts as reparametrized.

    Args:
        last: T.
        device: Where the steps are drawn; torch's default device if None.

    Example:
        >>> UniformSteps(3).expand([1_000]).sample().unique()
        tensor([0, 1, 2, 3])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        last: int,
        *,
        device: torch.device | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.last, self.device = last, device
        super().__init__(validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The whole numbers from 0 to T."""
        return constraints.integer_interval(0, self.last)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Steps of shape sample_shape + batch_shape, integers."""
        shape = Size(sample_shape) + self.batch_shape
        return torch.randint(self.last + 1, shape, device=self.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(t), of the shape of the value."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return -torch.full(shape, self.last + 1.0, device=value.device).log()

    def expand(
        self, batch_shape: Sequence[int], _instance: TorchDistribution | None = None
    ) -> "UniformSteps":
        """The same distribution over a larger batch."""
        new = self._get_checked_instance(UniformSteps, _instance)
        new.last, new.device = self.last, self.device
        super(UniformSteps, new).__init__(Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new


def check_noise(**noises: InputNoise | None) -> None:
    """Raises TypeError that names the first one that is neither an `InputNoise` nor None."""
    for name, noise in noises.items():
        if noise is not None and not isinstance(noise, InputNoise):
            raise TypeError(
                f"expected {name} to be an InputNoise, such as"
                f" InputNoise(CosineSchedule(100), 20), got {noise!r}"
            )


def noises(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, dict[str, Any]]:
    """Plain numbers that tell a program's noises from others, by their names.

    Levels that are learned are left out.
    """
    return {
        name: {
            "noise": repr(module),
            "gamma": None if list(module.schedule.parameters()) else module.gamma().cpu(),
        }
        for name, module in modules
        if isinstance(module, InputNoise)
    }
