"""ArviZ: groups, axes and labels, no copies, files; under either major version."""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import math
import os
import subprocess
import sys
import tracemalloc
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import (
    SCHOOLS_SIGMA,
    SCHOOLS_Y,
    eight_schools_centred,
    global_and_local,
    normal_mean,
    normal_mean_guide,
)
from pyro.infer.autoguide import AutoDelta
from torch import Tensor
from torch.distributions import constraints

from pyro_vi import files, fit
from pyro_vi.models import LinearGaussian
from pyro_vi.posterior import Posterior, Scorer, as_arviz, load, save

matplotlib = pytest.importorskip("matplotlib")
xarray = pytest.importorskip("xarray")
pytest.importorskip("h5netcdf")
matplotlib.use("Agg")
az = pytest.importorskip("arviz")
import matplotlib.pyplot as plt  # noqa: E402

torch.set_num_threads(1)

IS_NEW = int(importlib.metadata.version("arviz").partition(".")[0]) >= 1
SCHOOLS = (SCHOOLS_Y.double(), SCHOOLS_SIGMA.double())
NAMES = (
    "Choate",
    "Deerfield",
    "Andover",
    "Exeter",
    "Hotchkiss",
    "Lawrenceville",
    "Pauls",
    "Hermon",
)
JOINT = [
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "sample_stats",
    "log_likelihood",
    "observed_data",
    "constant_data",
    "fit",
]
# What the ArviZ of the day says about itself, its dependencies and single chains.
arvizs_own_words = pytest.mark.filterwarnings("ignore")


def schools_guide(y: Tensor, sigma: Tensor) -> None:
    pyro.sample("mu", dist.Normal(y.new_tensor(4.4), 3.3))
    pyro.sample("tau", dist.LogNormal(y.new_tensor(1.0), 0.8))
    with pyro.plate("data", len(y)):
        pyro.sample("theta", dist.Normal(0.3 * y + 3.0, 5.0))


def schools(num: int = 200) -> Posterior:
    return Scorer(eight_schools_centred, schools_guide, SCHOOLS).posterior(num)


def mean_posterior(num: int = 900, shift: float = 0.05, widened: float = 1.2) -> Posterior:
    """Of a mean, with well-behaved weights; exact if neither shifted nor widened."""
    x = torch.linspace(-1, 2, 12, dtype=torch.float64)
    precision = 0.25 + 12

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.sum() / precision + shift, widened * precision**-0.5))

    return Scorer(normal_mean, guide, x).posterior(num)


def local_posterior(num: int = 50, total: int = 5, dim: int = 2) -> Posterior:
    weight = torch.randn(4, dim, dtype=torch.float64)
    model = LinearGaussian(weight, torch.zeros(4).double(), 0.8)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(model.posterior(x).mean, 0.7).to_event(1))

    x = torch.randn(total, 4, dtype=torch.float64)
    return Scorer(model, guide, x).posterior(num)


def named(latent: str = "mean", plate: str = "data", second: str | None = None) -> Posterior:
    """A model whose latent site, and plate, are named so."""

    def latents(x: Tensor) -> Tensor:
        if second is not None:
            pyro.sample(second, dist.Normal(x.new_tensor(0.0), 1.0))
        return pyro.sample(latent, dist.Normal(x.new_tensor(0.0), 1.0))

    def model(x: Tensor) -> None:
        mean = latents(x)
        with pyro.plate(plate, len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    return Scorer(model, latents, torch.zeros(6).double(), plate).posterior(30)


def variables(tree: Any) -> dict[str, list[str]]:
    return {group: list(node.data_vars) for group, node in tree.children.items()}


# Groups, axes and labels


def test_groups_and_axes_of_a_joint_posterior() -> None:
    tree = schools().to_datatree()
    assert variables(tree) == {
        "posterior": ["mu", "tau", "theta", "twice"],
        "posterior_predictive": ["y"],
        "prior": ["mu", "tau", "theta", "twice"],
        "prior_predictive": ["y"],
        "sample_stats": ["lp", "log_q", "log_weight"],
        "log_likelihood": ["y"],
        "observed_data": ["y"],
        "constant_data": ["sigma"],
        "fit": ["elbo", "elbo_se", "evidence", "evidence_se", "khat"],
    }
    assert list(tree.children) == JOINT
    assert tree["posterior"]["mu"].dims == ("chain", "draw")
    for group in ("posterior", "prior"):
        for site in ("theta", "twice"):
            assert tree[group][site].dims == ("chain", "draw", "data")
            assert tree[group][site].shape == (1, 200, 8)
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "data")
    assert tree["observed_data"]["y"].dims == ("data",)
    assert tree["constant_data"]["sigma"].dims == ("sigma_dim_0",)
    assert tree["posterior"]["data"].values.tolist() == list(range(8))
    assert tree.attrs["inference_library"] == "pyro_vi"


