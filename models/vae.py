r"""The variational autoencoder's generative half, as a Pyro program.

    z ~ N(0, I),    x | z ~ p(x | decoder(z)),

for every data point in plate "data". The other half is a guide: :class:`pyro_vi.guides.Encoder`.
Kingma and Welling, Auto-Encoding Variational Bayes (arXiv:1312.6114).
"""

__all__ = ["VAE"]

from collections.abc import Callable, Sequence
from typing import cast

import pyro
from pyro.distributions import Normal, TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vi.checks import check_sizes
from pyro_vi.models.likelihoods import Bernoulli
from pyro_vi.networks import MLPDecoder


class VAE(PyroModule):
    r"""A latent variable model with a neural likelihood, p(z) p(x | z).

    .. math:: p(x) = \int N(z \mid 0, I) \, p(x \mid \mathrm{decoder}(z)) \, dz

    Sites: the latent "z" of event_shape (latent_dim,) and the observed "x" of event_shape `shape`,
    both in plate "data".

    Args:
        shape: The shape of one data point.
        latent_dim: The number of dimensions of z.
        likelihood: The distribution of x given the decoder's output
            (:mod:`pyro_vi.models.likelihoods`); None for
            :class:`~pyro_vi.models.likelihoods.Bernoulli`, which takes binary data alone.
        decoder: Makes the decoder from `latent_dim` and the shape of its output,
            ``(likelihood.outputs, *shape)``.

    Raises:
        TypeError: `latent_dim` is not an integer, or the likelihood is not a module with `outputs`.
        ValueError: `latent_dim` is below one.

    References:
        Auto-Encoding Variational Bayes (arXiv:1312.6114)

    Example:
        >>> model = VAE((1, 8, 8), latent_dim=4)
        >>> x = torch.rand(10, 1, 8, 8).round()
        >>> trace = pyro.poutine.trace(model).get_trace(x)
        >>> trace.nodes["z"]["value"].shape
        torch.Size([10, 4])
        >>> model.decode(torch.randn(3, 4)).mean.shape  # three new images
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent_dim: int,
        *,
        likelihood: nn.Module | None = None,
        decoder: Callable[[int, tuple[int, ...]], nn.Module] = MLPDecoder,
    ) -> None:
        super().__init__()
        check_sizes(latent_dim=latent_dim)
        likelihood = Bernoulli() if likelihood is None else likelihood
        if not isinstance(likelihood, nn.Module) or not hasattr(likelihood, "outputs"):
            raise TypeError(
                f"expected the likelihood to be a module with its number of outputs, such as "
                f"Gaussian(0.1), got {likelihood!r}"
            )
        self.shape = tuple(shape)
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.shape_out = (cast(int, likelihood.outputs), *self.shape)
        self.decoder = decoder(latent_dim, self.shape_out)

    def forward(self, x: Tensor) -> None:
        """The program: draws "z" and observes "x".

        Args:
            x: The data, shape (N, *shape). Its device and dtype are those of the prior.

        Raises:
            TypeError: The data are not floating point numbers.
            ValueError: The data have another shape, or values outside the likelihood's support.
        """
        if tuple(x.shape[1:]) != self.shape or x.dim() == 0:
            raise ValueError(f"expected data of shape (N, *{self.shape}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected data of a floating point dtype, got {x.dtype}")
        with pyro.plate("data", x.shape[0]):
            loc = x.new_zeros(x.shape[0], self.latent_dim)
            z = pyro.sample("z", Normal(loc, 1.0).to_event(1))
            pyro.sample("x", self.decode(z), obs=x)

    def decode(self, z: Tensor) -> TorchDistribution:
        """The likelihood p(x | z).

        Args:
            z: Latent variables, shape (..., latent_dim).

        Returns:
            A distribution of batch_shape (...) and event_shape `shape`.

        Raises:
            ValueError: The decoder's output has another shape than it was asked for.
        """
        raw = self.decoder(z)
        expected = (*z.shape[:-1], *self.shape_out)
        if tuple(raw.shape) != expected:
            raise ValueError(
                f"expected a decoder from {tuple(z.shape)} to {expected}, got {tuple(raw.shape)}"
            )
        return self.likelihood(raw, event_dim=len(self.shape))
