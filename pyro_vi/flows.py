r"""Normalizing flows as one more family: densities of any shape, from zuko's transformations.

A flow pushes a standard normal through an invertible map that depends on the context c,

    z = f(e; c),  e ~ N(0, I),    log q(z | c) = log N(e | 0, I) - log |det df/de|.

The maps here are inverse autoregressive, z_j is a function of e_1, ..., e_j alone in each layer, so
a sample and its density take one pass, which is all that variational inference asks for while it
trains. The density of a value from elsewhere is exact too, but takes one pass a dimension. This is
the only file that imports zuko.
"""

__all__ = ["Flow", "FlowDistribution"]

from collections.abc import Sequence

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from pyro_vi.checks import check_context, check_sizes
from pyro_vi.families import HEAD_GAIN

# Importing zuko switches off the validation of every torch distribution in the process: put back
# what stood before. (Its default of no argument constraints stays: its own distributions need it.)
_validate_args = Distribution._validate_args
import zuko  # noqa: E402

Distribution.set_default_validate_args(_validate_args)


class Flow(nn.Module):
    r"""An inverse autoregressive flow: correlation, skewness and curvature as the layers can bend.

    Layer by layer, `e -> z` is affine in each dimension, with a shift and a scale that depend on
    the context and on the dimensions before it, through a masked network; the order of the
    dimensions reverses from layer to layer,

    .. math:: z_j = \mu_j(e_{<j}, c) + \sigma_j(e_{<j}, c) \, e_j.

    Args:
        dim: The number of dimensions of z.
        context_dim: The number of dimensions of the context.
        transforms: The number of layers.
        hidden: The widths of the hidden layers of each masked network.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is below one.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (arXiv:1606.04934);
        Masked Autoregressive Flow for Density Estimation (arXiv:1705.07057)

    Example:
        >>> family = Flow(2, context_dim=8)
        >>> q = family(torch.randn(100, 8))
        >>> q.batch_shape, q.event_shape
        (torch.Size([100]), torch.Size([2]))
        >>> q.log_prob(torch.zeros(100, 2)).shape  # of values that it did not draw
        torch.Size([100])
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        *,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, context_dim=context_dim, transforms=transforms)
        check_sizes(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        self.dim = dim
        self.context_dim = context_dim
        order = torch.arange(dim)
        layers = [
            zuko.flows.MaskedAutoregressiveTransform(
                dim,
                context_dim,
                order=order.flip(0) if i % 2 else order,
                hidden_features=hidden,
                activation=nn.SiLU,
            )
            for i in range(transforms)
        ]
        with torch.no_grad():  # near the identity, so that the flow starts near N(0, I)
            for layer in layers:
                layer.hyper[-1].weight.mul_(HEAD_GAIN)
                layer.hyper[-1].bias.zero_()
        # zuko's transformation runs from z to e, and a masked layer's inverse is one pass back.
        self.transform = zuko.lazy.LazyComposedTransform(*(layer.inv for layer in layers))

    def forward(self, context: Tensor) -> TorchDistribution:
        """The density given a context. It holds for the flow's present parameters.

        Args:
            context: Shape (..., context_dim).

        Returns:
            A distribution of batch_shape (...) and event_shape (dim,).

        Raises:
            ValueError: The context's last dimension is not `context_dim`.
        """
        check_context(context, self.context_dim)
        zeros = context.new_zeros(*context.shape[:-1], self.dim)
        base = zuko.distributions.DiagNormal(zeros, torch.ones_like(zeros))
        return FlowDistribution(zuko.distributions.NormalizingFlow(self.transform(context), base))


class FlowDistribution(ZukoToPyro):
    r"""A zuko flow as a Pyro distribution over R^dim that remembers the density of what it drew.

    Pyro's wrapper keeps the log density that comes with a draw, because the way back may cost a
    pass a dimension. Here it is used only where it is the answer: for the very tensor that was
    drawn, not written to since, and not for gradients when the draw was made without them.

    Args:
        dist: The zuko distribution, with ``rsample_and_log_prob``.

    Example:
        >>> q = Flow(2, context_dim=8)(torch.randn(8))
        >>> z = q.rsample()
        >>> torch.allclose(q.log_prob(z), q.log_prob(z.clone()), atol=1e-4)
        True
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.real_vector

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws of shape sample_shape + batch_shape + (dim,), differentiable."""
        value, log_prob = self.dist.rsample_and_log_prob(Size(sample_shape))
        self.cache = {value: (log_prob, _version(value), torch.is_grad_enabled())}
        return value

    def __call__(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws of shape sample_shape + batch_shape + (dim,), differentiable."""
        return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats; shape (...) for a value of shape (..., dim)."""
        if value in self.cache:
            log_prob, version, with_grad = self.cache[value]
            if version == _version(value) and (with_grad or not torch.is_grad_enabled()):
                return log_prob
        return self.dist.log_prob(value)

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> "FlowDistribution":
        """The same density over a larger batch."""
        return FlowDistribution(self.dist.expand(Size(batch_shape)))


def _version(value: Tensor) -> int:
    """How often a tensor was written to in place; inference tensors don't count."""
    return -1 if value.is_inference() else value._version
