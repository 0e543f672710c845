"""Several guides as one, such as a guide of a decoder's weights beside an encoder."""

__all__ = ["Joint"]

from collections.abc import Callable
from typing import Any


class Joint:
    r"""The product of guides that each sample some of the latents.

    .. math:: q(W, z \mid x) = q(W) \, q(z \mid x)

    Args:
        guides: Callables of the model's arguments, called in this order.

    Raises:
        TypeError: What is not callable.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def normal(name):
        ...     return lambda x: pyro.sample(name, dist.Normal(x, 1.0))
        >>> guide = Joint(normal("a"), normal("b"))
        >>> list(pyro.poutine.trace(guide).get_trace(torch.tensor(0.0)).stochastic_nodes)
        ['a', 'b']
    """

    def __init__(self, *guides: Callable[..., Any]) -> None:
        for guide in guides:
            if not callable(guide):
                raise TypeError(f"expected callables as guides, got {guide!r}")
        self.guides = guides

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        for guide in self.guides:
            guide(*args, **kwargs)
