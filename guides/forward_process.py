r"""The forward process of diffusion, as guides of the models in :mod:`pyro_vi.models.ddpm`.

    ForwardProcess   some steps of each data point, at random: the guide of DDPM
    ReverseOrder     q(y_T | x_0) prod_t q(y_{t-1} | y_t, x_0): of DDPMChain, under any ELBO
    ForwardOrder     prod_t q(y_t | y_{t-1}): the same joint density, of DDPMChain, but under
                     Trace_ELBO alone

The last two draw from one distribution. Only the first of them has the model's order, which the
closed-form KLs of TraceMeanField_ELBO need; with the other one that ELBO is an error here.
"""

__all__ = ["ForwardOrder", "ForwardProcess", "ReverseOrder"]

import pyro
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vi.diffusion import Diffusion, StratifiedSteps


class _Guide(PyroModule):
    def __init__(self, diffusion: Diffusion) -> None:
        super().__init__()
        if not isinstance(diffusion, Diffusion):
            raise TypeError(f"expected the model's Diffusion, got {diffusion!r}")
        self.diffusion = diffusion


class ForwardProcess(_Guide):
    """The guide of :class:`pyro_vi.models.DDPM`, site by site.

    Args:
        diffusion: The model's own.

    Example:
        >>> from pyro_vi.diffusion import CosineSchedule
        >>> guide = ForwardProcess(Diffusion((2,), CosineSchedule(100), draws=3))
        >>> trace = pyro.poutine.trace(guide).get_trace(torch.randn(8, 2))
        >>> trace.nodes["x_t"]["value"].shape
        torch.Size([3, 8, 2])
    """

    def forward(self, x_0: Tensor) -> None:
        """The program, for data of shape (N, *shape)."""
        diffusion = self.diffusion
        y_0 = diffusion.encode(x_0)
        last = torch.tensor(diffusion.steps, device=y_0.device)
        drawn = torch.arange(diffusion.draws)
        with pyro.plate("data", len(x_0)):
            pyro.sample(f"x_{diffusion.steps}", diffusion.noised(y_0, last))
            with pyro.plate("steps", diffusion.steps, subsample=drawn):
                steps = StratifiedSteps(diffusion.steps, device=y_0.device)
                told = {"diffusion": diffusion.signature(), "subsampled": True}
                t = pyro.sample("t", steps, infer=told)
                step = diffusion.transition(t, y_0.dtype)
                y_t = pyro.sample("x_t", diffusion.noised(y_0, t, step=step))
                with poutine.scale(scale=steps.weight(t, y_0.dtype)), poutine.mask(mask=t > 1):
                    pyro.sample("x_s", diffusion.before(y_t, y_0, t, step=step))


class ReverseOrder(_Guide):
    """The guide of :class:`pyro_vi.models.DDPMChain` in the model's order, from x_T to x_1.

    Args:
        diffusion: The model's own.
    """

    def forward(self, x_0: Tensor) -> None:
        """The program, for data of shape (N, *shape)."""
        diffusion = self.diffusion
        y_0 = diffusion.encode(x_0)
        with pyro.plate("data", len(x_0)):
            t = torch.tensor(diffusion.steps, device=y_0.device)
            q = diffusion.noised(y_0, t)
            y = pyro.sample(f"x_{diffusion.steps}", q, infer={"diffusion": diffusion.signature()})
            for step in range(diffusion.steps, 1, -1):
                t = torch.tensor(step, device=y_0.device)
                y = pyro.sample(f"x_{step - 1}", diffusion.before(y, y_0, t))


class ForwardOrder(_Guide):
    """The guide of :class:`pyro_vi.models.DDPMChain` as data are noised, from x_1 to x_T.

    Args:
        diffusion: The model's own.
    """

    def forward(self, x_0: Tensor) -> None:
        """The program, for data of shape (N, *shape)."""
        diffusion = self.diffusion
        y = diffusion.encode(x_0)
        with pyro.plate("data", len(x_0)):
            for step in range(1, diffusion.steps + 1):
                q = diffusion.next(y, torch.tensor(step, device=y.device))
                y = pyro.sample(f"x_{step}", q, infer={"diffusion": diffusion.signature()})
