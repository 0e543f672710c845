"""The printed table and the verdict: what the numbers support, and nothing where there are none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from example_programs import STRANGE_NAMES, global_and_local, normal_mean, normal_mean_guide
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_vi import Comparison, compare, diagnostics
from pyro_vi.comparison import MarginalErrors, PerPoint, Row, format_table, short, shown, summarize

torch.set_num_threads(1)

NUM = 1_000
BOUND = diagnostics.khat_threshold(NUM)


class OfAll:
    """Stands in for a posterior: all that is asked of it is whether its weights are joint."""

    def __init__(self, is_joint: bool) -> None:
        self.is_joint = is_joint


def bounded(family: str, elbo: float, khat: float, **other: Any) -> Row:
    values: dict[str, Any] = {
        "elbo_se": 0.01,
        "elbo_difference": 0.0,
        "khat_median": khat,
        "khat_bad": float(khat > BOUND),
        "ess": 500.0,
        "parameters": 10,
        "seconds_per_step": 0.001,
    }
    return Row(family, elbo=elbo, **{**values, **other})


def result(*rows: Row, joint: bool = True, on_test: bool = False, **other: Any) -> Comparison:
    points = {
        row.family: PerPoint(
            elbo=row.elbo + np.linspace(-1, 1, 1 if joint else 50),
            evidence=np.zeros(1 if joint else 50),
            khat=np.zeros(1 if joint else 50),
            ess=np.zeros(1 if joint else 50),
        )
        for row in rows
        if not math.isnan(row.elbo)
    }
    values: dict[str, Any] = {
        "fits": {},
        "posteriors": {row.family: OfAll(joint) for row in rows},
        "step_bounds": {},
        "points": points,
        "data": torch.zeros(50),
        "on_test": on_test,
        "num_samples": NUM,
        "shared": True,
        "reference": {},
        "marginals": {},
    }
    return summarize(Comparison(rows=tuple(rows), **{**values, **other}))


def lines(found: Comparison) -> list[str]:
    return format_table([row.family for row in found.all_rows], found.columns)


def table(found: Comparison) -> dict[str, list[str]]:
    """Cells by label."""
    header, *rest = lines(found)
    cells = {}
    for line, column in zip(rest, found.columns, strict=True):
        label = "  " * column.indent + column.label
        cells[label] = list(column.cells[: len(found.rows)])
        assert line.startswith(label)
    assert all(row.family in header for row in found.rows)
    return cells


# The table


def test_joint_bounds_are_of_all_data_and_have_one_k_hat() -> None:
    found = result(bounded("a", -10.0, 0.2), bounded("b", -9.0, 0.9, elbo_difference=1.0))
    cells = table(found)
    assert cells["ELBO (nats)"] == ["-10.00 ± 0.01", "-9.00 ± 0.01"]
    assert cells["  minus a's"] == ["", "+1.00"]
    assert cells[f"k-hat (trusted to {BOUND:.2f})"] == ["0.20", "0.90"]
    assert not any(label.startswith("k-hat above") for label in cells)
    meanings = {column.name: column.meaning for column in found.columns}
    assert "of all data together" in meanings["elbo"]
    assert "over data points" not in meanings["elbo_difference"]


def test_bounds_of_data_points_are_means_with_shares() -> None:
    found = result(
        bounded("a", -10.0, 0.2), bounded("b", -9.0, 0.9, khat_bad=0.25), joint=False, on_test=True
    )
    cells = table(found)
    assert cells["k-hat, median"] == ["0.20", "0.90"]
    assert cells[f"k-hat above {BOUND:.2f}"] == ["0%", "25%"]
    meanings = {column.name: column.meaning for column in found.columns}
    assert "test ELBO (nats)" in cells and "mean over the test data" in meanings["elbo"]


def test_quantities_that_no_row_has_are_left_out() -> None:
    found = result(bounded("a", -10.0, 0.2), bounded("b", -9.0, 0.9))
    assert [column.name for column in found.columns] == [
        "elbo",
        "elbo_difference",
        "khat_median",
        "ess",
        "parameters",
        "seconds_per_step",
    ]
    one = result(bounded("a", -10.0, 0.2, rhat=1.001, gap=0.5, gap_se=0.001))
    names = [column.name for column in one.columns]
    assert "rhat" in names and "gap" in names and "elbo_difference" not in names
    assert table(one)["gap: best evidence - ELBO"] == ["0.50 ± 0.001"]
    assert table(one)["R-hat across restarts"] == ["1.001"]


def test_a_table_has_a_line_for_each_quantity_whatever_the_names() -> None:
    for name in STRANGE_NAMES:
        found = result(bounded(name, -1.0, 0.1), bounded("flow", -2.0, 0.9))
        table = lines(found)
        assert len(table) == 1 + len(found.columns) and all(map(str.isprintable, table))
        assert max(map(len, table)) < 200
        assert str(found).encode().decode() == str(found)
        lead = found.verdict.split(" has the highest ELBO")[0]
        assert lead == shown(name) and f"  minus {lead}'s" in table[2]
    assert shown("long " * 60) == ("long " * 12)[:59] + "… long long long long"


def test_a_point_estimate_has_blanks() -> None:
    point = Row("point", parameters=3, seconds_per_step=0.002)
    found = result(bounded("a", -10.0, 0.2), point)
    cells = table(found)
    assert cells["ELBO (nats)"] == ["-10.00 ± 0.01", ""]
    assert cells["parameters"] == ["10", "3"] and cells["ms per step"] == ["1.0", "2.0"]
    assert found.best.family == "a" and "Trust a" in found.verdict
    alone = result(point)
    assert [column.name for column in alone.columns] == ["parameters", "seconds_per_step"]
    assert alone.verdict == "No family here has a bound: all hold their latents at a point."
    with pytest.raises(ValueError, match="no family here has a bound"):
        _ = alone.best


def test_the_reference_is_the_last_column() -> None:
    rows = (
        bounded("a", -10.0, 0.2, mean_error=-0.5, sd_error=-0.31, wasserstein=0.52),
        bounded("b", -9.0, 0.3, mean_error=0.01, sd_error=0.02, wasserstein=0.03),
    )
    noise = Row("reference", mean_error=0.02, sd_error=0.01, wasserstein=0.02)
    found = result(*rows, noise=noise)
    printed = lines(found)
    assert printed[0].split() == ["a", "b", "reference"]
    shown = {line.split("  ")[0]: line for line in printed}
    assert shown["mean error (reference sd)"].split()[-3:] == ["-0.50", "+0.01", "+0.02"]
    assert shown["sd error"].split()[-3:] == ["-31%", "+2%", "+1%"]
    assert shown["Wasserstein-1 (reference sd)"].split()[-3:] == ["0.52", "0.03", "0.02"]
    assert shown["ELBO (nats)"].endswith("-9.00 ± 0.01")  # the reference has none
    assert "reference" not in lines(result(*rows))[0]
    assert len({len(line) for line in printed if line.endswith("%")}) == 1  # aligned


@pytest.mark.parametrize(
    ("error", "shown"), [(0.0, "0.00"), (0.5, "0.50"), (0.01, "0.01"), (0.0012, "0.001")]
)
def test_small_errors_keep_a_digit(error: float, shown: str) -> None:
    assert short(error) == shown


# The verdict


def test_the_best_family_is_trusted_below_the_bound() -> None:
    found = result(bounded("a", -10.0, 0.2), bounded("b", -9.0, 0.4))
    assert found.verdict == (
        "b has the highest ELBO, 1.00 ± 0.01 nats above a. Trust b: its k-hat of 0.40 is below"
        f" {BOUND:.2f}, so that importance weights can correct its draws, of which 500 in 1,000"
        " count."
    )


def test_a_safer_family_is_named_with_its_price() -> None:
    found = result(bounded("a", -10.0, 0.2), bounded("b", -9.0, 0.9)).verdict
    assert "the draws of b are not the posterior's: its k-hat is 0.90, above" in found
    assert "a can be trusted, at 1.00 nats less: its k-hat of 0.20 is below" in found


def test_the_verdict_names_the_marginal_that_is_furthest_from_the_reference() -> None:
    errors = {
        "mu": MarginalErrors(np.array(0.1), np.array(0.02), np.array(0.1)),
        "theta": MarginalErrors(
            np.array([0.0, -0.5]), np.array([0.0, -0.31]), np.array([0.0, 0.52])
        ),
    }
    found = result(bounded("a", -10.0, 0.2), marginals={"a": errors}).verdict
    assert found.endswith("reference in theta[1]: mean -0.50 reference sd, sd -31%.")


def test_evidence_without_a_k_hat_to_believe_is_warned_of() -> None:
    found = result(bounded("a", -10.0, 0.8), bounded("b", -9.0, 0.9))
    (warning,) = found.warnings
    assert warning.startswith(f"no k-hat is below {BOUND:.2f}: the evidence")
    assert result(bounded("a", -10.0, 0.2), bounded("b", -9.0, 0.9)).warnings == ()


def test_none_is_trusted_where_none_can_be() -> None:
    several = result(bounded("a", -10.0, 0.8), bounded("b", -9.0, 0.9)).verdict
    assert "No family here is the posterior. Try more steps, a richer family" in several
    one = result(bounded("a", -10.0, 0.8)).verdict
    assert one.startswith("a: ELBO -10.00 nats. Bounds can be compared")
    assert one.endswith("a richer family, or another parametrisation of the model.")
    assert "Trust" not in several + one


def test_a_lead_within_its_error_is_shared() -> None:
    rows = bounded("a", -10.0, 0.2, elbo_se=0.3), bounded("b", -9.5, 0.2, elbo_se=0.3)
    assert result(*rows).verdict.startswith("b and a share the highest ELBO (0.50 ± 0.42 nats")


def test_single_data_points_are_counted() -> None:
    good, bad = bounded("a", -10.0, 0.2), bounded("b", -9.0, 0.9, khat_bad=0.4)
    found = result(good, bad, joint=False, on_test=True).verdict
    assert found.startswith("b has the highest test ELBO")
    assert f"k-hat is above {BOUND:.2f} for 40% of the test data" in found
    assert "The draws of a can be taken as they are" in found and "at 1.00 nats less" in found
    poor = bounded("a", -10.0, 0.8, khat_bad=0.2)
    none = result(poor, bad, joint=False).verdict
    assert none.endswith("No family here is the posterior for all data; a comes closest (80%).")


def test_what_is_warned_of() -> None:
    fine = bounded("a", -10.0, 0.2, rhat=1.01, active_units=3, latent_units=4)
    apart = bounded("b", -9.0, 0.2, rhat=1.3)
    collapsed = bounded("c", -9.0, 0.2, active_units=1, latent_units=8)
    assert result(fine).warnings == ()
    found = result(fine, apart, collapsed)
    assert found.warnings == (
        "c: 1 of 8 latent units are active; the others equal the prior (posterior collapse)",
        "b: R-hat across restarts is 1.30; they ended at different posteriors",
    )
    printed = str(found).splitlines()
    assert printed[-2:] == [f"Warning: {warning}." for warning in found.warnings]


# compare() end to end


@pytest.mark.filterwarnings("ignore:the restarts disagree")
def test_a_comparison_of_joint_posteriors_with_a_point_estimate() -> None:
    x = torch.tensor([0.3, -1.2, 0.8, 2.0])
    guides = {"normal": AutoNormal(global_and_local), "point": AutoDelta(global_and_local)}
    found = compare(
        global_and_local, guides, x, steps=2, restarts=2, num_samples=50, progress=False
    )
    normal, point = found.rows
    assert found.is_joint and found.shared and list(found.points) == ["normal"]
    assert not math.isnan(normal.elbo) and math.isnan(point.elbo) and math.isnan(point.rhat)
    assert normal.rhat > 0 and point.parameters == 5
    cells = table(found)
    assert cells["ELBO (nats)"][1] == cells["R-hat across restarts"][1] == ""


def test_a_reference_judges_the_marginals() -> None:
    x = torch.tensor([0.3, -1.2, 0.8, 2.0])
    precision = 0.25 + len(x)
    exact = dist.Normal(float(x.sum()) / precision, precision**-0.5).sample((4_000,))
    found = compare(
        normal_mean,
        {"fixed": normal_mean_guide},
        x,
        steps=1,
        num_samples=4_000,
        reference={"mean": exact},
        progress=False,
    )
    row = found.rows[0]
    # N(0.3, 0.5) held against N(0.447, 0.485), in the latter's standard deviations
    assert row.mean_error == pytest.approx((0.3 - 1.9 / precision) / precision**-0.5, abs=0.1)
    assert row.sd_error == pytest.approx(0.5 / precision**-0.5 - 1, abs=0.05)
    assert found.noise is not None and found.noise.wasserstein < row.wasserstein
    assert lines(found)[0].split() == ["fixed", "reference"]
