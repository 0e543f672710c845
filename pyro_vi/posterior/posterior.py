"""A posterior: weighted draws that can be exported."""

from __future__ import annotations

__all__ = ["Posterior"]

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from pyro_vi.posterior.arviz import as_arviz, datatree, save
from pyro_vi.posterior.weighted_draws import WeightedDraws

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, repr=False)
class Posterior(WeightedDraws):
    """Draws from a guide with their importance weights, and their export to ArviZ.

    Its other attributes and methods are those of `pyro_vi.posterior.WeightedDraws`.
    """

    def to_datatree(self, **options: Any) -> xarray.DataTree:
        """The draws and all that belongs to them as one DataTree.

        Arguments as `pyro_vi.posterior.datatree` takes them.
        """
        return datatree(self, **options)

    def to_arviz(self, **options: Any) -> Any:
        """The same as the installed ArviZ has it: InferenceData before 1.0, DataTree since.

        Where each data point has a posterior of its own, the draws are left out of it unless asked
        for: `local=True`.
        """
        return as_arviz(self.to_datatree(**options))

    def to_netcdf(self, path: str | PathLike[str], **options: Any) -> None:
        """Writes the same to a netCDF file, whole or not at all."""
        save(self.to_datatree(**options), path)
