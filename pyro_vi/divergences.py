"""KL divergences in closed form, of normals with any pair of covariances."""

from __future__ import annotations

__all__ = ["closed_form_kl", "kl_rows"]

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vi.programs import is_delta


def kl_rows(q: Any, p: Any, value: Tensor) -> Tensor:
    """KL(q || p) of each element of the batch shape, or log q - log p at a value if it has none.

    As `told(TraceMeanField_ELBO())` evaluates a site: in closed form for normals of any covariance.

    Args:
        q, p: two distributions of one shape.
        value: a draw from q.
    """
    kl = closed_form_kl(q, p)
    return q.log_prob(value) - p.log_prob(value) if kl is None else kl


def closed_form_kl(q: Any, p: Any) -> Tensor | None:
    """KL(q || p) of each element of the batch shape; None where torch's is missing or wrong."""
    if is_delta(q):
        return None
    try:
        kl = _torch_kl(q, p)
    except NotImplementedError:
        return None
    return kl if isinstance(kl, Tensor) else None  # a number: nothing counts, masked as a whole


def _torch_kl(q: Any, p: Any) -> Any:
    """torch's KL(q || p), of normals too of which one is independent and the other is not."""
    if isinstance(q, _JOINT) and _is_independent_normal(p) and q.event_shape == p.event_shape:
        # Of an independent p = prod_i p_i the KL is the sum of KL(q_i || p_i) and the total
        # correlation of q, the sum of H(q_i) - H(q): O(dim^2), where a solve has O(dim^3).
        alone = dist.Normal(q.mean, q.variance.sqrt(), validate_args=False).to_event(1)
        return torch.distributions.kl_divergence(alone, p) + (alone.entropy() - q.entropy())
    if isinstance(p, _JOINT) and _is_independent_normal(q):
        root = torch.diag_embed(q.base_dist.scale)
        q = dist.MultivariateNormal(q.base_dist.loc, scale_tril=root, validate_args=False)
    return torch.distributions.kl_divergence(q, p)


_JOINT = (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)


def _is_independent_normal(fn: Any) -> bool:
    return (
        isinstance(fn, torch.distributions.Independent)
        and fn.reinterpreted_batch_ndims == 1
        and isinstance(fn.base_dist, torch.distributions.Normal)
    )