def test_values_are_the_posteriors() -> None:
    posterior = schools()
    tree = posterior.to_datatree(seed=3)
    stats = tree["sample_stats"]
    for name, values in (
        ("lp", posterior.log_p),
        ("log_q", posterior.log_q),
        ("log_weight", posterior.log_p - posterior.log_q),
    ):
        np.testing.assert_array_equal(stats[name].values[0], values.numpy())
    for name, draws in {**posterior.draws, **posterior.deterministic}.items():
        np.testing.assert_array_equal(tree["posterior"][name].values[0], draws.numpy())
    likelihood = posterior.log_likelihood["y"].numpy()
    np.testing.assert_array_equal(tree["log_likelihood"]["y"].values[0], likelihood)
    predictive = posterior.predictive(seed=3)["y"].numpy()
    np.testing.assert_array_equal(tree["posterior_predictive"]["y"].values[0], predictive)
    latents, observed = posterior.prior(seed=3)
    np.testing.assert_array_equal(tree["prior"]["twice"].values[0], latents["twice"].numpy())
    np.testing.assert_array_equal(tree["prior_predictive"]["y"].values[0], observed["y"].numpy())
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, SCHOOLS_Y.numpy())
    np.testing.assert_array_equal(tree["constant_data"]["sigma"].values, SCHOOLS_SIGMA.numpy())
    assert tree["fit"]["khat"].item() == posterior.khat()
    assert tree["fit"]["elbo_se"].item() == posterior.elbo().se


def test_axes_right_of_the_plates_are_numbered() -> None:
    tree = local_posterior().to_datatree(local=True)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "x_dim_0")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    assert tree["observed_data"]["x"].dims == ("data", "x_dim_0")
    assert tree["sample_stats"]["lp"].dims == ("chain", "draw", "data")
    assert tree["fit"]["khat"].dims == ("data",)


def test_names_and_labels_of_ones_own() -> None:
    tree = schools().to_datatree(
        dims={"theta": ["school"], "y": ["school"], "sigma": ["school"]},
        coords={"school": NAMES, "data": np.arange(8) + 1},
    )
    for group, site in (
        ("posterior", "theta"),
        ("prior", "theta"),
        ("posterior_predictive", "y"),
        ("log_likelihood", "y"),
        ("observed_data", "y"),
        ("constant_data", "sigma"),
    ):
        assert tree[group][site].dims[-1] == "school"
        assert tree[group]["school"].values.tolist() == list(NAMES)
    assert tree["posterior"]["twice"].dims == ("chain", "draw", "data")
    assert tree["posterior"]["data"].values.tolist() == list(range(1, 9))
    exeter = tree["posterior"]["theta"].sel(school="Exeter")
    assert exeter.shape == (1, 200)


