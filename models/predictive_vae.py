r"""A variational autoencoder of y given x, as a Pyro program.

    z | x ~ p(z | x),    y | x, z ~ p(y | decoder(z, x)),

for every data point in plate "data". The other half is a guide of both:
:class:`pyro_vi.guides.PairEncoder`. Sohn, Lee and Yan, Learning Structured Output Representation
using Deep Conditional Generative Models (NeurIPS 2015).
"""

__all__ = ["PredictiveVAE"]

from collections.abc import Callable, Sequence
from typing import cast

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vi.augmentation import InputNoise, check_noise
from pyro_vi.checks import check_data, check_family, check_sizes
from pyro_vi.models.likelihoods import Bernoulli
from pyro_vi.networks import MLPDecoder, MLPEncoder


class PredictiveVAE(PyroModule):
    r"""A latent variable model of y given x, p(z | x) p(y | x, z).

    .. math:: p(y \mid x) = \int p(z \mid x) \, p(y \mid x, z) \, dz, \qquad
              c = \mathrm{network}(x), \quad
              p(z \mid x) = \mathrm{family}(c), \quad
              p(y \mid x, z) = \mathrm{likelihood}(\mathrm{decoder}(z, c))

    Pyro's ELBO of it and a guide q(z | x, y), both called with (x, y), is

    .. math:: \log p(y \mid x) \ge E_{q(z \mid x, y)} \log p(y \mid x, z)
              - KL(q(z \mid x, y) \,\|\, p(z \mid x))

    Sites: the latent "z" of event_shape (family.dim,) and the observed "y" of event_shape
    `shape_y`, both in plate "data".

    Predictions need x alone: `predict` draws y. Of held-out pairs,
    `Fit.log_predictive_density((x, y))` is an importance-weighted estimate of log p(y | x), by the
    guide's draws. (`Fit.predict((x, y))` draws new y from the z of the pair, which has seen y.)

    With `noise` the program reads x_t in place of x while it trains, in prior and likelihood. Given
    to the guide as well, the bound is one on the average of log p(y | x_t) over the noise, not on
    log p(y | x). With `target_noise` it observes y_t in place of y: then on that of log p(y_t | x),
    the density of a noisy y, wider than that of y; it takes a likelihood of real numbers.

    Args:
        shape_x: The shape of one x.
        shape_y: The shape of one y.
        family: The family of the prior p(z | x) (:mod:`pyro_vi.families`, :mod:`pyro_vi.flows`, or
            one of your own).
        likelihood: The distribution of y given the decoder's output
            (:mod:`pyro_vi.models.likelihoods`); None for
            :class:`~pyro_vi.models.likelihoods.Bernoulli`, which takes binary data alone.
        network: Makes the network from `shape_x` and the width of its output,
            ``family.context_dim``.
        decoder: Makes the decoder from ``family.dim + family.context_dim``, for z and then c, and
            the shape of its output, ``(likelihood.outputs, *shape_y)``.
        noise: Noise on x in training (:mod:`pyro_vi.augmentation`); the guide has it too.
        target_noise: Noise on y in training, without `add_back`; likewise.

    Raises:
        TypeError: The family is not a module with a `dim` and a `context_dim`, the likelihood none
            with `outputs`, or a noise no `InputNoise`.
        ValueError: Noise on y that adds it back, which would observe something else than y; or
            under a likelihood that does not take all real numbers.

    References:
        Learning Structured Output Representation using Deep Conditional Generative Models (Sohn,
        Lee and Yan, NeurIPS 2015)

    Example:
        >>> from pyro_vi.families import MeanField
        >>> model = PredictiveVAE((1, 4, 8), (1, 4, 8), MeanField(3, context_dim=32))
        >>> x, y = torch.rand(10, 1, 4, 8), torch.rand(10, 1, 4, 8).round()
        >>> trace = pyro.poutine.trace(model).get_trace(x, y)
        >>> trace.nodes["z"]["value"].shape
        torch.Size([10, 3])
        >>> model.predict(x, 100).shape  # a hundred lower halves for each upper one
        torch.Size([100, 10, 1, 4, 8])
    """

    def __init__(
        self,
        shape_x: Sequence[int],
        shape_y: Sequence[int],
        family: nn.Module,
        *,
        likelihood: nn.Module | None = None,
        network: Callable[[tuple[int, ...], int], nn.Module] = MLPEncoder,
        decoder: Callable[[int, tuple[int, ...]], nn.Module] = MLPDecoder,
        noise: InputNoise | None = None,
        target_noise: InputNoise | None = None,
    ) -> None:
        super().__init__()
        check_family(family, "dim", "context_dim")
        likelihood = Bernoulli() if likelihood is None else likelihood
        if not isinstance(likelihood, nn.Module) or not hasattr(likelihood, "outputs"):
            raise TypeError(
                f"expected the likelihood to be a module with its number of outputs, such as "
                f"Gaussian(0.1), got {likelihood!r}"
            )
        check_noise(noise=noise, target_noise=target_noise)
        if target_noise is not None and target_noise.add_back:
            raise ValueError("expected target_noise without add_back: y_t + y is no noisy y")
        if target_noise is not None and target_noise.t_max > 0:
            _check_reals(likelihood, tuple(shape_y))
        self.shape_x, self.shape_y = tuple(shape_x), tuple(shape_y)
        self.family = family
        self.likelihood = likelihood
        dim, width = cast(int, family.dim), cast(int, family.context_dim)
        self.network = network(self.shape_x, width)
        self.shape_out = (cast(int, likelihood.outputs), *self.shape_y)
        self.decoder = decoder(dim + width, self.shape_out)
        self.noise, self.target_noise = noise, target_noise

    def forward(self, x: Tensor, y: Tensor) -> None:
        """The program: draws "z" and observes "y".

        Args:
            x: What is given, shape (N, *shape_x).
            y: What is observed, shape (N, *shape_y).

        Raises:
            TypeError: The data have another dtype than the parameters.
            ValueError: The data have another shape, x and y different numbers of data points, or y
                values outside the likelihood's support.
        """
        check_data(self._dtype(), x=(x, self.shape_x), y=(y, self.shape_y))
        plate = pyro.plate("data", len(x))
        if self.noise is not None:
            with plate:
                x = self.noise(x)
        if self.target_noise is not None:
            with plate:
                y = self.target_noise(y, name="_y")
        context = self.network(x)
        p = self.family(context)
        with plate:
            z = pyro.sample("z", p)
            pyro.sample("y", self._likelihood(z, context), obs=y)

    def prior(self, x: Tensor) -> TorchDistribution:
        """p(z | x), without noise.

        Args:
            x: Shape (N, *shape_x).

        Returns:
            A distribution of batch_shape (N,) and event_shape (family.dim,).

        Raises:
            TypeError, ValueError: As of `forward`.
        """
        return self.family(self._context(x))

    def decode(self, z: Tensor, x: Tensor) -> TorchDistribution:
        """p(y | x, z), without noise.

        Args:
            z: Latent variables, shape (..., N, family.dim).
            x: Shape (N, *shape_x).

        Returns:
            A distribution of batch_shape (..., N) and event_shape `shape_y`.

        Raises:
            TypeError, ValueError: As of `forward`; a decoder's output of another shape than it was
                asked for.
        """
        return self._likelihood(z, self._context(x))

    def predict(
        self, x: Tensor, num_samples: int = 100, *, expected: bool = False, t: int = 0
    ) -> Tensor:
        """Draws from p(y | x) for new x, from one draw of z each.

        Args:
            x: Shape (N, *shape_x).
            num_samples: Draws for each x (S).
            expected: Means of y given z, instead of draws: their mean is that of y with less noise.
            t: The level of noise on x, drawn for every draw; 0 is none.

        Returns:
            Shape (S, N, *shape_y). The draws are torch's: seed them outside.

        Raises:
            TypeError, ValueError: As of `forward`; fewer than one draw; a level that is no int, or
                not from 0 to the noise's t_max, which is 0 without noise.
        """
        check_sizes(num_samples=num_samples)
        last = 0 if self.noise is None else self.noise.t_max
        if isinstance(t, bool) or not isinstance(t, int):
            raise TypeError(f"expected a level of noise as an int, got {t!r}")
        if not 0 <= t <= last:
            raise ValueError(f"expected a level of noise from 0 to {last}, got {t}")
        with torch.no_grad():
            context = self._context(x)
            if t > 0 and self.noise is not None:
                eps = torch.randn(num_samples, *x.shape, dtype=x.dtype, device=x.device)
                levels = torch.full(eps.shape[:2], t, device=x.device)
                context = self.network(self.noise.noisy(x, levels, eps))
            z = self.family(context.expand(num_samples, *context.shape[-2:])).sample()
            p = self._likelihood(z, context)
            return cast(Tensor, p.mean if expected else p.sample())

    def _dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.family.parameters()), None)

    def _context(self, x: Tensor) -> Tensor:
        check_data(self._dtype(), x=(x, self.shape_x))
        return self.network(x if self.noise is None else self.noise.clean(x))

    def _likelihood(self, z: Tensor, context: Tensor) -> TorchDistribution:
        context = context.expand(*z.shape[:-1], context.shape[-1])
        raw = self.decoder(torch.cat([z, context], -1))
        expected = (*z.shape[:-1], *self.shape_out)
        if tuple(raw.shape) != expected:
            raise ValueError(f"expected a decoder's output of {expected}, got {tuple(raw.shape)}")
        return self.likelihood(raw, event_dim=len(self.shape_y))


def _check_reals(likelihood: nn.Module, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a likelihood takes what noise makes of y: any real numbers."""
    held = next(likelihood.parameters(), torch.zeros(()))
    with torch.no_grad():
        p = likelihood(
            held.new_zeros(1, cast(int, likelihood.outputs), *shape), event_dim=len(shape)
        )
        taken = all(bool(p.support.check(held.new_full((1, *shape), y)).all()) for y in (-1.3, 2.7))
    if not taken:
        raise ValueError(
            f"target_noise makes any real numbers of y, and {type(likelihood).__name__} takes"
            f" {p.support} alone: expected a likelihood of real numbers, such as Gaussian(0.1)"
        )
