r"""Families of densities over R^dim given a context: what a variational posterior is made of.

A family is an :class:`torch.nn.Module` that maps a context vector `c` to a Pyro distribution,

    c  ->  q(z | c),    batch_shape = c.shape[:-1],    event_shape = (dim,).

It knows nothing of sample sites: guides wrap it in ``pyro.sample``, and models may use it as well.
Three Gaussian families live here, from the cheapest to the richest,

    MeanField       N(z | m, diag(s^2))           dim + dim numbers
    LowRank         N(z | m, S (I + F F') S)      dim + dim + dim * rank,  S = diag(s)
    FullCovariance  N(z | m, L L')                dim + dim * (dim + 1) / 2

and :mod:`pyro_vi.flows` adds normalizing flows. Each is one linear map of the context, so the
network in front of it decides how nonlinear the dependence on the data is. All of them start near
N(0, I), the usual prior. Any module with the attributes ``dim`` and ``context_dim`` and such a
``forward`` is a family too.
"""

__all__ = ["FullCovariance", "LowRank", "MeanField"]

import math

import torch
import torch.nn.functional as F
from pyro.distributions import (
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TorchDistribution,
)
from torch import Tensor, nn

from pyro_vi.checks import check_context, check_sizes

SCALE_FLOOR = 1e-5  # the smallest scale: 1 / scale^2 stays far from overflow, in float32 too
HEAD_GAIN = 0.1  # a new head's weights relative to torch's own: q(z | c) hardly depends on c
FACTOR_STD = 0.1  # a new low-rank factor's entries: at exactly zero the factor's gradient vanishes


class MeanField(nn.Module):
    r"""Independent normals: a diagonal covariance.

    .. math:: q(z \mid c) = \prod_j N(z_j \mid m_j(c), s_j(c)^2)

    with `m` linear in the context and `s` the softplus of a linear map, plus a floor of 1e-5.

    Args:
        dim: The number of dimensions of z.
        context_dim: The number of dimensions of the context.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is below one.

    References:
        Auto-Encoding Variational Bayes (arXiv:1312.6114)

    Example:
        >>> family = MeanField(2, context_dim=8)
        >>> q = family(torch.zeros(100, 8))
        >>> q.batch_shape, q.event_shape
        (torch.Size([100]), torch.Size([2]))
        >>> q.mean[0].detach(), q.stddev[0].detach()  # new, it is near the standard normal
        (tensor([0., 0.]), tensor([1., 1.]))
    """

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__()
        check_sizes(dim=dim, context_dim=context_dim)
        self.dim = dim
        self.context_dim = context_dim
        self.head = _head(context_dim, 2 * dim)

    def forward(self, context: Tensor) -> TorchDistribution:
        """The density given a context.

        Args:
            context: Shape (..., context_dim).

        Returns:
            A distribution of batch_shape (...) and event_shape (dim,).

        Raises:
            ValueError: The context's last dimension is not `context_dim`.
        """
        check_context(context, self.context_dim)
        loc, raw = self.head(context).chunk(2, dim=-1)
        return Normal(loc, positive(raw)).to_event(1)


class FullCovariance(nn.Module):
    r"""A normal with every correlation, through the Cholesky factor of its covariance.

    .. math:: q(z \mid c) = N(z \mid m(c), L(c) L(c)^T)

    with `m` and the entries of `L` below the diagonal linear in the context, and the diagonal of
    `L` the softplus of a linear map, plus a floor of 1e-5. A sample costs O(dim^2), and so does its
    density.

    Args:
        dim: The number of dimensions of z.
        context_dim: The number of dimensions of the context.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is below one.

    References:
        Doubly Stochastic Variational Bayes for non-Conjugate Inference (Titsias and
        Lazaro-Gredilla, ICML 2014); An Introduction to Variational Autoencoders, section 2.5
        (arXiv:1906.02691)

    Example:
        >>> family = FullCovariance(3, context_dim=8)
        >>> q = family(torch.randn(100, 8))
        >>> q.covariance_matrix.shape
        torch.Size([100, 3, 3])
    """

    below: Tensor

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__()
        check_sizes(dim=dim, context_dim=context_dim)
        self.dim = dim
        self.context_dim = context_dim
        row, column = torch.tril_indices(dim, dim, offset=-1)
        self.register_buffer("below", row * dim + column, persistent=False)
        self.head = _head(context_dim, 2 * dim + len(row))

    def forward(self, context: Tensor) -> TorchDistribution:
        """The density given a context.

        Args:
            context: Shape (..., context_dim).

        Returns:
            A distribution of batch_shape (...) and event_shape (dim,).

        Raises:
            ValueError: The context's last dimension is not `context_dim`.
        """
        check_context(context, self.context_dim)
        sizes = [self.dim, self.dim, len(self.below)]
        loc, raw, entries = self.head(context).split(sizes, dim=-1)
        flat = entries.new_zeros(*entries.shape[:-1], self.dim**2)
        strict = flat.index_copy(-1, self.below, entries).unflatten(-1, (self.dim, self.dim))
        return MultivariateNormal(loc, scale_tril=strict + positive(raw).diag_embed())


