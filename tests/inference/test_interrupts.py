"""Ctrl-C: the first ends training and keeps what there is, a second one stops at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from example_programs import normal_mean, normal_mean_guide
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from torch import Tensor

from pyro_vi import SVI, Fit, cli, compare, data, fit
from pyro_vi.inference import interruptible

X = torch.tensor([1.0, 2.0, 3.0])


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def pressing(*calls: int) -> Callable[[Tensor], None]:
    """A model that raises SIGINT in the calls of these numbers. Call 0 is the inspection."""
    count = 0

    def model(x: Tensor) -> None:
        nonlocal count
        if count in calls:
            signal.raise_signal(signal.SIGINT)
        count += 1
        normal_mean(x)

    return model


def test_one_ends_the_fit_and_returns_it(tmp_path: Path) -> None:
    plain = fit(normal_mean, normal_mean_guide, X, steps=5, progress=False)
    with pytest.warns(UserWarning, match="interrupted after 5 of 100 steps: the fit so far is"):
        fitted = fit(pressing(5), normal_mean_guide, X, steps=100, compile=False, progress=False)
    assert fitted.interrupted and "5 steps, interrupted" in repr(fitted)
    assert torch.equal(fitted.losses, plain.losses) and not plain.interrupted
    assert torch.equal(
        fitted.guide.state.tensors()["param.loc"], plain.guide.state.tensors()["param.loc"]
    )
    fitted.save(tmp_path / "fit.pt")
    assert Fit.load(tmp_path / "fit.pt", normal_mean, normal_mean_guide).interrupted


def test_a_second_one_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(_pressing_twice, normal_mean_guide, X, steps=100, progress=False)
    assert len(fit(normal_mean, normal_mean_guide, X, steps=3, progress=False).losses) == 3
    assert not list(pyro.get_param_store())


def _pressing_twice(x: Tensor) -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    normal_mean(x)


def test_restarts_that_are_done_are_kept() -> None:
    model = pressing(20)  # in the second of four restarts of 10 steps
    with pytest.warns(UserWarning, match=r"\d of 10 steps of restart 2 of 4: the best of 1"):
        fitted = fit(
            model, normal_mean_guide, X, steps=10, restarts=4, compile=False, progress=False
        )
    assert not fitted.interrupted and len(fitted.losses) == 10 and len(fitted.restarts) == 1


def test_one_in_the_last_step_interrupts_nothing() -> None:
    model = pressing(10)
    fitted = fit(model, normal_mean_guide, X, steps=10, compile=False, progress=False)
    assert len(fitted.losses) == 10 and not fitted.interrupted


def test_laplace_that_has_not_reached_the_mode_stays_a_point() -> None:
    def model(x: Tensor) -> None:
        count.append(1)
        if len(count) == 4:
            signal.raise_signal(signal.SIGINT)
        pyro.sample("z", pyro.distributions.StudentT(0.1, 50.0, 0.1))  # not concave at the start
        normal_mean(x)

    count: list[int] = []
    init = pyro.infer.autoguide.init_to_value(values={"z": torch.tensor(0.0)})
    with pytest.warns(UserWarning, match="interrupted"):
        fitted = fit(model, AutoLaplaceApproximation(model, init_loc_fn=init), X, progress=False)
    assert fitted.interrupted and len(fitted.losses) < 10


@pytest.mark.parametrize(("press", "families"), [(30, ["a", "b"]), (8, ["a"])])
def test_a_comparison_keeps_the_families_that_are_done(press: int, families: list[str]) -> None:
    guides = {name: normal_mean_guide for name in "abc"}
    options: dict[str, Any] = {"compile": False, "steps": 10, "num_samples": 30}
    with pytest.warns(UserWarning, match="interrupted after"):
        result = compare(pressing(press), guides, X, progress=False, **options)
    assert list(result.fits) == list(result.posteriors) == families
    status = {row.family: row.status for row in result.rows}
    assert status["a"] == "" or status["a"].startswith("interrupted after")
    assert status["c"] == "not fitted: training was interrupted before" and list(status) == [*"abc"]
    assert "interrupted" in str(result) and "Warning: c not fitted: training was" in str(result)


def test_the_command_line_writes_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = 0
    binarize = data.binarize

    def pressing_binarize(images: Tensor) -> Tensor:
        nonlocal batches
        batches += 1
        if batches == 25:  # in the second family
            signal.raise_signal(signal.SIGINT)
        return binarize(images)

    monkeypatch.setattr(data, "binarize", pressing_binarize)
    out = tmp_path / "runs"
    words = "compare --families mean-field,low-rank,flow --steps 15 --draws 30 --test-images 5"
    options = ["--binarize", "--quiet", "--no-report", "--out", str(out)]
    with pytest.warns(UserWarning, match="interrupted"):
        assert cli.main([*words.split(), *options]) == 130
    assert {"mean-field.pt", "low-rank.pt", "comparison.txt"} <= {p.name for p in out.iterdir()}
    assert not (out / "flow.pt").exists() and not (out / "inference.csv").exists()
    assert "flow not fitted: training" in (out / "comparison.txt").read_text()
    assert "not fitted: training" in (out / "comparison.csv").read_text()
    assert cli.main(["sample", str(out), "--out", str(tmp_path / "s.png"), "--num", "4"]) == 0


def test_a_signal_to_a_process() -> None:
    """SIGINT from outside, while the step is being compiled."""
    script = """
