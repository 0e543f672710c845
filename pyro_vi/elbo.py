"""Pyro's bounds, told apart and made right where Pyro is silent.

`told(loss)` gives the same bound as an object of ours that also keeps, for the last evaluation,
the reconstruction (the observed sites' expected log-likelihood), the KL (reconstruction minus
ELBO), and every site's term, so that a NaN can be named. The mathematics stay Pyro's; changed is

- TraceMeanField_ELBO: torch has no KL between a full or low-rank normal and an independent one,
  and would sample it: independent normals are handed to torch as what they are too, multivariate
  normals with a diagonal factor. Pyro's KL for Delta drops its log density and so is wrong under
  autoguides: such sites are evaluated at the sample instead, which is exact; so are sites whose
  mask or scale differ between model and guide, of which Pyro reads the guide's alone. A latent that
  the guide draws before one on which the model lets it depend is an error, where Pyro warns and is
  biased.
- RenyiELBO: scaled sites, and orders below 0, are refused, since they give no bound.
"""

from __future__ import annotations

__all__ = ["Told", "assumptions", "kl_rows", "told"]

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import check_fully_reparametrized
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi.sites import draws_terms, is_delta, is_deterministic


class Told(ELBO):
    """A mixin over one of Pyro's ELBOs that keeps the terms of the last evaluation."""

    _given: ELBO
    _terms: dict[str, Tensor]
    _observed: set[str]

    def forget(self) -> None:
        """Drops what was kept, and reads the settings again; call it before an evaluation."""
        self.__dict__.update(vars(self._given))
        self._terms, self._observed = {}, set()

    def _guess_max_plate_nesting(self, *programs: Any) -> None:
        super()._guess_max_plate_nesting(*programs)  # runs them, which draws
        self._given.max_plate_nesting = self.max_plate_nesting

    def _keep(self, model_trace: Trace, guide_trace: Trace) -> None:
        for trace, whose in ((guide_trace, "guide"), (model_trace, "model")):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and not site_is_subsample(site):
                    key = f"{whose}:{name}"
                    term = site["log_prob_sum"].detach() / self.num_particles
                    self._terms[key] = self._terms[key] + term if key in self._terms else term
                    if site["is_observed"]:
                        self._observed.add(key)
                        _assume_in_support(site)

    def terms(self, loss: Tensor | float) -> tuple[Tensor, Tensor]:
        """Reconstruction and KL, scalars, where `loss` is what the evaluation returned."""
        found = [self._terms[key] for key in self._observed if key.startswith("model:")]
        reconstruction = torch.as_tensor(sum(found))
        return reconstruction, self._kl(reconstruction, loss)

    def _kl(self, reconstruction: Tensor, loss: Tensor | float) -> Tensor:
        return reconstruction + loss

    def reconstruction(self) -> float:
        """E_q of the observed sites' log-likelihood, scaled as the bound was."""
        return float(self.terms(0.0)[0])

    def kl(self, loss: float) -> float:
        """Reconstruction minus ELBO, where `loss` is what the evaluation returned."""
        return float(self._kl(torch.tensor(self.reconstruction(), dtype=torch.float64), loss))

    def first_nonfinite(self) -> str | None:
        """The first site, guide before model, whose log probability is not finite."""
        for key, term in self._terms.items():
            if not bool(torch.isfinite(term)):
                whose, _, name = key.partition(":")
                return f"site {name!r} of the {whose} (log probability {float(term)})"
        return None


class _Trace(Told, Trace_ELBO):
    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        self._keep(model_trace, guide_trace)
        return model_trace, guide_trace


class _MeanField(Told, TraceMeanField_ELBO):
    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        # Trace_ELBO's: TraceMeanField_ELBO's own only adds the warning that is an error here.
        model_trace, guide_trace = Trace_ELBO._get_trace(self, model, guide, args, kwargs)
        self._keep(model_trace, guide_trace)
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name in model_trace.nodes:
                check_fully_reparametrized(site)  # before its distribution may be replaced
                other = model_trace.nodes[name]
                if _same(site["scale"], other["scale"]) and _same(site["mask"], other["mask"]):
                    site["fn"], other["fn"] = _with_kl(site["fn"], other["fn"])
                else:
                    site["fn"] = _Sampled()
        _check_order(model_trace, guide_trace)
        return model_trace, guide_trace


class _ImportanceWeighted(Told, RenyiELBO):
    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for trace in (model_trace, guide_trace):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and draws_terms(site):
                    raise ValueError(
                        f"site {name!r} draws some of the program's terms: an importance-weighted"
                        " bound of some bounds nothing; use Trace_ELBO, or all of them (DDPMChain)"
                    )
                if site["type"] == "sample" and not _is_one(site["scale"]):
                    raise ValueError(
                        f"site {name!r} is scaled by {float(torch.as_tensor(site['scale'])):g}, and"
                        " an importance-weighted bound of scaled sites bounds nothing: use"
                        " Trace_ELBO, or leave the scale out"
                    )
        self._keep(model_trace, guide_trace)
        return model_trace, guide_trace

    def _kl(self, reconstruction: Tensor, loss: Tensor | float) -> Tensor:
        """E_q[log q - log p] of the latent sites: the bound is not reconstruction minus KL."""
        model = sum(t for key, t in self._terms.items() if key.startswith("model:"))
        guide = sum(t for key, t in self._terms.items() if key.startswith("guide:"))
        return reconstruction - (model - guide)


