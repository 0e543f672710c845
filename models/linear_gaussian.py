r"""Probabilistic PCA with known parameters: a VAE whose every answer is known exactly.

    z ~ N(0, I_k),    x | z ~ N(W z + b, s^2 I_d).

With r = x - b, M = W'W + s^2 I_k and the posterior's precision P = M / s^2,

    log p(x) = -1/2 [ d log 2 pi + (d - k) log s^2 + log |M| + (|r|^2 - r'W M^-1 W'r) / s^2 ],
    p(z | x) = N(M^-1 W'r, P^-1),

and the best mean-field posterior has the exact mean and the variances 1 / P_jj. It is the yardstick
for families, guides, bounds and diagnostics.
"""

__all__ = ["LinearGaussian"]

import math

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal
from pyro.nn import PyroModule
from torch import Tensor


class LinearGaussian(PyroModule):
    r"""The linear-Gaussian model, with its exact evidence and posterior.

    .. math:: z \sim N(0, I_k), \quad x \mid z \sim N(W z + b, s^2 I_d)

    Sites: the latent "z" of event_shape (k,) and the observed "x" of event_shape (d,), both in
    plate "data".

    Args:
        weight: W, shape (d, k).
        bias: b, shape (d,).
        scale: The standard deviation s of the noise.

    Raises:
        ValueError: The weight is not a matrix, the bias does not fit it, or the scale is not
            positive and finite.

    References:
        Probabilistic Principal Component Analysis (Tipping and Bishop, JRSS B 1999);
        Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse (arXiv:1911.02469)

    Example:
        >>> model = LinearGaussian(torch.tensor([[1.0], [2.0]]), torch.zeros(2), scale=0.5)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> model.log_evidence(x)
        tensor([-2.4500])
        >>> model.posterior(x).mean
        tensor([[0.9524]])
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, scale: float) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"expected a weight of shape (d, k), got {tuple(weight.shape)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"expected a bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}"
            )
        if not 0 < scale < math.inf:
            raise ValueError(f"expected a positive, finite scale, got {scale}")
        self.shape = (weight.shape[0],)
        self.latent_dim = weight.shape[1]
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())
        self.register_buffer("scale", weight.new_tensor(scale))

    def forward(self, x: Tensor) -> None:
        """The program: draws "z" and observes "x".

        Args:
            x: The data, shape (N, d).

        Raises:
            ValueError: The data have another shape.
        """
        self._check(x)
        with pyro.plate("data", x.shape[0]):
            loc = x.new_zeros(x.shape[0], self.latent_dim)
            z = pyro.sample("z", Normal(loc, 1.0).to_event(1))
            mean = z @ self.weight.T + self.bias
            pyro.sample("x", Normal(mean, self.scale).to_event(1), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """The exact log p(x) of every data point, in nats.

        Args:
            x: The data, shape (N, d).

        Returns:
            Shape (N,).

        Raises:
            ValueError: The data have another shape.
        """
        self._check(x)
        d, k = self.weight.shape
        variance = self.scale.square()
        r = x - self.bias
        tril = torch.linalg.cholesky(self.precision * variance)
        projected = torch.linalg.solve_triangular(tril, self.weight.T @ r.T, upper=False)
        log_det = (d - k) * variance.log() + 2 * tril.diagonal().log().sum()
        square = (r.square().sum(-1) - projected.square().sum(0)) / variance
        return -0.5 * (d * math.log(2 * math.pi) + log_det + square)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """The exact posterior p(z | x) of every data point.

        Args:
            x: The data, shape (N, d).

        Returns:
            A distribution of batch_shape (N,) and event_shape (k,).

        Raises:
            ValueError: The data have another shape.
        """
        self._check(x)
        projected = (x - self.bias) @ self.weight / self.scale.square()
        loc = torch.linalg.solve(self.precision, projected.T).T
        return MultivariateNormal(loc, precision_matrix=self.precision)

    def mean_field_gap(self) -> Tensor:
        r"""How far the best mean-field bound stays below log p(x): in nats, the same for every x.

        .. math:: \mathrm{gap} = 1/2 \, [\sum_j \log P_{jj} - \log |P|]

        Returns:
            A scalar.
        """
        return 0.5 * (self.precision.diagonal().log().sum() - self.precision.logdet())

    @property
    def precision(self) -> Tensor:
        """The posterior's precision P = I + W'W / s^2, shape (k, k), the same for every x."""
        eye = torch.eye(self.latent_dim, dtype=self.weight.dtype, device=self.weight.device)
        return eye + self.weight.T @ self.weight / self.scale.square()

    def _check(self, x: Tensor) -> None:
        """ValueError unless the data have the shape (N, d)."""
        if x.dim() != 2 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"expected data of shape (N, {self.shape[0]}), got {tuple(x.shape)}")
