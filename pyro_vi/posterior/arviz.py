"""Posterior -> ArviZ, whichever major version is installed, and netCDF files.

Our own form is one `xarray.DataTree` with ArviZ's groups:

    posterior, prior                            latent and deterministic sites
    sample_stats                                lp = log p(x, z), log_q = log q(z), log_weight
    log_likelihood                              log p(x | z) of every observation, by observed site
    posterior_predictive, prior_predictive      observed sites, drawn
    predictions                                 observed sites, drawn for other data points
    observed_data, constant_data                the data, and what else the programs were given
    fit                                         training, bounds and k-hat

ArviZ 1.x takes it as it is; 0.23 wants the same groups as an `InferenceData`. Chains are restarts
of the fit, so that R-hat says whether they agree; the draws of one restart are independent, and
their effective sample size is their number, however poor the fit.
"""

from __future__ import annotations

__all__ = ["as_arviz", "datatree", "load", "save"]

import importlib
import importlib.metadata
import io
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_vi import files
from pyro_vi._version import __version__
from pyro_vi.checks import check_seed
from pyro_vi.diagnostics import RHAT_THRESHOLD
from pyro_vi.posterior.weighted_draws import WeightedDraws

if TYPE_CHECKING:
    import xarray


log = logging.getLogger(__name__)

_EXTRA = "pip install 'arviz[matplotlib,h5netcdf]>=0.23'"

Names = tuple[str, ...]


