"""A comparison in pictures: figures that draw what the fits hold and what they generate.

    losses           did training settle?          the bound against steps
    reconstructions  what does the latent keep?    E[x' | z], z ~ q(z | x)
    samples          what has the model learned?   E[x | z],  z ~ p(z)
    posteriors       what does a family miss?      q(z_i, z_j | x) of every family, and p(z | x)
    khats            may its draws be trusted?     the distribution of k-hat over data points
    latent_space     where do the data lie?        E_q[z] of every data point
    marginals        what does a family believe?   q of every scalar, and a reference
    pairs            what depends on what?         q of pairs of scalars, and a reference
    strips           what does a chain do?         a diffusion's states from noise to data
    bits             where is its bound spent?     each step's term against time
    schedules        how fast does the signal go?  log SNR against time

`marginals` and `pairs` are for one posterior of all data together, the last three for diffusions,
and all others but `losses` for a posterior of each data point; diffusions have `samples` too.

Every function returns a new `matplotlib.figure.Figure` (`figure.savefig("name.png")` writes it).
pyplot plays no part: nothing is shown or kept open, and no display is needed. A family has one
colour throughout, from the palette of Okabe and Ito, which survives the common colour blindnesses.

Example:
    >>> from types import SimpleNamespace
    >>> from pyro_vi import compare
    >>> from pyro_vi.families import FullCovariance, MeanField
    >>> from pyro_vi.guides import Encoder
    >>> from pyro_vi.models import VAE
    >>> x = torch.rand(40, 1, 4, 4).round()
    >>> result = compare(
    ...     VAE((1, 4, 4), latent_dim=2),
    ...     {f.__name__: Encoder((1, 4, 4), f(2, 8)) for f in (MeanField, FullCovariance)},
    ...     SimpleNamespace(train=x[:30], test=x[30:]),
    ...     num_samples=50,
    ...     steps=5,
    ...     progress=False,
    ... )
    >>> losses(result).axes[0].get_xlabel()
    'step'
    >>> [row.get_ylabel() for row in reconstructions(result, result.data).axes]
    ['original', 'MeanField', 'FullCovariance']
"""

from pyro_vi.plots.data_points import khats, latent_space, posteriors
from pyro_vi.plots.diffusion import bits, schedules, strips
from pyro_vi.plots.joint import marginals, pairs
from pyro_vi.plots.style import colours
from pyro_vi.plots.training import grid, losses, reconstructions, samples, training_bounds

__all__ = [
    "bits",
    "colours",
    "grid",
    "khats",
    "latent_space",
    "losses",
    "marginals",
    "pairs",
    "posteriors",
    "reconstructions",
    "samples",
    "schedules",
    "strips",
    "training_bounds",
]
