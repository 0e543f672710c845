r"""Noise schedules of diffusion: t -> how much signal and how much noise is left, t = 1, ..., T.

    q(y_t | y_0) = N(signal_t y_0, noise_t^2 I),    signal_t^2 + noise_t^2 = 1,

with signal_t^2 = abar_t, the running product of 1 - beta_t. A schedule is the one function

    gamma_t = -log SNR_t = log(noise_t^2 / signal_t^2),

which rises with t: signal_t^2 = sigmoid(-gamma_t), noise_t^2 = sigmoid(gamma_t). It is a
variational family too: with `LearnedSchedule` the bound itself chooses the levels. Where time is
cut finer, the fixed ones keep the same curve.
"""

__all__ = ["CosineSchedule", "GivenSchedule", "LearnedSchedule", "LinearSchedule", "Schedule"]

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vi.checks import check_sizes


class Schedule(nn.Module):
    """The base of all schedules: a subclass gives `gamma`.

    Attributes:
        fixed: Whether gamma never changes, so that its numbers are kept: neither parameters nor
            buffers nor anything else that may be set later has a part in it.

    Args:
        steps: The number of steps T.

    Raises:
        TypeError: `steps` is not an integer.
        ValueError: `steps` is below one.
    """

    fixed = False

    def __init__(self, steps: int) -> None:
        super().__init__()
        check_sizes(steps=steps)
        self.steps = steps
        self.kept: dict[object, Tensor] = {}  # of a fixed schedule

    def gamma(self, t: Tensor) -> Tensor:
        """Minus the log signal-to-noise ratio.

        Args:
            t: Steps from 1 to T, integers, any shape.

        Returns:
            The same shape; float64, or the dtype of the schedule's parameters.
        """
        raise NotImplementedError

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of y_0 and of the noise in y_t: (signal_t, noise_t), each of t's shape."""
        gamma = self.gamma(t)
        return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()

    def signature(self) -> Tensor:
        """Numbers that tell it from others: its parameters, or its levels if it has none; (k,)."""
        with torch.no_grad():
            own = [parameter.reshape(-1) for parameter in self.parameters()]
            if own:
                return torch.cat(own)
            if not self.fixed:
                return self.gamma(torch.arange(1, self.steps + 1, device=_device(self)))
            if "signature" not in self.kept:
                self.kept["signature"] = self.gamma(torch.arange(1, self.steps + 1))
            return self.kept["signature"]

    def check(self) -> None:
        """Raises ValueError unless gamma is finite and rises from every step to the next."""
        with torch.no_grad():
            gamma = self.gamma(torch.arange(1, self.steps + 1, device=_device(self))).double()
        signal = torch.sigmoid(-gamma)
        for t, (level, value) in enumerate(zip(signal.tolist(), gamma.tolist(), strict=True), 1):
            if not (math.isfinite(value) and 0 < level < 1):
                raise ValueError(
                    f"expected signal levels abar inside (0, 1), got {level:g} at step {t}"
                )
        for t, rise in enumerate(gamma.diff().tolist(), 2):
            if not rise > 0:
                raise ValueError(
                    "expected a signal-to-noise ratio that falls from step to step, but from step"
                    f" {t - 1} to {t} abar goes from {signal[t - 2]:g} to {signal[t - 1]:g}"
                )


class LinearSchedule(Schedule):
    r"""A noise rate that rises linearly in time: DDPM's schedule, whatever the number of steps.

    .. math:: \log \bar\alpha_t = - b_0 u - (b_1 - b_0) u^2 / 2, \quad u = t / T

    With b_0 = 0.1, b_1 = 20 and T = 1,000 its beta_t are close to DDPM's, from 1e-4 to 0.02: within
    1%, but for the first few, which are up to a tenth larger.

    Args:
        steps: The number of steps T.
        first, last: The rates b_0 and b_1, above 0.

    Raises:
        ValueError: A rate is not above 0.

    References:
        Denoising Diffusion Probabilistic Models (arXiv:2006.11239); Score-Based Generative Modeling
        through Stochastic Differential Equations (arXiv:2011.13456)

    Example:
        >>> signal, noise = LinearSchedule(1_000).levels(torch.tensor([1, 1_000]))
        >>> signal.square()
        tensor([9.9989e-01, 4.3186e-05], dtype=torch.float64)
    """

    fixed = True

    def __init__(self, steps: int, *, first: float = 0.1, last: float = 20.0) -> None:
        super().__init__(steps)
        if not (first > 0 and last > 0):
            raise ValueError(f"expected noise rates above 0, got {first:g} and {last:g}")
        self.first, self.last = first, last

    def gamma(self, t: Tensor) -> Tensor:
        """Minus the log signal-to-noise ratio; float64."""
        u = t.double() / self.steps
        return (u * self.first + u.square() * (self.last - self.first) / 2).expm1().log()


