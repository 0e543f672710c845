r"""The amortized guide: one network gives every data point its own posterior, in any family.

    q(z | x) = family(network(x)),

for every data point in plate "data". It is the recognition model of a VAE, where the family is
mean-field, and any other family drops in. In training it may read a noisy x_t in place of x.
"""

__all__ = ["Encoder"]

from collections.abc import Callable, Sequence
from typing import cast

import pyro
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vi.augmentation import InputNoise, check_noise
from pyro_vi.checks import check_family
from pyro_vi.networks import MLPEncoder


class Encoder(PyroModule):
    r"""An amortized posterior over "z" for models such as :class:`pyro_vi.models.VAE`.

    .. math:: q(z \mid x) = \mathrm{family}(\mathrm{network}(x))

    With `noise` it is q(z | x_t) while it trains, and the model is as it was: the bound, an average
    over the noise of the bounds with q(z | x_t), is still one on log p(x). At every level t and
    noise eps, which do not depend on z,

    .. math:: \log p(x) - E_{q(z \mid x_t)} [\log p(x, z) - \log q(z \mid x_t)]
              = KL(q(z \mid x_t) \,\|\, p(z \mid x)) \ge 0,

    and so is the average over them. p(t) p(eps) stands in the guide and would in the model, where
    nothing reads it; the two cancel, and it is left out.

    Args:
        shape: The shape of one data point.
        family: The family of the posterior (:mod:`pyro_vi.families`, :mod:`pyro_vi.flows`, or one
            of your own).
        network: Makes the network from `shape` and the width of its output, ``family.context_dim``.
        noise: Noise on x in training (:mod:`pyro_vi.augmentation`).

    Raises:
        TypeError: The family is not a module with a `context_dim`, or the noise no `InputNoise`.

    References:
        Auto-Encoding Variational Bayes (arXiv:1312.6114)

    Example:
        >>> from pyro_vi.families import FullCovariance
        >>> guide = Encoder((1, 8, 8), FullCovariance(4, context_dim=128))
        >>> guide.encode(torch.rand(10, 1, 8, 8)).covariance_matrix.shape
        torch.Size([10, 4, 4])
    """

    def __init__(
        self,
        shape: Sequence[int],
        family: nn.Module,
        *,
        network: Callable[[tuple[int, ...], int], nn.Module] = MLPEncoder,
        noise: InputNoise | None = None,
    ) -> None:
        super().__init__()
        check_family(family, "context_dim")
        check_noise(noise=noise)
        self.shape = tuple(shape)
        self.family = family
        self.network = network(self.shape, cast(int, family.context_dim))
        self.noise = noise

    def forward(self, x: Tensor) -> None:
        """The program: draws "z".

        Args:
            x: The data, shape (N, *shape).

        Raises:
            ValueError: The data have another shape.
        """
        self._check(x)
        plate = pyro.plate("data", x.shape[0])
        if self.noise is None:
            q = self.encode(x)
        else:
            with plate:
                x_t = self.noise(x, auxiliary=True)
            q = self.family(self.network(x_t))
        with plate:
            pyro.sample("z", q)

    def encode(self, x: Tensor) -> TorchDistribution:
        """The posterior q(z | x), without noise.

        Args:
            x: The data, shape (N, *shape).

        Returns:
            A distribution of batch_shape (N,) and event_shape (family.dim,).

        Raises:
            TypeError: The data have another dtype than the encoder's parameters.
            ValueError: The data have another shape.
        """
        self._check(x)
        return self.family(self.network(x if self.noise is None else self.noise.clean(x)))

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected the data as a tensor, got {type(x).__name__}")
        if x.dim() == 0 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"expected data of shape (N, *{self.shape}), got {tuple(x.shape)}")
        own = next(self.family.parameters(), x).dtype
        if x.dtype != own:
            raise TypeError(
                f"expected data of the encoder's dtype, {own}, got {x.dtype}: convert the data"
                " (.float()) or the programs (.double())"
            )
