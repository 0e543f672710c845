"""What a flow must do beyond its family: one pass a draw, a cache that never lies, no side effects.

Its density, draws, gradients, state and start are tested with every other family's.
"""

import subprocess
import sys

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal
from torch import Tensor, nn

from pyro_vi.flows import Flow

torch.set_num_threads(1)


def bent(dim: int, context_dim: int = 4, *, transforms: int = 3) -> Flow:
    """A flow in float64 that is far from the identity."""
    flow = Flow(dim, context_dim, transforms=transforms, hidden=(32,)).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow


def contexts(*batch: int) -> Tensor:
    return torch.randn(*batch, 4, dtype=torch.float64)


@pytest.mark.parametrize("before", [True, False])
def test_importing_leaves_validation_as_it_was(before: bool) -> None:
    script = f"""
import torch
torch.distributions.Distribution.set_default_validate_args({before})
import pyro
stood = torch.distributions.Distribution._validate_args
import pyro_vi.flows
assert torch.distributions.Distribution._validate_args is stood
torch.distributions.Distribution.set_default_validate_args(True)
try:
    torch.distributions.Normal(0.0, -1.0)
except ValueError:
    print("refused")
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True)
    assert (ran.returncode, ran.stdout) == (0, b"refused\n"), ran.stderr.decode()


@pytest.mark.parametrize("dim", [1, 5])
def test_a_draw_and_its_density_take_one_pass(dim: int) -> None:
    flow = bent(dim)
    calls: list[nn.Module] = []
    for layer in flow.transform.transforms:
        layer.transform.hyper.register_forward_hook(lambda module, *_: calls.append(module))
    q = flow(contexts(10))
    q.log_prob(q.rsample((2,)))
    assert len(calls) == len(set(calls)) == 3


def test_every_dimension_depends_on_every_other() -> None:
    """The reversed order of the second layer closes what the first leaves open."""
    flow = bent(4, transforms=2)
    context = contexts()
    forward = flow.transform(context).inv
    jacobian = torch.autograd.functional.jacobian(forward, torch.randn(4, dtype=torch.float64))
    assert (jacobian != 0).all()
    q = flow(context)
    noise = torch.randn(4, dtype=torch.float64)
    (_, log_det) = torch.linalg.slogdet(torch.autograd.functional.jacobian(forward, noise))
    base = torch.distributions.Normal(0, 1).log_prob(noise).sum()
    torch.testing.assert_close(q.log_prob(forward(noise)), base - log_det)


def test_in_a_plate_drawn_replayed_and_scored() -> None:
    flow, context = bent(3), contexts(10)

    def guide() -> None:
        with pyro.plate("data", 10):
            pyro.sample("z", flow(context))

    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    trace.compute_score_parts()
    site = trace.nodes["z"]
    assert site["value"].shape == (10, 3) and site["log_prob"].shape == (10,)
    assert torch.equal(site["score_parts"].entropy_term, site["log_prob"])
    fresh = flow(context).log_prob(site["value"].clone())
    torch.testing.assert_close(site["log_prob"], fresh)

    replayed = poutine.trace(poutine.replay(guide, trace=trace)).get_trace()
    replayed.compute_log_prob()
    assert replayed.nodes["z"]["value"] is site["value"]
    torch.testing.assert_close(replayed.nodes["z"]["log_prob"], fresh)

    outside = torch.zeros(10, 3, dtype=torch.float64)
    conditioned = poutine.trace(poutine.condition(guide, {"z": outside})).get_trace()
    conditioned.compute_log_prob()
    torch.testing.assert_close(
        conditioned.nodes["z"]["log_prob"], flow(context).log_prob(outside.clone())
    )


def test_in_a_plate_around_the_batch() -> None:
    flow, context = bent(3), contexts(10)
    with pyro.plate("draws", 7, dim=-2), pyro.plate("data", 10, dim=-1):
        q = flow(context)
        z = pyro.sample("z", q)
    assert z.shape == (7, 10, 3) and z.unique(dim=0).shape == z.shape
    assert q.log_prob(z).shape == (7, 10)


def test_two_draws_of_one_distribution() -> None:
    q = bent(3)(contexts(10))
    first, second = q(), q()
    torch.testing.assert_close(q.log_prob(first), q.log_prob(first.clone()))
    torch.testing.assert_close(q.log_prob(second), q.log_prob(second.clone()))


def test_draw_that_was_written_to() -> None:
    q = bent(3)(contexts(10))
    with torch.no_grad():
        z = q()
        z.add_(1)
        torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))
    with torch.inference_mode():
        z = q()
        torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))


def test_draw_without_gradients_is_scored_with_them() -> None:
    flow = bent(3)
    q = flow(contexts(10))
    with torch.no_grad():
        z = q()
        assert not q.log_prob(z).requires_grad
    assert q.log_prob(z).requires_grad
    z.requires_grad_()
    (score,) = torch.autograd.grad(q.log_prob(z).sum(), z)
    assert score.abs().sum() > 0


def test_gradient_of_a_draw_is_the_same_by_either_way() -> None:
    """Through the density that came with the draw, and through the flow's inverse."""
    flow, context = bent(3), contexts(10)
    gradients = []
    for copy in (False, True):
        torch.manual_seed(1)
        q = flow(context)
        z = q()
        log_q = q.log_prob(z.clone() if copy else z)
        gradients.append(torch.autograd.grad(log_q.sum(), list(flow.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        bent(3)(contexts()).log_prob(torch.full((3,), torch.nan, dtype=torch.float64))


def test_closes_the_gap_of_a_correlated_target() -> None:
    """At correlation 0.8 the best mean-field posterior keeps 0.51 nats, the flow hardly any."""
    target = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    flow, context = Flow(2, 1, transforms=2, hidden=(16,)), torch.ones(1)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2)

    def kl(draws: int) -> Tensor:
        q = flow(context)
        z = q.rsample((draws,))
        return (q.log_prob(z) - target.log_prob(z)).mean()

    for _ in range(200):
        optimizer.zero_grad()
        kl(128).backward()
        optimizer.step()
    assert kl(10_000) < 0.03


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="transforms to be at least 1, got 0"):
        Flow(3, 4, transforms=0)
    with pytest.raises(ValueError, match=r"hidden\[1\] to be at least 1, got 0"):
        Flow(3, 4, hidden=(8, 0))