def test_a_log_likelihood_takes_the_plates_of_its_sites_axes() -> None:
    tree = local_posterior().to_datatree(local=True, dims={"x": ("person", "item")})
    assert tree["observed_data"]["x"].dims == ("person", "item")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "person")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dims": {"nu": ["school"]}}, r"there are none named \['nu'\]: expected some of \['mu'"),
        ({"dims": {"theta": "school"}}, "site 'theta' has 1 axes, and dims names 'school'"),
        ({"dims": {"theta": []}}, r"site 'theta' has 1 axes, and dims names \[\]"),
        ({"dims": {"theta": ["a", "b"]}}, "site 'theta' has 1 axes"),
        ({"dims": {"theta": ["draw"]}}, "axis of site 'theta' is named 'draw', like a sample axis"),
        ({"dims": {"theta": ["mu"]}}, "site 'mu' in group 'posterior' is named like an axis"),
        ({"coords": {"data": range(7)}}, "axis 'data' has 8 elements, and coords give 7 labels"),
        ({"coords": {"school": NAMES}}, r"coords are for axes.*none named \['school'\].*'data'"),
        ({"seed": -1}, "expected a seed"),
    ],
)
def test_names_and_labels_that_do_not_fit(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        schools(30).to_datatree(**options)


def test_names_that_a_tree_cannot_hold() -> None:
    with pytest.raises(ValueError, match="site 'draw' in group 'posterior' is named like an axis"):
        named("draw").to_datatree()
    with pytest.raises(ValueError, match="is named 'chain', like a sample axis: rename the plate"):
        named(plate="chain").to_datatree()
    with pytest.raises(ValueError, match=r"two sites become 'a\.b': rename one of them"):
        named("a/b", second="a.b").to_datatree()
    tree = named("net/weight", plate="group/data").to_datatree()
    assert list(tree["posterior"].data_vars) == ["net.weight"]
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "group.data")
    assert named("values").to_datatree()["posterior"]["values"].shape == (1, 30)


def test_local_posteriors_are_summaries_unless_all_is_asked_for() -> None:
    posterior = local_posterior()
    summary = ["sample_stats", "log_likelihood", "observed_data", "fit"]
    for local in (None, False):
        assert list(posterior.to_datatree(local=local).children) == summary
    every = posterior.to_datatree(local=True)
    assert list(every.children) == [group for group in JOINT if group != "constant_data"]
    assert every["posterior"]["z"].shape == (1, 50, 5, 2)
    assert every["fit"]["elbo"].shape == (5,)


def test_local_latents_of_a_joint_posterior_can_be_left_out() -> None:
    tree = schools().to_datatree(local=False)
    assert variables(tree)["posterior"] == variables(tree)["prior"] == ["mu", "tau"]
    assert variables(tree)["posterior_predictive"] == ["y"]
    assert list(tree.children) == JOINT


def test_flat_priors_have_no_prior_groups() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.mean(), len(x) ** -0.5))

    tree = Scorer(model, guide, torch.randn(6).double()).posterior(30).to_datatree()
    gone = {"prior", "prior_predictive", "constant_data"}
    assert list(tree.children) == [group for group in JOINT if group not in gone]


def test_points_have_no_weights_and_one_draw_no_bounds() -> None:
    guide = AutoDelta(global_and_local)
    x = torch.randn(4)
    guide(x)
    tree = Scorer(global_and_local, guide, x).posterior(30).to_datatree()
    assert variables(tree)["sample_stats"] == ["lp", "log_q"] and "fit" not in tree.children
    for num, fitted in ((1, []), (2, ["elbo", "elbo_se", "evidence", "evidence_se"])):
        tree = schools(num).to_datatree()
        assert variables(tree).get("fit", []) == fitted
        assert tree["posterior"].sizes["draw"] == num


@pytest.mark.filterwarnings("ignore:the restarts disagree")
def test_chains_are_restarts() -> None:
    x = torch.randn(8)
    fitted = fit(normal_mean, normal_mean_guide, x, steps=3, restarts=2, progress=False)
    posterior = fitted.posterior(x, 40)
    tree = posterior.to_datatree()
    for group in ("posterior", "posterior_predictive", "sample_stats", "log_likelihood"):
        assert tree[group].sizes["chain"] == 2 and tree[group].sizes["draw"] == 40
    for chain, one in enumerate(posterior.restarts):
        np.testing.assert_array_equal(tree["posterior"]["mean"][chain], one.draws["mean"])
        np.testing.assert_array_equal(tree["sample_stats"]["lp"][chain], one.log_p)
    predictive = tree["posterior_predictive"]["x"].values
    assert not np.array_equal(predictive[0], predictive[1])
    assert tree["prior"].sizes["chain"] == 1
    assert tree["fit"]["loss"].dims == ("step",) and tree["fit"].sizes["step"] == 3
    np.testing.assert_array_equal(tree["fit"]["loss"].values, fitted.losses.numpy())
    best = posterior.to_datatree(restarts=False)
    assert best["posterior"].sizes["chain"] == best["log_likelihood"].sizes["chain"] == 1
    np.testing.assert_array_equal(best["posterior"]["mean"][0], posterior.draws["mean"])