class CosineSchedule(Schedule):
    r"""A squared cosine: the information goes evenly, and small images are not drowned early.

    .. math:: \bar\alpha_t = f(t / T) / f(0), \quad f(u) = \cos^2 \frac{\pi (u + s)}{2 (1 + s)}

    with beta_T = 0.999, since f(1) = 0.

    Args:
        steps: The number of steps T.
        offset: s, above 0: the smaller, the less noise there is at the first step.

    Raises:
        ValueError: The offset is not above 0.

    References:
        Improved Denoising Diffusion Probabilistic Models (arXiv:2102.09672)

    Example:
        >>> signal, noise = CosineSchedule(4).levels(torch.tensor([1, 2, 3, 4]))
        >>> signal.square()
        tensor([8.4701e-01, 4.9384e-01, 1.4427e-01, 1.4427e-04], dtype=torch.float64)
    """

    fixed = True

    def __init__(self, steps: int, *, offset: float = 0.008) -> None:
        super().__init__(steps)
        if not offset > 0:
            raise ValueError(f"expected an offset above 0, got {offset:g}")
        self.offset = offset

    def gamma(self, t: Tensor) -> Tensor:
        """Minus the log signal-to-noise ratio; float64."""
        last = t == self.steps
        u = torch.where(last, t - 1, t).double() / self.steps
        half = math.pi / 2 / (1 + self.offset)
        level = (half * (u + self.offset)).cos().square() / math.cos(half * self.offset) ** 2
        level = torch.where(last, level * (1 - 0.999), level)
        return torch.log1p(-level) - level.log()


class GivenSchedule(Schedule):
    """A schedule by its numbers.

    Args:
        signal_levels: abar_t for t = 1, ..., T, inside (0, 1) and falling.

    Raises:
        ValueError: There are none, or they do not fall inside (0, 1).

    Example:
        >>> GivenSchedule([0.9, 0.5, 0.1]).gamma(torch.tensor(2))
        tensor(0., dtype=torch.float64)
    """

    fixed = True

    def __init__(self, signal_levels: Sequence[float] | Tensor) -> None:
        levels = torch.as_tensor(signal_levels, dtype=torch.float64).detach().cpu()
        if levels.dim() != 1 or not len(levels):
            raise ValueError(f"expected T signal levels, got shape {tuple(levels.shape)}")
        super().__init__(len(levels))
        for t, level in enumerate(levels.tolist(), 1):
            if not 0 < level < 1:
                raise ValueError(
                    f"expected signal levels abar inside (0, 1), got {level:g} at step {t}"
                )
        # numbers, not a buffer, which `.float()` would round
        self._gamma = (torch.log1p(-levels) - levels.log()).tolist()
        self.check()

    def gamma(self, t: Tensor) -> Tensor:
        """Minus the log signal-to-noise ratio; float64."""
        return torch.tensor(self._gamma, dtype=torch.float64, device=t.device)[t.long() - 1]


class LearnedSchedule(Schedule):
    r"""A monotone network between two ends, all of it trained through the bound.

    .. math:: \gamma_t = g_1 + (g_T - g_1) \frac{m(u) - m(0)}{m(1) - m(0)}, \quad
              m(u) = u + \sum_i a_i \, \sigma(b_i u + c_i), \quad u = \frac{t - 1}{T - 1}

    with a_i, b_i > 0, so that gamma rises whatever the parameters are, as far as their dtype can
    tell. It starts near a straight line in u.

    Args:
        steps: The number of steps T.
        first, last: Where the ends g_1 and g_T start, g_1 < g_T. With one step gamma is g_T.
        hidden: The number of sigmoids.

    Raises:
        ValueError: The ends do not rise.

    References:
        Variational Diffusion Models (arXiv:2107.00630), section H

    Example:
        >>> LearnedSchedule(3).gamma(torch.tensor([1, 3])).detach()
        tensor([-9.,  5.])
    """

    def __init__(
        self, steps: int, *, first: float = -9.0, last: float = 5.0, hidden: int = 64
    ) -> None:
        super().__init__(steps)
        check_sizes(hidden=hidden)
        if not first < last:
            raise ValueError(f"expected gamma to rise, got {first:g} at first and {last:g} at last")
        self.first = nn.Parameter(torch.tensor(float(first)))
        rise = last - first
        self.raw_range = nn.Parameter(torch.tensor(rise + math.log(-math.expm1(-rise))))
        self.raw_size = nn.Parameter(torch.full((hidden,), -5.0))
        self.raw_slope = nn.Parameter(torch.full((hidden,), 10.0))
        self.offset = nn.Parameter(-10.0 * torch.linspace(0, 1, hidden))

    def gamma(self, t: Tensor) -> Tensor:
        """Minus the log signal-to-noise ratio, in the dtype of the parameters."""
        u = (t - 1).to(self.first.dtype) / max(self.steps - 1, 1)
        share = torch.ones_like(u) if self.steps == 1 else self._share(u)
        return self.first + F.softplus(self.raw_range) * share

    def _share(self, u: Tensor) -> Tensor:
        size, slope = F.softplus(self.raw_size), F.softplus(self.raw_slope)

        def rising(u: Tensor) -> Tensor:
            return u + (size * torch.sigmoid(slope * u.unsqueeze(-1) + self.offset)).sum(-1)

        low, high = rising(u.new_zeros(())), rising(u.new_ones(()))
        return (rising(u) - low) / (high - low)


def _device(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)
