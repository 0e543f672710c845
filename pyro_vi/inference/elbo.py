"""Pyro's ELBOs, which keep the terms of the last evaluation, with corrections.

`with_terms(loss)` returns the same bound as an `ElboTerms`. After an evaluation it has the
reconstruction (the expected log-likelihood of the observed sites), the KL, and the term of every
site, so that an error message can name the site of a NaN. The KL is the sum of its own terms: the
difference of reconstruction and ELBO would lose it to rounding if the reconstruction is large.
Both are without the weights of `TermWeights`.

The mathematics are Pyro's. These cases are corrected:

- `TraceMeanField_ELBO`: torch has no KL between a normal with a full or low-rank covariance and an
  independent normal, so Pyro samples it; here it is exact (`pyro_vi.divergences`). Pyro's KL of a
  Delta omits its log density, which is wrong under autoguides; here such a site is evaluated at
  the sample, which is exact. Pyro reads the mask and the scale of the guide's site alone; if they
  differ from the model's, the site is evaluated at the sample. If the model draws a latent given
  another, and the guide draws it before that other, the bound is biased: Pyro warns, and here it
  is an error.
- All three ELBOs: observed sites of a guide are not part of log q. Those that the model has too,
  because the guide runs the model, are left out; others are an error.
- `RenyiELBO`: scaled sites and orders below 0 give no bound, and are an error.
"""

from __future__ import annotations

__all__ = ["ElboTerms", "with_terms"]

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import check_fully_reparametrized
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi.divergences import closed_form_kl
from pyro_vi.programs import drop_observed_sites, is_subsampled_term
from pyro_vi.weighting import check_sides, unweighted


class ElboTerms(ELBO):
    """A mixin over one of Pyro's ELBOs that keeps the terms of the last evaluation."""

    _given: ELBO
    _terms: dict[str, Tensor]
    _closed: dict[str, Tensor]  # KLs in closed form, by latent site
    _observed: set[str]

    def reset(self) -> None:
        """Drops what was kept, and reads the settings again; call it before an evaluation."""
        self.__dict__.update(vars(self._given))
        self._terms, self._closed, self._observed = {}, {}, set()

    def _guess_max_plate_nesting(self, *programs: Any) -> None:
        super()._guess_max_plate_nesting(*programs)  # runs them, which draws
        self._given.max_plate_nesting = self.max_plate_nesting

    def _keep(self, model_trace: Trace, guide_trace: Trace) -> None:
        drop_observed_sites(model_trace, guide_trace)
        check_sides(model_trace, guide_trace)
        for trace, whose in ((guide_trace, "guide"), (model_trace, "model")):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and not site_is_subsample(site):
                    key = f"{whose}:{name}"
                    self._add(self._terms, key, _log_prob(site))
                    if site["is_observed"]:
                        self._observed.add(key)

    def _add(self, terms: dict[str, Tensor], key: str, term: Tensor) -> None:
        term = term.detach().double() / self.num_particles
        terms[key] = terms[key] + term if key in terms else term

    def terms(self, loss: Tensor | float) -> tuple[Tensor, Tensor]:
        """Reconstruction and KL, float64 scalars, on the device of what the evaluation returned."""
        device = torch.as_tensor(loss).device
        reconstruction = kl = torch.zeros((), dtype=torch.float64, device=device)
        for key, term in self._terms.items():
            whose, _, name = key.partition(":")
            if whose == "model" and key in self._observed:
                reconstruction = reconstruction + term
            elif name not in self._closed:
                kl = kl + term if whose == "guide" else kl - term
        return reconstruction, sum(self._closed.values(), kl)

    def reconstruction(self) -> float:
        """E_q of the observed sites' log-likelihood, scaled as the bound was, but unweighted."""
        return float(self.terms(0.0)[0])

    def kl(self) -> float:
        """E_q[log q - log p] of all other sites, likewise; in closed form where the bound is."""
        return float(self.terms(0.0)[1])

    def first_nonfinite(self) -> str | None:
        """The first site, guide before model, whose log probability is not finite."""
        for key, term in self._terms.items():
            if not bool(torch.isfinite(term)):
                whose, _, name = key.partition(":")
                return f"site {name!r} of the {whose} (log probability {float(term)})"
        return None


class _Trace(ElboTerms, Trace_ELBO):
    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        self._keep(model_trace, guide_trace)
        return model_trace, guide_trace


