"""Several guides as one, such as a guide of a decoder's weights beside an encoder."""

from __future__ import annotations

__all__ = ["Joint"]

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample


class Joint:
    r"""The product of guides that each sample some of the latents.

    .. math:: q(W, z \mid x) = q(W) \, q(z \mid x)

    A plate that several of them have, such as "data", is one plate of one size: where it is
    sub-sampled, all have the indices that the first of them drew.

    Args:
        guides: Callables of the model's arguments, called in this order.

    Raises:
        TypeError: What is not callable.
        ValueError: There are none. When it runs: a site that two of them sample, or plates of one
            name and several sizes.

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
        if not guides:
            raise ValueError("expected guides, such as Joint(weights, encoder), got none")
        for guide in guides:
            if not callable(guide):
                raise TypeError(f"expected callables as guides, got {guide!r}")
        self.guides = guides

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        beside = _Beside()
        for guide in self.guides:
            with beside:
                guide(*args, **kwargs)


class _Beside(Messenger):
    """Runs guides one after the other: they share plates, and no other sites."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Any] = {}  # the sites of the guides that ran
        self._now: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        first = self._before.get(msg["name"])
        if first is None:
            return
        if not (site_is_subsample(msg) and site_is_subsample(first)):
            raise ValueError(
                f"site {msg['name']!r} is in two of the guides: each latent needs one guide"
            )
        sizes = [_size(site) for site in (first, msg)]
        if sizes[0] != sizes[1] or not _agree(first["value"], msg["value"]):
            raise ValueError(
                f"plate {msg['name']!r} is in two of the guides, of {sizes[0]} and of {sizes[1]}"
                f"{'' if sizes[0] != sizes[1] else ', not the same ones'}: give it another name in"
                " one of them"
            )
        # Outer handlers have it already, and Pyro refuses a name that comes twice.
        msg["value"], msg["done"], msg["stop"] = first["value"], True, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] not in self._before:
            self._now[msg["name"]] = msg

    def __exit__(self, *exception: Any) -> None:
        self._before |= self._now
        self._now.clear()
        super().__exit__(*exception)


def _size(plate: Any) -> str:
    """The size of a plate and how many of its indices are there, before or after they are drawn."""
    fn, given = plate["fn"], plate["value"]
    rows = len(given) if given is not None else fn.subsample_size or fn.size
    return f"{rows} of {fn.size} elements"


def _agree(indices: Any, given: Any) -> bool:
    """Whether a plate's own indices, if it is made with them, are those."""
    if given is None or given is indices:
        return True
    return torch.equal(torch.as_tensor(given), torch.as_tensor(indices))
