r"""The forward process of diffusion, as distributions: what a model and its guide both speak of.

A data point x_0 is flattened and mapped to coordinates y_0 in which the noise is isotropic. Then,
with the levels of a schedule (:mod:`pyro_vi.diffusion`) and s = t - 1,

    q(y_t | y_0)       = N(signal_t y_0, noise_t^2 I)
    q(y_t | y_s)       = N(signal_t / signal_s y_s, beta_t I)
    q(y_s | y_t, y_0)  = N(c_t y_t + c_0 y_0, v_t I),    s >= 1

    r_t    = e^(gamma_s - gamma_t) = SNR_t / SNR_s          (r_1 = 0)
    beta_t = noise_t^2 (1 - r_t)        v_t = noise_s^2 (1 - r_t)
    c_t    = r_t signal_s / signal_t    c_0 = signal_s (1 - r_t)

Noise of a full covariance is isotropic noise in the eigenbasis of that covariance, with each axis
in units of its own standard deviation: `Whitened` coordinates. The latents live in coordinates y;
no bound on log p(x_0) depends on which, as long as the kernels move along.

Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models (arXiv:2006.11239).
"""

__all__ = ["Affine", "Coordinates", "Diffusion", "StratifiedSteps", "Transition", "Whitened"]

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pyro.distributions import Normal, TorchDistribution, constraints
from torch import Size, Tensor, nn

from pyro_vi.checks import check_sizes
from pyro_vi.diffusion.schedules import Schedule

_FIRST = 1 / 8  # the first step's share of the draws, at least


class Coordinates(nn.Module):
    """The base of all coordinates: an invertible map of flat data points, (..., dim)."""

    def encode(self, x: Tensor) -> Tensor:
        """Data to coordinates, (..., dim) each."""
        raise NotImplementedError

    def decode(self, y: Tensor) -> Tensor:
        """Coordinates to data, (..., dim) each."""
        raise NotImplementedError


