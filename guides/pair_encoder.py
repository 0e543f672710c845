r"""The amortized guide of a model of y given x: one network reads both.

    q(z | x, y) = family(network(x, y)),

for every data point in plate "data".
"""

__all__ = ["PairEncoder"]

from collections.abc import Callable, Sequence
from math import prod
from typing import cast

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vi.augmentation import InputNoise, check_noise
from pyro_vi.checks import check_data, check_family
from pyro_vi.networks import MLPEncoder


class PairEncoder(PyroModule):
    r"""An amortized posterior over "z" for :class:`pyro_vi.models.PredictiveVAE`.

    .. math:: q(z \mid x, y) = \mathrm{family}(\mathrm{network}(x, y))

    With `noise` it reads x_t in place of x while it trains, with `target_noise` y_t in place of y:
    the model has the same. A fitted model reads x itself, and takes guides without noise.

    Args:
        shape_x: The shape of one x.
        shape_y: The shape of one y.
        family: The family of the posterior (:mod:`pyro_vi.families`, :mod:`pyro_vi.flows`, or one
            of your own).
        network: Makes the network from the shape of its input, ``(numbers of x and y,)``: both are
            flattened, x first; and from the width of its output, ``family.context_dim``.
        noise, target_noise: The model's own (:mod:`pyro_vi.augmentation`).

    Raises:
        TypeError: The family is not a module with a `context_dim`, or a noise no `InputNoise`.

    References:
        Learning Structured Output Representation using Deep Conditional Generative Models (Sohn,
        Lee and Yan, NeurIPS 2015)

    Example:
        >>> from pyro_vi.families import FullCovariance
        >>> guide = PairEncoder((1, 4, 8), (1, 4, 8), FullCovariance(3, context_dim=64))
        >>> guide.encode(torch.rand(10, 1, 4, 8), torch.rand(10, 1, 4, 8)).batch_shape
        torch.Size([10])
    """

    def __init__(
        self,
        shape_x: Sequence[int],
        shape_y: Sequence[int],
        family: nn.Module,
        *,
        network: Callable[[tuple[int, ...], int], nn.Module] = MLPEncoder,
        noise: InputNoise | None = None,
        target_noise: InputNoise | None = None,
    ) -> None:
        super().__init__()
        check_family(family, "context_dim")
        check_noise(noise=noise, target_noise=target_noise)
        self.shape_x, self.shape_y = tuple(shape_x), tuple(shape_y)
        self.family = family
        numbers = prod(self.shape_x) + prod(self.shape_y)
        self.network = network((numbers,), cast(int, family.context_dim))
        self.noise, self.target_noise = noise, target_noise

    def forward(self, x: Tensor, y: Tensor) -> None:
        """The program: draws "z".

        Args:
            x: Shape (N, *shape_x).
            y: Shape (N, *shape_y).

        Raises:
            TypeError: The data have another dtype than the parameters.
            ValueError: The data have another shape, or x and y different numbers of data points.
        """
        self._check(x, y)
        plate = pyro.plate("data", len(x))
        if self.noise is not None:
            with plate:
                x = self.noise(x)
        if self.target_noise is not None:
            with plate:
                y = self.target_noise(y, name="_y")
        q = self._posterior(x, y)
        with plate:
            pyro.sample("z", q)

    def encode(self, x: Tensor, y: Tensor) -> TorchDistribution:
        """The posterior q(z | x, y), without noise.

        Args:
            x: Shape (N, *shape_x).
            y: Shape (N, *shape_y).

        Returns:
            A distribution of batch_shape (N,) and event_shape (family.dim,).

        Raises:
            TypeError, ValueError: As of `forward`.
        """
        self._check(x, y)
        x = x if self.noise is None else self.noise.clean(x)
        return self._posterior(x, y)

    def _check(self, x: Tensor, y: Tensor) -> None:
        own = next((p.dtype for p in self.family.parameters()), None)
        check_data(own, x=(x, self.shape_x), y=(y, self.shape_y))

    def _posterior(self, x: Tensor, y: Tensor) -> TorchDistribution:
        """q of inputs that may have dimensions before N, not both the same ones."""
        flat = [
            value.reshape(*value.shape[: value.dim() - len(shape)], prod(shape))
            for value, shape in ((x, self.shape_x), (y, self.shape_y))
        ]
        batch = torch.broadcast_shapes(*(value.shape[:-1] for value in flat))
        both = torch.cat([value.expand(*batch, value.shape[-1]) for value in flat], -1)
        return self.family(self.network(both))