def told(loss: ELBO) -> ELBO:
    """The same bound as an object that keeps its terms apart; other ELBOs come back as they are.

    Raises:
        ValueError: a RenyiELBO of an order below 0, which is no lower bound.

    Example:
        >>> from pyro.infer import TraceMeanField_ELBO
        >>> isinstance(told(TraceMeanField_ELBO(num_particles=3)), TraceMeanField_ELBO)
        True
    """
    kinds: dict[type, type[Told]] = {
        Trace_ELBO: _Trace,
        TraceMeanField_ELBO: _MeanField,
        RenyiELBO: _ImportanceWeighted,
    }
    kind = kinds.get(type(loss))
    if kind is None:
        return loss
    if isinstance(loss, RenyiELBO) and loss.alpha < 0:
        raise ValueError(f"RenyiELBO of order alpha = {loss.alpha} < 0 is no lower bound")
    ours: Told = kind.__new__(kind)
    ours._given = loss
    ours.forget()  # and has the same settings
    return ours


def kl_rows(q: Any, p: Any, value: Tensor) -> Tensor:
    """KL(q || p) of each element of the batch shape, or log q - log p at a value if it has none.

    As `told(TraceMeanField_ELBO())` evaluates a site: in closed form for normals of any covariance.

    Args:
        q, p: two distributions of one shape.
        value: a draw from q.
    """
    mine, theirs = _with_kl(q, p)
    if not isinstance(mine, _Sampled):
        try:
            return torch.distributions.kl_divergence(mine, theirs)
        except NotImplementedError:
            pass
    return q.log_prob(value) - p.log_prob(value)


def _check_order(model_trace: Trace, guide_trace: Trace) -> None:
    """Raises ValueError where a KL in closed form is wrong.

    KL(q(z) || p(z | y)) is averaged over the y of one draw, so that y must not depend on z in the
    guide: what the model samples before z, the guide must sample before z too.
    """
    model = [n for n, s in model_trace.nodes.items() if s["type"] == "sample"]
    guide = [n for n, s in guide_trace.nodes.items() if s["type"] == "sample" and n in model]
    model = [name for name in model if name in guide]
    for i, name in enumerate(model):
        analytic = not isinstance(guide_trace.nodes[name]["fn"], _Sampled)
        if analytic and not set(model[:i]) <= set(guide[: guide.index(name)]):
            raise ValueError(
                "TraceMeanField_ELBO needs the latent sites in the same order in model and guide,"
                f" but the model samples {model} and the guide {guide}: reorder the guide,"
                " or use Trace_ELBO, which needs no order"
            )


class _Sampled:
    """Stands for a distribution whose KL must not be looked up, since there is none for it."""

    has_rsample = True


def _with_kl(q: Any, p: Any) -> tuple[Any, Any]:
    """The pair itself, or the same pair as types for which torch's KL exists and is right."""
    if is_delta(q):
        return _Sampled(), p
    joint = (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)
    if isinstance(q, joint) and (diagonal := _diagonal_normal(p)) is not None:
        return q, diagonal
    if isinstance(p, joint) and (diagonal := _diagonal_normal(q)) is not None:
        return diagonal, p
    return q, p


def _diagonal_normal(fn: Any) -> Any | None:
    """Independent(Normal, 1) as a MultivariateNormal, None for anything else."""
    if not (
        isinstance(fn, torch.distributions.Independent)
        and fn.reinterpreted_batch_ndims == 1
        and isinstance(fn.base_dist, torch.distributions.Normal)
    ):
        return None
    return dist.MultivariateNormal(
        fn.base_dist.loc, scale_tril=torch.diag_embed(fn.base_dist.scale)
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two scales or masks are one: None masks nothing."""
    if a is b:
        return True
    if isinstance(a, float) and isinstance(b, float):
        return a == b
    a, b = (torch.as_tensor(True if x is None else x) for x in (a, b))
    return _holds((a == b).all())


def _is_one(scale: Any) -> bool:
    return _holds((torch.as_tensor(scale) == 1).all())


class _Assumptions(list[Tensor]):
    """Conditions; `validate` says whether those of distributions belong to them."""

    validate = False


_assumed: ContextVar[_Assumptions | None] = ContextVar("assumed", default=None)


@contextmanager
def assumptions(*, validate: bool) -> Iterator[list[Tensor]]:
    """Collects the conditions that an evaluation depends on, and takes all of them to hold.

    So that it can be recorded from tensors without values; the record checks them at every replay.

    Args:
        validate: whether observations are assumed to be in their distributions' support.
    """
    found = _Assumptions()
    found.validate = validate
    token = _assumed.set(found)
    try:
        yield found
    finally:
        _assumed.reset(token)


def _holds(condition: Tensor) -> bool:
    assumed = _assumed.get()
    if assumed is None:
        return bool(condition)
    assumed.append(condition)
    return True


def _assume_in_support(site: Any) -> None:
    assumed = _assumed.get()
    if assumed is not None and assumed.validate and not is_deterministic(site):
        try:
            assumed.append(site["fn"].support.check(site["value"]))
        except (AttributeError, NotImplementedError):  # it has none, or no check
            return