import torch, pyro, pyro.distributions as dist
from pyro_vi import fit
def model(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)
    print("run", flush=True)
def guide(x):
    pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.5))
fitted = fit(model, guide, torch.ones(3), steps=10**7, compile=True, progress=False)
print("ended", fitted.interrupted, len(fitted.losses) < 10**7, bool(fitted.losses.isfinite().all()))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "run\n"
    time.sleep(0.5)  # while the step is compiled
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert out.splitlines()[-1] == "ended True True True", error


def test_a_second_one_at_the_end_leaves_no_handler_behind() -> None:
    """Wherever it comes, Python's own handler is back, and the next fit is a whole one."""
    for line in range(60):
        context = interruptible()
        interruption = context.__enter__()
        signal.raise_signal(signal.SIGINT)
        count = 0

        def press(frame: Any, event: str, argument: Any, line: int = line) -> Any:
            nonlocal count
            if frame.f_code.co_filename.endswith("interrupts.py"):
                count += 1
                if count == line:
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGINT)
            return press

        before = sys.gettrace()
        sys.settrace(press)
        try:
            context.__exit__(None, None, None)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert interruption.requested
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            pytest.fail(f"a handler stays, pressed at event {line}")
        with interruptible() as again:
            assert again is not interruption and not again.requested
        if count < line:
            break
    assert 3 < line < 59


def test_another_handler_stays() -> None:
    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        fitted = fit(pressing(2), normal_mean_guide, X, steps=5, progress=False)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert seen == [1] and len(fitted.losses) == 5 and not fitted.interrupted


def test_fits_in_two_threads_are_those_of_one() -> None:
    def one(seed: int) -> Tensor:
        guide = AutoNormal(normal_mean)
        fitted = fit(normal_mean, guide, X, steps=30, seed=seed, progress=False)
        return torch.cat([fitted.losses, fitted.posterior(X, 5).log_q])

    alone = [one(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(one, range(4)))
    assert all(map(torch.equal, alone, together))
    pyro.infer.SVI(normal_mean, normal_mean_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(
        X
    )


def test_steps_beside_a_fit_in_another_thread() -> None:
    steps_taken: list[float] = []

    def steps() -> float:
        adam = pyro.optim.Adam({"lr": 0.05})
        svi = SVI(normal_mean, normal_mean_guide, adam, Trace_ELBO(), compile=False)
        for _ in range(200):
            steps_taken.append(svi.step(X))
            svi.evaluate_loss(X)
        return float(pyro.param("loc").detach())

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(fit, normal_mean, normal_mean_guide, X, steps=150, progress=False)
        loc = steps()
        alone = fit(normal_mean, normal_mean_guide, X, steps=150, progress=False)
        assert torch.equal(beside.result().losses, alone.losses)
    assert loc == pytest.approx(24 / 13, abs=0.6) and len(steps_taken) == 200
