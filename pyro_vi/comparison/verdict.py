"""A comparison in plain words: which family to trust, how far, and what to beware of."""

from __future__ import annotations

__all__ = ["summarize", "warnings", "words"]

import math
from dataclasses import replace

import numpy as np

from pyro_vi import diagnostics
from pyro_vi.comparison.columns import columns
from pyro_vi.comparison.labels import shown
from pyro_vi.comparison.marginals import scalar_name
from pyro_vi.comparison.result import Comparison
from pyro_vi.comparison.rows import Row
from pyro_vi.comparison.table import short

_TRUSTED = 0.1  # share of data points whose k-hat may exceed its bound
_ADVICE = "Try more steps, a richer family, or another parametrisation of the model."


def summarize(result: Comparison) -> Comparison:
    """The same comparison with its verdict, warnings and table."""
    return replace(
        result, verdict=words(result), warnings=warnings(result), columns=columns(result)
    )


def words(result: Comparison) -> str:
    """Which family to trust, and how far."""
    ranked = sorted(
        (row for row in result.rows if not math.isnan(row.elbo)), key=lambda row: -row.elbo
    )
    if not ranked:
        return "No family here has a bound: all hold their latents at a point."
    words = [f"{_lead(result, ranked)}."]
    if result.is_joint:
        return " ".join([*words, _joint(result, ranked)])
    drawn = [row for row in ranked if row.family not in result.step_bounds]
    if ranked[0] not in drawn:
        words.append(
            f"A bound is all that {shown(ranked[0].family)} has: no k-hat judges a diffusion's"
            " draws."
        )
    if ranked[0] not in drawn and len(drawn) > 1:
        words.append(f"Of those that have draws {shown(drawn[0].family)} has the highest bound.")
    return " ".join([*words, *([_by_point(result, drawn)] if drawn else [])])


def warnings(result: Comparison) -> tuple[str, ...]:
    """Warnings: failures, collapsed posteriors, restarts that disagree, no evidence."""
    unfinished = tuple(f"{shown(row.family)} {row.status}" for row in result.rows if row.status)
    collapsed = tuple(
        f"{shown(row.family)}: {row.active_units} of {row.latent_units} latent units are active;"
        " the others equal the prior (posterior collapse)"
        for row in result.rows
        if row.active_units is not None
        and row.latent_units is not None
        and row.active_units < row.latent_units / 2
    )
    apart = tuple(
        f"{shown(row.family)}: R-hat across restarts is {row.rhat:.2f}; they ended at different"
        " posteriors"
        for row in result.rows
        if row.rhat > diagnostics.RHAT_THRESHOLD
    )
    bound = diagnostics.khat_threshold(result.num_samples)
    khats = [row.khat_median for row in result.rows if not math.isnan(row.khat_median)]
    loose = (
        (f"no k-hat is below {bound:.2f}: the evidence, and every gap to it, may be far off",)
        if result.is_joint and khats and min(khats) > bound
        else ()
    )
    return unfinished + collapsed + apart + loose


def _lead(result: Comparison, ranked: list[Row]) -> str:
    best = ranked[0]
    what = "test ELBO" if result.on_test else "ELBO"
    if len(ranked) == 1:
        return f"{shown(best.family)}: {what} {best.elbo:.2f} nats"
    second = ranked[1]
    if result.is_joint or len(result.elbos[best.family]) < 2:
        lead, error = best.elbo - second.elbo, math.hypot(best.elbo_se, second.elbo_se)
    else:
        elbos = result.elbos
        paired = diagnostics.paired_difference(elbos[best.family], elbos[second.family])
        lead, error = float(paired.value), float(paired.se)
    by = f"{lead:.2f} ± {short(error)} nats"
    if lead > 2 * error:
        return f"{shown(best.family)} has the highest {what}, {by} above {shown(second.family)}"
    return f"{shown(best.family)} and {shown(second.family)} share the highest {what} ({by} apart)"


def _joint(result: Comparison, ranked: list[Row]) -> str:
    best = ranked[0]
    bound = diagnostics.khat_threshold(result.num_samples)
    if best.khat_median <= bound:
        trust = f"{_trust(result, best, bound)}{_held_against(result, best)}"
        return f"Trust {shown(best.family)}: {trust}"
    words = (
        f"Bounds can be compared, but the draws of {shown(best.family)} are not the posterior's:"
        f" its k-hat is {best.khat_median:.2f}, above {bound:.2f}."
    )
    safest = min(ranked, key=lambda row: row.khat_median)
    if safest.khat_median <= bound:
        return (
            f"{words} {shown(safest.family)} can be trusted, at {best.elbo - safest.elbo:.2f} nats"
            f" less: {_trust(result, safest, bound)}{_held_against(result, safest)}"
        )
    if len(ranked) == 1:
        return f"{words} {_ADVICE}"
    return f"{words} No family here is the posterior. {_ADVICE}"


def _trust(result: Comparison, row: Row, bound: float) -> str:
    if row.khat_median == -math.inf:
        return "its weights are constant, as those of the posterior itself."
    return (
        f"its k-hat of {row.khat_median:.2f} is below {bound:.2f}, so that importance weights can"
        f" correct its draws, of which {row.ess:,.0f} in {result.num_samples:,} count."
    )


def _held_against(result: Comparison, row: Row) -> str:
    """What the reference says of a family's draws, as they are."""
    errors = result.marginals.get(row.family, {})
    if not errors:
        return ""
    site, index = max(
        ((name, i) for name, e in errors.items() for i in np.ndindex(e.wasserstein.shape)),
        key=lambda one: errors[one[0]].wasserstein[one[1]],
    )
    worst = errors[site]
    return (
        f" As they are, they are furthest from the reference in {shown(scalar_name(site, index))}:"
        f" mean {float(worst.mean[index]):+.2f} reference sd, sd {float(worst.sd[index]):+.0%}."
    )


def _by_point(result: Comparison, ranked: list[Row]) -> str:
    best = ranked[0]
    bound = diagnostics.khat_threshold(result.num_samples)
    data = "test data" if result.on_test else "data"
    if all(row.active_units == 0 for row in ranked):
        return (
            "No latent unit of any family is active: the latents say nothing of the data, so that"
            f" there is no posterior to trust. {_ADVICE}"
        )
    if best.khat_bad <= _TRUSTED:
        return (
            f"Trust {shown(best.family)}: its k-hat is at most {bound:.2f} for"
            f" {1 - best.khat_bad:.0%} of the {data}."
        )
    words = (
        f"Bounds can be compared, but the draws of {shown(best.family)} are not the posterior's:"
        f" k-hat is above {bound:.2f} for {best.khat_bad:.0%} of the {data}."
    )
    safest = min(ranked, key=lambda row: row.khat_bad)
    if len(ranked) == 1 or safest.khat_bad == 1:
        return words
    if safest.khat_bad <= _TRUSTED:
        return (
            f"{words} The draws of {shown(safest.family)} can be taken as they are (k-hat at most"
            f" {bound:.2f} for {1 - safest.khat_bad:.0%}), at"
            f" {best.elbo - safest.elbo:.2f} nats less."
        )
    return (
        f"{words} No family here is the posterior for all data; {shown(safest.family)} comes"
        f" closest ({1 - safest.khat_bad:.0%})."
    )