def datatree(
    posterior: WeightedDraws,
    *,
    local: bool | None = None,
    restarts: bool = True,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    predictions: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> xarray.DataTree:
    """The draws and all that belongs to them, in ArviZ's groups.

    Axes are named after plates; what is right of them is `<site>_dim_0`, `<site>_dim_1`, .... A "/"
    in a site's name becomes a "." there. Values are not copied, but for those of several restarts.

    Args:
        posterior: what `Fit.posterior` returned.
        local: whether to take along latents of single data points, and predictive draws, where each
            data point has a posterior of its own; by default they are left out there, and the
            groups posterior, prior and those of predictions with them. Where the weights are
            joint, False leaves out the latents of single data points.
        restarts: whether each restart of the fit is a chain; else the best is the only one.
        dims: names of all of a site's axes but draws, by site, instead of those above.
        coords: labels by axis name; by default 0, 1, 2, ....
        predictions: draws by observed site, (S, *plates, *shape) each, tensors or arrays, of data
            points that may be others, such as `PredictiveVAE.predict` gives for new x; `coords`
            label neither these nor an axis that has another size here.
        seed: of predictive and prior draws.

    Returns:
        The tree; sample axes are ("chain", "draw"). Priors (flat ones) and likelihoods that cannot
        be drawn from have no groups.

    Raises:
        ValueError: a site named like an axis, two sites whose names become one, an axis named like
            a sample axis, names or labels of another number than a site or an axis has, or for
            sites or axes that are none; predictions of a site that is not observed, of another
            shape than its draws have, or with NaN; a seed that is none.
        TypeError: predictions that are no mapping of sites to tensors or arrays.

    Warns:
        UserWarning: restarts that disagree, by R-hat.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vi.posterior import Scorer
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("mean", dist.Normal(x.mean(), 0.5))
        >>> tree = datatree(Scorer(model, guide, torch.randn(4)).posterior(100))
        >>> dict(tree["log_likelihood"].sizes)
        {'chain': 1, 'draw': 100, 'data': 4}
    """
    import xarray

    check_seed(seed)
    chains = (restarts and posterior.restarts) or (posterior,)
    if len(chains) > 1 and (worst := _rhat(posterior)) > RHAT_THRESHOLD:
        warnings.warn(
            f"R-hat across restarts is up to {worst:.2f}: the chains are draws of different"
            " posteriors, the best fit's and worse ones; restarts=False takes the best alone",
            stacklevel=3,
        )
    wanted = posterior.is_joint if local is None else local
    names = _Names(posterior, dims or {}, coords or {})

    def kept(site: str) -> bool:
        return wanted or posterior.plate not in posterior.dims[site]

    def draws(one: WeightedDraws) -> dict[str, Tensor]:
        return {name: values for name, values in one.sites.items() if kept(name)}

    groups: dict[str, dict[str, Any]] = {}
    groups["posterior"] = names.sites(_stacked(draws(one) for one in chains))
    if wanted or posterior.is_joint:
        try:
            drawn = _stacked(one.predictive(seed=seed + i) for i, one in enumerate(chains))
        except ValueError as error:
            log.info("no predictive draws: %s", error)
        else:
            groups["posterior_predictive"] = names.sites(drawn)
        try:
            prior, predictive = posterior.prior(seed=seed)
        except ValueError as error:
            log.info("no prior draws: %s", error)
        else:
            prior = {name: values for name, values in prior.items() if kept(name)}
            groups["prior"] = names.sites(_stacked([prior]))
            groups["prior_predictive"] = names.sites(_stacked([predictive]))
    observed, constants = posterior.data()
    if predictions is not None:
        there = _checked_predictions(predictions, posterior, observed)
        groups["predictions"] = names.sites(_stacked([there]))
    stats = [{"lp": one.log_p, "log_q": one.log_q} for one in chains]
    if not posterior.point:
        for one in stats:
            one["log_weight"] = one["lp"] - one["log_q"]
    weighed = () if posterior.is_joint else (_plain(posterior.plate),)
    groups["sample_stats"] = {
        name: (("chain", "draw", *weighed), values) for name, values in _stacked(stats).items()
    }
    groups["log_likelihood"] = names.sites(
        _stacked(one.log_likelihood for one in chains), whole=False
    )
    groups["observed_data"] = names.sites({n: _array(v) for n, v in observed.items()}, sample=())
    groups["constant_data"] = names.sites({n: _array(v) for n, v in constants.items()}, sample=())
    groups["fit"] = _fit(posterior, weighed)

    names.check_coords([*groups.values(), names.sites(_stacked([posterior.sites]))])
    datasets = {}
    for group, variables in groups.items():
        if variables:
            labels = names.labels(group, variables)
            datasets[group] = xarray.Dataset(variables, coords=labels)
    tree = xarray.DataTree.from_dict(datasets)
    tree.attrs = {"inference_library": "pyro_vi", "inference_library_version": __version__}
    return tree


def _checked_predictions(
    predictions: object, posterior: WeightedDraws, observed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Predictions as tensors on the CPU, if they are of observed sites and have their shapes."""
    if not isinstance(predictions, Mapping):
        raise TypeError(
            "expected predictions as a mapping of observed sites to their draws, such as"
            f" {{{next(iter(observed), 'y')!r}: draws}}, got {type(predictions).__name__}"
        )
    if strangers := sorted(predictions.keys() - posterior.log_likelihood.keys()):
        raise ValueError(
            f"predictions are of observed sites, and {strangers} are none: expected some of"
            f" {sorted(posterior.log_likelihood)}"
        )
    found = {}
    for name, values in predictions.items():
        if not isinstance(values, (Tensor, np.ndarray)):
            raise TypeError(
                f"predictions of {name!r}: expected a tensor or an array of draws, got"
                f" {type(values).__name__}"
            )
        draws = found[name] = torch.as_tensor(values).cpu()
        plates = posterior.dims[name]
        if name in observed:
            point = tuple(observed[name].shape[len(plates) :])  # the sizes of plates may be others
            shape = tuple(draws.shape)
            if len(shape) != 1 + len(plates) + len(point) or shape[1 + len(plates) :] != point:
                sizes = ", ".join(map(str, ["draws", *plates, *point]))
                raise ValueError(f"predictions of {name!r}: expected shape ({sizes}), got {shape}")
        if draws.is_floating_point() and bool(draws.isnan().any()):
            raise ValueError(f"predictions of {name!r}: expected draws without NaN")
    return found


def as_arviz(tree: xarray.DataTree) -> Any:
    """A tree of `datatree` as the installed ArviZ has it: InferenceData before 1.0, as it is since.

    Raises:
        ImportError: ArviZ is not installed, or cannot be imported.
    """
    try:
        version = importlib.metadata.version("arviz")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"ArviZ is not installed: {_EXTRA}") from error
    if int(version.partition(".")[0]) >= 1:
        return tree
    try:
        arviz = importlib.import_module("arviz")
    except (ImportError, OSError) as error:  # OSError: its cache folder cannot be made
        raise ImportError(f"ArviZ {version} cannot be imported ({error}): {_EXTRA}") from error
    groups = {name: node.to_dataset() for name, node in tree.children.items()}
    return arviz.InferenceData(attrs=dict(tree.attrs), **groups)


def save(tree: xarray.DataTree, path: str | os.PathLike[str]) -> None:
    """Writes a tree to a netCDF file, atomically: a reader sees the old file or the new one.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such folder, or it is one.
        OSError: it cannot be written, for example to a full disk; the old file stays.
        ImportError: the netCDF engine is not installed.
    """
    files.write(path, _netcdf_bytes(tree))


def load(path: str | os.PathLike[str]) -> xarray.DataTree:
    """Reads a tree from a netCDF file that `save`, or either ArviZ, wrote; the file is closed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no netCDF file.
        ImportError: the netCDF engine is not installed.
    """
    import xarray

    _engine()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no netCDF file at {os.fspath(path)}")
    try:
        # An open file of our own: HDF5 would hold on to a damaged one, and to its old content.
        with open(path, "rb") as file, xarray.open_datatree(file, engine="h5netcdf") as tree:
            return tree.load()
    except Exception as error:  # damage turns up as errors of many types, wherever it is met
        raise ValueError(f"{os.fspath(path)} is damaged or no netCDF file: {error}") from error


def _netcdf_bytes(tree: xarray.DataTree) -> memoryview:
    """The bytes of a netCDF file that holds the tree.

    It is built in memory, because HDF5 cannot close a file on a full disk and then crashes the
    process at its exit. `DataTree.to_netcdf` takes no buffer in older releases of
    xarray.
    """
    import xarray

    buffer = io.BytesIO()
    with _engine().File(buffer, "w") as file:
        for node in tree.subtree:
            store = xarray.backends.H5NetCDFStore(file, group=node.path)
            node.to_dataset(inherit=False).dump_to_store(store)
    return buffer.getbuffer()


def _engine() -> ModuleType:
    try:
        return importlib.import_module("h5netcdf")
    except ImportError as error:
        raise ImportError(f"netCDF files need h5netcdf ({error}): {_EXTRA}") from error


class _Names:
    """Names of variables and axes, and the labels along these."""

    def __init__(
        self, posterior: WeightedDraws, dims: Mapping[str, Sequence[str]], coords: Mapping[str, Any]
    ) -> None:
        self._plates, self._dims, self._coords = posterior.dims, dims, coords
        self._plate = _plain(posterior.plate)
        if strangers := sorted(dims.keys() - posterior.dims.keys() - posterior.data()[1].keys()):
            raise ValueError(
                f"dims are for sites, and there are none named {strangers}: expected some of"
                f" {sorted(posterior.dims)}"
            )

    def sites(
        self,
        values: Mapping[str, npt.NDArray[Any]],
        *,
        sample: Names = ("chain", "draw"),
        whole: bool = True,
    ) -> dict[str, tuple[Names, npt.NDArray[Any]]]:
        """Values by site as variables: (names of axes, values); `whole` if they have all axes."""
        found: dict[str, tuple[Names, npt.NDArray[Any]]] = {}
        for site, array in values.items():
            name = _plain(site)
            if name in found:
                raise ValueError(f"two sites become {name!r}: rename one of them")
            axes = self._axes(site, array.ndim - len(sample), whole)
            if reserved := sorted({"chain", "draw"}.intersection(axes)):
                raise ValueError(
                    f"an axis of site {site!r} is named {reserved[0]!r}, like a sample axis: rename"
                    " the plate, or the axis with dims={...}"
                )
            found[name] = (*sample, *axes), array
        return found

    def _axes(self, site: str, number: int, whole: bool) -> Names:
        if site in self._dims:
            own = tuple(self._dims[site])
            wrong = len(own) != number if whole else len(own) < number
            if isinstance(self._dims[site], str) or wrong:
                raise ValueError(
                    f"site {site!r} has {number} axes, and dims names {self._dims[site]!r}"
                )
            return own[:number]  # a log likelihood has the plates alone
        plates = tuple(map(_plain, self._plates.get(site, ())[:number]))
        return (*plates, *(f"{_plain(site)}_dim_{i}" for i in range(number - len(plates))))

    def check_coords(self, groups: Iterable[Mapping[str, tuple[Names, Any]]]) -> None:
        """Raises ValueError if there are labels for axes that no group has."""
        axes = {axis for group in groups for names, _ in group.values() for axis in names}
        if strangers := sorted(self._coords.keys() - axes):
            raise ValueError(
                f"coords are for axes, and there are none named {strangers}: expected some of"
                f" {sorted(axes)}"
            )

    def labels(self, group: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Labels of every axis in a group."""
        labels = {}
        for axes, values in variables.values():
            for axis, size in zip(axes, np.shape(values), strict=True):
                given = self._coords.get(axis)
                fits = given is None or len(given) == size
                if group == "predictions" and (axis == self._plate or not fits):
                    given = None  # of other data points
                elif given is not None and not fits:
                    raise ValueError(
                        f"axis {axis!r} has {size} elements, and coords give {len(given)} labels"
                    )
                labels[axis] = np.arange(size) if given is None else np.asarray(given)
        for name in variables:
            if name in labels:
                raise ValueError(
                    f"site {name!r} in group {group!r} is named like an axis, and would be lost:"
                    " rename the site, or the axis with dims={...}"
                )
        return labels


def _plain(name: str) -> str:
    """A name as the tree has it: "/" would be a path."""
    return name.replace("/", ".")


def _rhat(posterior: WeightedDraws) -> float:
    """The largest R-hat across restarts; 0 where all are NaN, as of values that do not vary."""
    values = [np.ravel(one) for one in posterior.rhat().values()]
    return float(np.nan_to_num(np.concatenate(values), nan=0.0).max())


def _stacked(chains: Iterable[Mapping[str, Tensor]]) -> dict[str, npt.NDArray[Any]]:
    """Values of each chain, (S, ...), as arrays (C, S, ...); views where there is one chain."""
    first, *others = chains
    if not others:
        return {name: _array(value)[None] for name, value in first.items()}
    every = (first, *others)
    return {name: np.stack([_array(one[name]) for one in every]) for name in first}


def _array(value: Tensor) -> npt.NDArray[Any]:
    """A tensor as an array that every ArviZ takes: bool as int8, bfloat16 as float32."""
    if value.dtype == torch.bool:
        return value.to(torch.int8).numpy()
    if value.dtype == torch.bfloat16:
        return value.float().numpy()
    return value.detach().numpy()


def _fit(posterior: WeightedDraws, weighed: Names) -> dict[str, Any]:
    """The group of our own: training by step, bounds and k-hat."""
    found: dict[str, Any] = {
        name: (("step",), _array(values)) for name, values in posterior.training.items()
    }
    if posterior.point or posterior.num_draws < 2:
        return found
    for name, estimate in (("elbo", posterior.elbo()), ("evidence", posterior.evidence())):
        found[name] = (weighed, np.asarray(estimate.value))
        found[f"{name}_se"] = (weighed, np.asarray(estimate.se))
    if posterior.num_draws >= 21:
        found["khat"] = (weighed, np.asarray(posterior.khat()))
    return found