class Affine(Coordinates):
    """Coordinates y = (x - loc) / scale, the same for every number of a data point.

    Args:
        loc: What becomes zero.
        scale: What becomes one, above 0.

    Raises:
        ValueError: The scale is not positive and finite.

    Example:
        >>> greys = Affine(0.5, 0.5)  # [0, 1] to [-1, 1]
        >>> greys.encode(torch.tensor([0.0, 1.0]))
        tensor([-1.,  1.])
    """

    def __init__(self, loc: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        if not (0 < scale < math.inf and math.isfinite(loc)):
            raise ValueError(f"expected a finite loc and a positive scale, got {loc} and {scale}")
        self.loc, self.scale = float(loc), float(scale)

    def encode(self, x: Tensor) -> Tensor:
        """Data to coordinates, (..., dim) each."""
        return (x - self.loc) / self.scale

    def decode(self, y: Tensor) -> Tensor:
        """Coordinates to data, (..., dim) each."""
        return y * self.scale + self.loc


class Whitened(Coordinates):
    r"""Coordinates in which noise of a given covariance is isotropic.

    .. math:: y = \Sigma^{-1/2} (x - \mu), \quad \Sigma^{1/2} = U \Lambda^{1/2} U^T

    The root is the symmetric one, so that y is in the order of x, and images stay images.

    Args:
        mean: What becomes zero, shape (dim,).
        covariance: The noise's covariance, shape (dim, dim).

    Raises:
        ValueError: The covariance is not symmetric and positive definite, or of another size; the
            mean is not of finite floating point numbers.

    Example:
        >>> whitened = Whitened(torch.zeros(2), torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(whitened.decode(whitened.encode(x)), x, atol=1e-5)
        True
    """

    mean: Tensor
    root: Tensor
    inverse: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        dim = mean.numel()
        if mean.dim() != 1 or covariance.shape != (dim, dim):
            raise ValueError(
                "expected a mean of shape (dim,) and a covariance of shape (dim, dim), got"
                f" {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        if not mean.is_floating_point() or not bool(mean.isfinite().all()):
            raise ValueError(f"expected a mean of finite floating point numbers, got {mean}")
        wide = covariance.double()
        values, vectors = torch.linalg.eigh(wide)
        symmetric = torch.allclose(wide, wide.T, rtol=1e-5, atol=0.0)
        if not (symmetric and bool((values > 0).all())):
            raise ValueError(
                "expected a symmetric, positive definite covariance, got"
                f" {f'a least eigenvalue of {float(values.min()):g}' if symmetric else 'another'}"
            )
        for name, power in (("root", 0.5), ("inverse", -0.5)):
            matrix = vectors * values**power @ vectors.T
            self.register_buffer(name, matrix.to(mean.dtype))
        self.register_buffer("mean", mean.clone())

    @classmethod
    def of(cls, data: Tensor, *, ridge: float = 1e-3) -> "Whitened":
        """The coordinates of a sample's mean and covariance.

        Args:
            data: Data points, shape (N, *shape).
            ridge: Added to the variances, in units of their mean: a pixel that never changes has
                none of its own.

        Raises:
            ValueError: There are fewer than two data points, they do not differ, or they are no
                floating point numbers.
        """
        if data.dim() < 2 or not data.is_floating_point():
            raise ValueError(
                "expected data points of floating point numbers, (N, *shape), got"
                f" {tuple(data.shape)} of {data.dtype}"
            )
        if not bool((data != data[:1]).any()):
            raise ValueError(f"expected data points that differ, got {len(data)} alike")
        flat = data.reshape(len(data), -1)
        covariance = torch.cov(flat.T.double()).reshape(flat.shape[1], -1)
        size = ridge * covariance.diagonal().mean()
        covariance = covariance + size * torch.eye(len(covariance)).to(covariance)
        return cls(flat.mean(0), covariance)

    def encode(self, x: Tensor) -> Tensor:
        """Data to coordinates, (..., dim) each."""
        return (x - self.mean) @ self.inverse

    def decode(self, y: Tensor) -> Tensor:
        """Coordinates to data, (..., dim) each."""
        return y @ self.root + self.mean


class Transition(NamedTuple):
    """The numbers of one step, each of the shape of t with one dimension more, for broadcasting.

    Attributes:
        signal, noise: The levels of q(y_t | y_0).
        on_t, on_0: c_t and c_0, the weights of y_t and y_0 in the mean of q(y_s | y_t, y_0).
        small: v_t, the variance of that posterior; beta_1 at t = 1, where it is zero.
        large: beta_t, the variance of q(y_t | y_s).
    """

    signal: Tensor
    noise: Tensor
    on_t: Tensor
    on_0: Tensor
    small: Tensor
    large: Tensor


class Diffusion(nn.Module):
    """A forward process: a schedule, coordinates, and the distributions that follow.

    Args:
        shape: The shape of one data point.
        schedule: The noise schedule (:mod:`pyro_vi.diffusion`).
        coordinates: `Affine()` by default.
        draws: How many of the T steps the time-sub-sampled programs draw for each data point; as
            many as T are draws still, not every step once.

    Raises:
        ValueError: The schedule's signal-to-noise ratio does not fall, or leaves (0, 1); `draws` is
            not from 1 to T; the shape is empty or holds a size below one.

    Example:
        >>> from pyro_vi.diffusion import CosineSchedule
        >>> diffusion = Diffusion((2,), CosineSchedule(100))
        >>> y_0 = diffusion.encode(torch.randn(5, 2))
        >>> diffusion.noised(y_0, torch.tensor(50)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        shape: Sequence[int],
        schedule: Schedule,
        *,
        coordinates: Coordinates | None = None,
        draws: int = 1,
    ) -> None:
        super().__init__()
        if isinstance(shape, int):
            raise TypeError(f"expected the shape of a data point, such as ({shape},), got {shape}")
        self.shape = tuple(shape)
        if not self.shape:
            raise ValueError("expected the shape of a data point, got an empty one")
        check_sizes(**{f"shape[{i}]": size for i, size in enumerate(self.shape)}, draws=draws)
        self.dim = math.prod(self.shape)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"expected a Schedule, such as CosineSchedule(100), got {schedule!r}")
        schedule.check()
        self.schedule = schedule
        self.steps = schedule.steps
        if draws > self.steps:
            raise ValueError(f"expected to draw at most the {self.steps} steps, got {draws}")
        self.draws = draws
        self.coordinates = Affine() if coordinates is None else coordinates
        if not isinstance(self.coordinates, Coordinates):
            raise TypeError(f"expected Coordinates, such as Affine(0.5, 0.5), got {coordinates!r}")
        self._point = (1.7 * torch.arange(self.dim)).sin()  # by which coordinates are compared

    def encode(self, x_0: Tensor) -> Tensor:
        """Data in coordinates: (N, *shape) to (N, dim).

        Raises:
            TypeError: The data are not floating point numbers.
            ValueError: They have another shape.
        """
        if x_0.dim() == 0 or tuple(x_0.shape[1:]) != self.shape:
            expected = ", ".join(map(str, ("N", *self.shape)))
            raise ValueError(f"expected data of shape ({expected}), got {tuple(x_0.shape)}")
        if not x_0.is_floating_point():
            raise TypeError(f"expected data of a floating point dtype, got {x_0.dtype}")
        return self.coordinates.encode(x_0.reshape(len(x_0), self.dim))

    def decode(self, y: Tensor) -> Tensor:
        """Coordinates as data: (..., dim) to (..., *shape)."""
        return self.coordinates.decode(y).reshape(*y.shape[:-1], *self.shape)

    def prior(self, like: Tensor) -> TorchDistribution:
        """p(y_T), the standard normal: event_shape (dim,), and device and dtype of `like`."""
        return Normal(like.new_zeros(self.dim), 1.0).to_event(1)

    def noised(
        self, y_0: Tensor, t: Tensor, *, step: Transition | None = None
    ) -> TorchDistribution:
        """q(y_t | y_0).

        Args:
            y_0: Shape (..., dim).
            t: Steps from 1 to T, broadcastable with (...).
            step: What `transition` gave for them, if that is known.
        """
        step = self.transition(t, y_0.dtype) if step is None else step
        return Normal(step.signal * y_0, step.noise).to_event(1)

    def next(self, y_s: Tensor, t: Tensor) -> TorchDistribution:
        """q(y_t | y_s) with s = t - 1, where y_s is (..., dim); y_0 at t = 1."""
        step = self.transition(t, y_s.dtype)
        return Normal((1 - step.large).sqrt() * y_s, step.large.sqrt()).to_event(1)

    def before(
        self, y_t: Tensor, y_0: Tensor, t: Tensor, *, step: Transition | None = None
    ) -> TorchDistribution:
        """q(y_s | y_t, y_0) with s = t - 1.

        Args:
            y_t, y_0: Shape (..., dim) each.
            t: Steps from 2 to T, broadcastable with (...). At t = 1 there is no such density: what
                comes back has a variance of its own, for use under a mask.
            step: What `transition` gave for them, if that is known.
        """
        step = self.transition(t, y_t.dtype) if step is None else step
        return Normal(step.on_t * y_t + step.on_0 * y_0, step.small.sqrt()).to_event(1)

    def transition(self, t: Tensor, dtype: torch.dtype, *, s: Tensor | None = None) -> Transition:
        """The numbers of the step from t to s, in `dtype`; s = t - 1 if None.

        Args:
            t: Steps from 1 to T.
            dtype: Of what comes back.
            s: Earlier steps, from 0 to t - 1; 0 is the data.
        """
        if s is None:
            table = self._table(dtype, t.device)
            if table is not None:
                return Transition(*table[:, t.long()].unsqueeze(-1).unbind())
            s = t - 1
        return Transition(*(number.to(dtype).unsqueeze(-1) for number in self._numbers(t, s)))

    def _table(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The numbers of all T steps, (6, T + 1), NaN for 0; None if the schedule may change."""
        if not self.schedule.fixed:
            return None
        kept, key = self.schedule.kept, (dtype, device)
        if key not in kept:
            t = torch.arange(1, self.steps + 1, device=device)
            with torch.no_grad():
                numbers = torch.stack(self._numbers(t, t - 1))
            kept[key] = torch.nn.functional.pad(numbers, (1, 0), value=math.nan).to(dtype)
        return kept[key]

    def _numbers(self, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        """The numbers of a `Transition`, in the schedule's dtype and of the shape of t."""
        first = s == 0
        gamma_t = self.schedule.gamma(t)
        gamma_s = self.schedule.gamma(torch.where(first, t, s))
        zero, one = gamma_t.new_zeros(()), gamma_t.new_ones(())
        ratio = torch.where(first, zero, (gamma_s - gamma_t).exp())
        change = torch.where(first, one, -torch.expm1(gamma_s - gamma_t))  # 1 - ratio, in full
        signal, noise = torch.sigmoid(-gamma_t).sqrt(), torch.sigmoid(gamma_t).sqrt()
        signal_s = torch.where(first, one, torch.sigmoid(-gamma_s).sqrt())
        large = noise.square() * change
        small = torch.where(first, large, torch.sigmoid(gamma_s) * change)
        return signal, noise, ratio * signal_s / signal, signal_s * change, small, large

    def signature(self) -> Tensor:
        """Numbers by which a model and its guide tell whether they speak of one forward process.

        Sizes, the schedule's own, and what the coordinates make of a point; float64, (k,).
        They are those of the moment: a fitted model has another schedule than its untrained guide.
        """
        with torch.no_grad():
            levels = self.schedule.signature()
            held = (*self.coordinates.buffers(), *self.coordinates.parameters())
            like = next((part for part in held if part.is_floating_point()), levels)
            moved = self.coordinates.encode(self._point.to(like))
            sizes = levels.new_tensor([*self.shape, self.steps, self.draws])
            return torch.cat([part.double().to(levels.device) for part in (sizes, levels, moved)])


class StratifiedSteps(TorchDistribution):
    r"""The steps 1, ..., T, spread evenly over the elements that are drawn together.

    .. math:: q(1) = \max(1 / T, 1 / 8), \qquad q(t) = (1 - q(1)) / (T - 1), \quad t > 1

    The first step has its share because its term, the likelihood of the data, is as large as those
    of many others together: drawn as seldom as they, it would be most of the noise in a bound. Step
    i of n is the quantile at :math:`(u + i / n) \bmod 1` for one uniform u. Each has the
    distribution q by itself, and so an average of anything times `weight`, 1 / (T q(t)), is
    unbiased for that over all steps; it varies less than with independent steps. The log
    probability is that of one. It has no parameters, and thus counts as reparametrized.

    Args:
        steps: T.
        device: Where the steps are drawn; torch's default device if None.

    References:
        Variational Diffusion Models (arXiv:2107.00630), section I.1, for the spread; Improved
        Denoising Diffusion Probabilistic Models (arXiv:2102.09672), section 3.3, for the importance
        of steps

    Example:
        >>> t = StratifiedSteps(100).expand([16]).sample()
        >>> int((t == 1).sum()), len(t.unique())
        (2, 15)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        steps: int,
        *,
        device: torch.device | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_sizes(steps=steps)
        self.steps, self.device = steps, device
        self._first = max(1 / steps, _FIRST)
        super().__init__(validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The whole numbers from 1 to T."""
        return constraints.integer_interval(1, self.steps)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Steps of shape sample_shape + batch_shape, integers; spread over the batch shape."""
        shape = Size(sample_shape)
        num = self.batch_shape.numel()
        start = torch.rand((*shape, 1), dtype=torch.float64, device=self.device)
        quantile = (start + torch.arange(num, device=start.device) / max(num, 1)) % 1
        if self.steps > 1:
            rest = (quantile - self._first) / (1 - self._first)
            later = (rest * (self.steps - 1)).long().clamp(max=self.steps - 2)
            steps = torch.where(rest < 0, 1, 2 + later)
        else:
            steps = torch.ones_like(quantile, dtype=torch.long)
        return steps.reshape(shape + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(t), of the shape of the value."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        weight = self.weight(value, torch.get_default_dtype())
        return -(self.steps * weight).log().expand(shape)

    def weight(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """1 / (T q(t)), the importance weight against uniform steps, for t from 1 to T."""
        later = (self.steps - 1) / (self.steps * (1 - self._first)) if self.steps > 1 else 1.0
        first = 1 / (self.steps * self._first)
        return torch.full_like(t, later, dtype=dtype).masked_fill(t == 1, first)

    def expand(
        self, batch_shape: Sequence[int], _instance: TorchDistribution | None = None
    ) -> "StratifiedSteps":
        """The same distribution over a larger batch."""
        new = self._get_checked_instance(StratifiedSteps, _instance)
        new.steps, new.device, new._first = self.steps, self.device, self._first
        super(StratifiedSteps, new).__init__(Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new