class LowRank(nn.Module):
    r"""A normal whose covariance is diagonal plus low rank: the strongest correlations for little.

    .. math:: q(z \mid c) = N(z \mid m, S (I + F F^T) S), \quad S = \mathrm{diag}(s)

    with `m` and the matrix `F` of shape (dim, rank) linear in the context and `s` the softplus of a
    linear map, plus a floor of 1e-5. A sample costs O(dim * rank), its density O(dim * rank^2). The
    factor starts small and random: `F = 0` is a saddle point.

    Args:
        dim: The number of dimensions of z.
        context_dim: The number of dimensions of the context.
        rank: The number of columns of F.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is below one, or the rank is above `dim`.

    References:
        Gaussian Variational Approximation with a Factor Covariance Structure (arXiv:1701.03208)

    Example:
        >>> family = LowRank(20, context_dim=8, rank=2)
        >>> q = family(torch.randn(100, 8))
        >>> q.cov_factor.shape, q.cov_diag.shape
        (torch.Size([100, 20, 2]), torch.Size([100, 20]))
    """

    def __init__(self, dim: int, context_dim: int, rank: int = 2) -> None:
        super().__init__()
        check_sizes(dim=dim, context_dim=context_dim, rank=rank)
        if rank > dim:
            raise ValueError(f"expected a rank of at most dim = {dim}, got {rank}")
        self.dim = dim
        self.context_dim = context_dim
        self.rank = rank
        self.head = _head(context_dim, (2 + rank) * dim)
        nn.init.normal_(self.head.bias[2 * dim :], std=FACTOR_STD)

    def forward(self, context: Tensor) -> TorchDistribution:
        """The density given a context.

        Args:
            context: Shape (..., context_dim).

        Returns:
            A distribution of batch_shape (...) and event_shape (dim,).

        Raises:
            ValueError: The context's last dimension is not `context_dim`.
        """
        check_context(context, self.context_dim)
        sizes = [self.dim, self.dim, self.dim * self.rank]
        loc, raw, entries = self.head(context).split(sizes, dim=-1)
        factor = entries.unflatten(-1, (self.dim, self.rank))
        # In units of the scale: the Cholesky factor in the density is that of I + F'F, which stays
        # well conditioned when a scale comes close to zero.
        scale = positive(raw)
        return LowRankMultivariateNormal(loc, scale.unsqueeze(-1) * factor, scale.square())


def positive(raw: Tensor) -> Tensor:
    """A positive scale for any real number, one for zero: softplus(raw + const) + 1e-5.

    It falls like an exponential and grows linearly, so it never overflows.

    Args:
        raw: Any shape.

    Returns:
        The same shape, above 1e-5.

    Example:
        >>> positive(torch.tensor([-1e4, 0.0, 1e4]))
        tensor([1.0000e-05, 1.0000e+00, 1.0001e+04])
    """
    return F.softplus(raw + math.log(math.expm1(1 - SCALE_FLOOR))) + SCALE_FLOOR


def _head(context_dim: int, outputs: int) -> nn.Linear:
    """A linear map that starts near zero."""
    head = nn.Linear(context_dim, outputs)
    with torch.no_grad():
        head.weight.mul_(HEAD_GAIN)
        head.bias.zero_()
    return head