@pytest.mark.filterwarnings("ignore:the restarts disagree")
def test_chains_of_different_posteriors_are_warned_of() -> None:
    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("mean", dist.Normal(loc, 0.1))

    still = partial(torch.optim.SGD, lr=1e-9)
    x = torch.randn(8)
    fitted = fit(normal_mean, guide, x, optim=still, steps=2, restarts=3, progress=False)
    posterior = fitted.posterior(x, 100)
    with pytest.warns(UserWarning, match=r"R-hat across restarts is up to .*restarts=False"):
        posterior.to_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.to_datatree(restarts=False)


# Memory


def test_values_are_not_copied() -> None:
    posterior = schools()
    tree = posterior.to_datatree()
    held = {**posterior.draws, **posterior.deterministic}
    groups: list[Any] = [tree.children]
    if not IS_NEW:
        data = as_arviz(tree)
        groups.append({name: data[name] for name in data.groups()})
    for group in groups:
        for name, draws in held.items():
            assert np.shares_memory(group["posterior"][name].values, draws.numpy())
        likelihood = posterior.log_likelihood["y"].numpy()
        assert np.shares_memory(group["log_likelihood"]["y"].values, likelihood)
        assert np.shares_memory(group["sample_stats"]["lp"].values, posterior.log_p.numpy())


def test_a_large_export_makes_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 draws of 50 latents of 10,000 data points: 200 MB, held once."""
    small = local_posterior(num=100, total=2)
    z = torch.zeros(100, 10_000, 50)
    rows = torch.zeros(100, 10_000)
    large = replace(small, draws={"z": z}, log_p=rows, log_q=rows, log_likelihood={"x": rows})
    monkeypatch.setattr(Posterior, "predictive", lambda self, seed: {"x": rows})
    monkeypatch.setattr(Posterior, "prior", lambda self, seed: ({"z": z}, {"x": rows}))
    monkeypatch.setattr("pyro_vi.posterior.arviz._fit", lambda posterior, weighed: {})
    tracemalloc.start()
    try:
        tree = large.to_datatree(local=True)
        converted = as_arviz(tree)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < z.numel() * z.element_size() / 4
    assert np.shares_memory(converted["posterior"]["z"].values, z.numpy())


def test_dtypes_that_arviz_lacks_are_converted() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.deterministic("above", mean > 0)
        pyro.deterministic("half", mean.to(torch.bfloat16))
        pyro.deterministic("count", mean.round().long())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 1.0))

    posterior = Scorer(model, guide, torch.randn(3)).posterior(30)
    assert posterior.deterministic["above"].dtype == torch.bool
    group = posterior.to_datatree()["posterior"]
    mean = posterior.draws["mean"].numpy()
    assert [group[name].dtype for name in ("mean", "above", "half", "count")] == [
        np.float32,
        np.int8,
        np.float32,
        np.int64,
    ]
    np.testing.assert_array_equal(group["above"].values[0], mean > 0)
    np.testing.assert_allclose(group["half"].values[0], mean, rtol=2**-8)


# Files


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    posterior = schools()
    path = tmp_path / "schools.nc"
    options: dict[str, Any] = {"dims": {"theta": ["school"]}, "coords": {"school": NAMES}}
    posterior.to_netcdf(path, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["schools.nc"]
    tree = posterior.to_datatree(**options)
    for name in (path, str(path)):
        assert load(name).identical(tree)
    assert load(path)["posterior"]["theta"].dtype == np.float64
    read = load(path)
    path.unlink()  # what was read does not depend on the file
    save(read, path)
    assert load(path).identical(tree)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "posterior.nc"
    old = schools(30).to_datatree()
    save(old, path)

    def fails(source: object, target: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", fails)
        with pytest.raises(OSError, match="no space left"):
            schools(40).to_netcdf(path)
    broken = xarray.DataTree.from_dict({"a": xarray.Dataset({"v": ("i", [object()])})})
    with pytest.raises((TypeError, ValueError)):
        save(broken, path)
    assert [file.name for file in tmp_path.iterdir()] == ["posterior.nc"]
    assert load(path).identical(old)


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path

import numpy as np
import xarray

from pyro_vi.posterior import load, save

path = Path(sys.argv[1])
values = np.arange(400_000.0).reshape(1, 1_000, 400)
tree = xarray.DataTree.from_dict(
    {"posterior": xarray.Dataset({"z": (("chain", "draw", "unit"), values)})}
)
save(tree.isel(draw=slice(10)), path)
before = path.read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
try:
    save(tree, path)
except OSError as error:
    print(error.strerror)
assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
assert load(path)["posterior"]["z"].shape == (1, 10, 400)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
save(tree, path)
assert load(path).identical(tree)
print("whole")
"""


