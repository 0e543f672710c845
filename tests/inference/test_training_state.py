"""A training loop continues from its state as if it had never stopped."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from example_programs import normal_mean, normal_mean_guide
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from pyro_vi import Fit, fit
from pyro_vi.compiling import backends
from pyro_vi.families import MeanField
from pyro_vi.guides import Encoder
from pyro_vi.inference import fitting
from pyro_vi.inference.callbacks import Callback
from pyro_vi.inference.training_state import TrainingState
from pyro_vi.models import VAE

torch.set_num_threads(1)

X = torch.linspace(-1, 3, 11)
IMAGES = torch.rand(11, 1, 3, 3, generator=torch.Generator().manual_seed(0)).round()
STEPS, STOP = 14, 6


class Capture(Callback):
    """Keeps the state after a number of steps."""

    every = STOP

    def __call__(self, state: TrainingState) -> None:
        if state.step == STOP:
            self.state = deepcopy(state.state_dict())


def mean() -> tuple[Any, Any, Any]:
    return normal_mean, normal_mean_guide, X


def vae() -> tuple[Any, Any, Any]:
    return VAE((1, 3, 3), 2), Encoder((1, 3, 3), MeanField(2, 8)), IMAGES


FITS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (mean, {"optim": partial(Adam, lr=0.1)}),
    "momentum of minibatches": (mean, {"optim": partial(SGD, lr=0.02, momentum=0.9)}),
    "Pyro's optimizer": (mean, {"optim": pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9})}),
    "schedule": (mean, {"schedule": partial(ExponentialLR, gamma=0.8), "clip_norm": 0.5}),
    "average": (vae, {"average": 0.9, "batch_size": 4}),
    "patience": (vae, {"heldout": IMAGES[:5], "heldout_every": 2, "patience": 5, "batch_size": 4}),
    "transform that draws": (vae, {"transform": lambda x: (torch.rand_like(x) < x).float()}),
}
FITS["momentum of minibatches"][1]["batch_size"] = 4


def fitted(name: str, compile: bool) -> Fit:
    make, options = FITS[name]
    torch.manual_seed(0)
    pyro.clear_param_store()
    model, guide, data = make()
    return fit(model, guide, data, **options, steps=STEPS, compile=compile, progress=False)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", FITS)
def test_a_loop_continues_from_its_state(
    name: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture, train = Capture(), fitting._train
    monkeypatch.setattr(backends, "LARGE", math.inf)  # no test waits for TorchInductor

    def watched(training: Any, interruption: Any) -> None:
        train(replace(training, callbacks=[*training.callbacks, capture]), interruption)

    def resumed(training: Any, interruption: Any) -> None:
        training.state.load_state_dict(capture.state)
        train(training, interruption)

    monkeypatch.setattr(fitting, "_train", watched)
    whole = fitted(name, compile)
    monkeypatch.setattr(fitting, "_train", resumed)
    part = fitted(name, compile)
    exact = {"rtol": 1e-4, "atol": 1e-5} if compile else {"rtol": 0, "atol": 0}
    for key in ("losses", "reconstruction", "kl", "weights", "heldout"):
        torch.testing.assert_close(getattr(part, key), getattr(whole, key), **exact)
    for key, tensor in whole.model.state.tensors().items():
        torch.testing.assert_close(part.model.state.tensors()[key], tensor, **exact)
    assert len(part.losses) > STOP


def test_a_state_of_other_options_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    capture, train = Capture(), fitting._train

    def watched(training: Any, interruption: Any) -> None:
        train(replace(training, callbacks=[*training.callbacks, capture]), interruption)

    monkeypatch.setattr(fitting, "_train", watched)
    fitted("Adam", False)

    def resumed(training: Any, interruption: Any) -> None:
        training.state.load_state_dict(capture.state)

    monkeypatch.setattr(fitting, "_train", resumed)
    with pytest.raises(ValueError, match="the same `average`"):
        fit(*mean(), average=0.9, steps=3, progress=False)