class _MeanField(ElboTerms, TraceMeanField_ELBO):
    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        # Trace_ELBO's: TraceMeanField_ELBO's own only adds the warning that is an error here.
        model_trace, guide_trace = Trace_ELBO._get_trace(self, model, guide, args, kwargs)
        self._keep(model_trace, guide_trace)
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name in model_trace.nodes:
                check_fully_reparametrized(site)  # before its distribution may be replaced
                other = model_trace.nodes[name]
                alike = _same(site["scale"], other["scale"]) and _same(site["mask"], other["mask"])
                kl = closed_form_kl(site["fn"], other["fn"]) if alike else None
                if kl is None:
                    site["fn"] = _NoClosedForm()
                else:
                    self._add(self._closed, name, _total(kl, site))
                    site["fn"] = other["fn"] = _WithKnownKL(kl, site["fn"].batch_shape)
        _check_order(model_trace, guide_trace)
        return model_trace, guide_trace


class _ImportanceWeighted(ElboTerms, RenyiELBO):
    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for trace in (model_trace, guide_trace):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and is_subsampled_term(site):
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


def with_terms(loss: ELBO) -> ELBO:
    """The same bound as an object that keeps its terms apart; other ELBOs come back as they are.

    Raises:
        ValueError: a RenyiELBO of an order below 0, which is no lower bound.

    Example:
        >>> from pyro.infer import TraceMeanField_ELBO
        >>> isinstance(with_terms(TraceMeanField_ELBO(num_particles=3)), TraceMeanField_ELBO)
        True
    """
    kinds: dict[type, type[ElboTerms]] = {
        Trace_ELBO: _Trace,
        TraceMeanField_ELBO: _MeanField,
        RenyiELBO: _ImportanceWeighted,
    }
    kind = kinds.get(type(loss))
    if kind is None:
        return loss
    if isinstance(loss, RenyiELBO) and loss.alpha < 0:
        raise ValueError(f"RenyiELBO of order alpha = {loss.alpha} < 0 is no lower bound")
    ours: ElboTerms = kind.__new__(kind)
    ours._given = loss
    ours.reset()  # and has the same settings
    return ours


def _check_order(model_trace: Trace, guide_trace: Trace) -> None:
    """Raises ValueError where a KL in closed form is wrong.

    KL(q(z) || p(z | y)) is averaged over the y of one draw, so that y must not depend on z in the
    guide: what the model samples before z, the guide must sample before z too.
    """
    model = [n for n, s in model_trace.nodes.items() if s["type"] == "sample"]
    guide = [n for n, s in guide_trace.nodes.items() if s["type"] == "sample" and n in model]
    model = [name for name in model if name in guide]
    for i, name in enumerate(model):
        analytic = not isinstance(guide_trace.nodes[name]["fn"], _NoClosedForm)
        if analytic and not set(model[:i]) <= set(guide[: guide.index(name)]):
            raise ValueError(
                "TraceMeanField_ELBO needs the latent sites in the same order in model and guide,"
                f" but the model samples {model} and the guide {guide}: reorder the guide,"
                " or use Trace_ELBO, which needs no order"
            )


class _NoClosedForm:
    """Stands for a distribution whose KL must not be looked up, since there is none for it."""

    has_rsample = True


class _WithKnownKL(torch.distributions.Distribution):
    """Stands for two distributions whose KL is known, so that it is computed once."""

    has_rsample = True

    def __init__(self, kl: Tensor, batch_shape: torch.Size) -> None:
        super().__init__(batch_shape, validate_args=False)
        self.kl = kl


@torch.distributions.register_kl(
    _WithKnownKL, _WithKnownKL
)  # types that no one else's distributions have
def _known_kl(q: _WithKnownKL, p: _WithKnownKL) -> Tensor:
    return q.kl


def _log_prob(site: Any) -> Tensor:
    """A site's log probability, summed."""
    if unweighted(site) is site["scale"]:
        return site["log_prob_sum"]
    return _total(site["unscaled_log_prob"], site)


def _total(term: Tensor, site: Any) -> Tensor:
    """The sum of a term of a site, scaled and masked, but unweighted."""
    return scale_and_mask(term.detach(), unweighted(site), site["mask"]).sum()


def _same(a: Any, b: Any) -> bool:
    """Whether two scales or masks are one: None masks nothing."""
    if a is b:
        return True
    if isinstance(a, float) and isinstance(b, float):
        return a == b
    a, b = (torch.as_tensor(True if x is None else x) for x in (a, b))
    return bool((a == b).all())


def _is_one(scale: Any) -> bool:
    return bool((torch.as_tensor(scale) == 1).all())