def test_a_full_disk_leaves_the_old_file_and_a_whole_process(tmp_path: Path) -> None:
    """The disk takes 1 MB a file, and the file has 3.2 MB."""
    pytest.importorskip("resource")
    path = tmp_path / "posterior.nc"
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split("\n")) == (
        0,
        [os.strerror(errno.EFBIG), "whole", ""],
    ), done.stderr


def test_folders_that_are_none() -> None:
    tree = schools(30).to_datatree()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save(tree, "/nowhere/posterior.nc")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save(tree, os.curdir)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # h5netcdf's
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "posterior.nc"
    tree = schools(30).to_datatree()
    save(tree, path)
    whole = path.read_bytes()
    damaged = {
        "empty": b"",
        "text": b"posterior",
        "signature": whole[:8],
        "half": whole[: len(whole) // 2],
        "short": whole[:-100],
        "other": b"PK\x03\x04" + whole[4:],
        "header": whole[:8] + bytes(200) + whole[208:],
        "classic": b"CDF\x01" + bytes(100),
    }
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"posterior\.nc is damaged or no netCDF file"):
            load(path)
    path.write_bytes(whole)  # nothing of the damaged ones is held on to
    assert load(path).identical(tree)
    for missing in (tmp_path / "none.nc", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no netCDF file at"):
            load(missing)


@arvizs_own_words
def test_the_installed_arviz_reads_our_files_and_we_read_its(tmp_path: Path) -> None:
    posterior = schools()
    tree = posterior.to_datatree()
    ours, theirs = tmp_path / "ours.nc", tmp_path / "theirs.nc"
    save(tree, ours)
    read = az.from_netcdf(ours, engine="h5netcdf")
    names = read.groups() if not IS_NEW else list(read.children)
    assert {name.strip("/") for name in names} >= set(JOINT)
    for group, node in tree.children.items():
        for name, values in node.data_vars.items():
            np.testing.assert_array_equal(read[group][name].values, values.values)
    as_arviz(tree).to_netcdf(theirs, engine="h5netcdf")
    again = load(theirs)
    assert set(again.children) == set(tree.children)
    for group, node in tree.children.items():
        assert again[group].to_dataset().equals(node.to_dataset())


# The installed ArviZ


def test_the_form_of_the_installed_version() -> None:
    tree = schools().to_datatree()
    found = as_arviz(tree)
    if IS_NEW:
        assert found is tree
    else:
        assert type(found).__name__ == "InferenceData"
        assert set(found.groups()) == set(JOINT)
        assert found.attrs["inference_library"] == "pyro_vi"
    assert type(schools().to_arviz(local=False)) is type(found)


@arvizs_own_words
def test_summaries() -> None:
    posterior = mean_posterior()
    summary = az.summary(posterior.to_arviz(), **({"round_to": "none"} if not IS_NEW else {}))
    assert list(summary.index) == ["mean"]
    mean = float(posterior.draws["mean"].mean())
    assert float(summary.loc["mean", "mean"]) == pytest.approx(mean, abs=0.01)
    everything = az.summary(schools().to_arviz())
    assert len(everything) == 18


@arvizs_own_words
def test_leave_one_out_and_comparisons() -> None:
    posterior = mean_posterior(shift=0.0, widened=1.0)
    data = posterior.to_arviz()
    loo = az.loo(data)
    elpd = float(loo["elpd_loo"] if not IS_NEW else loo.elpd)
    assert elpd == pytest.approx(posterior.loo().elpd, abs=0.01)  # ArviZ knows no weights
    table = az.compare({"one": data, "two": mean_posterior().to_arviz()})
    assert sorted(table.index) == ["one", "two"]


@pytest.mark.skipif(IS_NEW, reason="ArviZ 1.x takes other arguments")
@arvizs_own_words
@pytest.mark.parametrize("num", [900, 36])  # 3 sqrt(S) draws in the tail, with k-hats good and bad
def test_leave_one_out_prints_what_arviz_does(num: int) -> None:
    """Under an exact guide, whose weights are constant: ArviZ knows none."""
    posterior = mean_posterior(num, shift=0.0, widened=1.0)
    theirs = az.loo(posterior.to_arviz(), pointwise=True, reff=1.0)
    ours = posterior.loo()
    assert ours.elpd == pytest.approx(theirs["elpd_loo"], abs=1e-8)
    assert ours.p_loo == pytest.approx(theirs["p_loo"], abs=1e-8)
    assert ours.num_draws == theirs["n_samples"]
    total = theirs["n_data_points"]
    assert ours.se == pytest.approx(theirs["se"] * math.sqrt(total / (total - 1)))
    assert str(replace(ours, se=theirs["se"])) == str(theirs).rstrip("\n")


@pytest.mark.skipif(not IS_NEW, reason="ArviZ before 1.0 has none")
@arvizs_own_words
def test_leave_one_out_is_that_of_arviz() -> None:
    posterior = mean_posterior(900)  # 3 sqrt(900) draws in the tail, whichever way it is rounded
    tree = posterior.to_datatree()
    stats = tree["sample_stats"]
    theirs = az.loo_approximate_posterior(
        tree, log_p=stats["lp"].values, log_q=stats["log_q"].values, pointwise=True
    )
    ours = posterior.loo()
    assert ours.elpd == pytest.approx(float(theirs.elpd), abs=1e-8)
    np.testing.assert_allclose(ours.pointwise, np.ravel(theirs.elpd_i), atol=1e-8)


@arvizs_own_words
@pytest.mark.parametrize("plot", ["pair", "forest", "ppc"])
def test_plots(plot: str) -> None:
    data = schools(100).to_arviz()
    options: dict[str, Any] = {"var_names": ["mu", "tau"]} if plot != "ppc" else {}
    name = {"ppc": "plot_ppc_dist" if IS_NEW else "plot_ppc"}.get(plot, f"plot_{plot}")
    assert getattr(az, name)(data, **options) is not None
    plt.close("all")


# What is not installed


def test_an_arviz_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = schools(30).to_datatree()
    version: Callable[[str], str] = importlib.metadata.version
    found = {"arviz": "0.23.4"}
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: found.get(name) or version(name)
    )
    for error in (ImportError("no module named pandas"), OSError("no cache folder")):
        monkeypatch.setattr(importlib, "import_module", partial(_raise, error))
        with pytest.raises(ImportError, match=r"ArviZ 0\.23\.4 cannot be imported.*pip install"):
            as_arviz(tree)

    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    with pytest.raises(ImportError, match=r"ArviZ is not installed: pip install 'arviz\["):
        as_arviz(tree)


def _raise(error: Exception, name: str) -> types.ModuleType:
    raise error


def test_without_a_netcdf_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = schools(30)
    monkeypatch.setitem(sys.modules, "h5netcdf", None)
    path = tmp_path / "posterior.nc"
    for call in (partial(posterior.to_netcdf, path), partial(load, path)):
        with pytest.raises(ImportError, match=r"netCDF files need h5netcdf.*pip install 'arviz"):
            call()
    assert list(tmp_path.iterdir()) == []
