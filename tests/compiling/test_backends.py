"""What compiles a step, and what happens where that fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import normal_mean, normal_mean_guide
from pyro.infer import Trace_ELBO

from pyro_vi import SVI, fit
from pyro_vi.compiling import backends
from pyro_vi.compiling import build as building

X = torch.arange(5.0)
Programs = tuple[Callable[..., None], Callable[..., None], torch.Tensor]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of compiled functions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "pyro_vi"
    forget()


def forget() -> None:
    building._folder.cache_clear()
    building._compiler.cache_clear()


def mean() -> Programs:
    return normal_mean, normal_mean_guide, X


def convolution() -> Programs:
    """The gradient of its first layer has no part for the input."""
    network = torch.nn.Conv2d(1, 2, 3)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 3, 3), 1.0).to_event(3))
            pyro.sample("x", dist.Normal(z.sum((1, 2, 3)), 1.0), obs=x.sum((1, 2, 3)))

    def guide(x: torch.Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x), 0.5).to_event(3))

    return model, guide, torch.rand(4, 1, 5, 5)


def losses(make: Callable[[], Programs], compile: bool, steps: int = 12) -> tuple[list[float], SVI]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, x = make()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), compile=compile)
    return [svi.step(x) for _ in range(steps)], svi


def check(by: str, make: Callable[[], Programs] = mean) -> None:
    """Compiled steps have the losses of eager ones."""
    expected, _ = losses(make, False)
    found, svi = losses(make, True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert svi.compiled_steps == 8 and by in svi.explain()


def test_c_is_kept_and_found_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check("the C compiler")
    (kept,) = own_cache.glob("*.so")
    monkeypatch.setattr(building, "_compile", None)  # which would fail
    check("the C compiler")
    assert list(own_cache.iterdir()) == [kept]


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_compiler_torchscript_takes_steps(
    compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match="a step is compiled by TorchScript") as caught:
        check("TorchScript")
    assert len(caught) == 1


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'error: full disk' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(UserWarning, match="TorchScript.*error: full disk"):
        check("TorchScript")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="compiled functions are not kept") as caught:
        check("the C compiler")
    assert len(caught) == 1


def test_convolutions_are_run_by_torch() -> None:
    check("the C compiler", convolution)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x7fELF" + bytes(100)])
def test_a_damaged_file_is_compiled_again(
    content: bytes, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check("the C compiler")
    (kept,) = own_cache.glob("*.so")
    damaged = tmp_path / "other" / "pyro_vi" / kept.name  # another path, so it is loaded anew
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    forget()
    check("the C compiler")
    assert damaged.read_bytes() != content


def test_two_processes_compile_at_once(own_cache: Path) -> None:
    """The file that compiles needs nothing else of the package."""
    script = (
        f"import runpy, warnings; warnings.simplefilter('error');"
        f" space = runpy.run_path({building.__file__!r});"
        " text = 'long run(void *a, void *b, void *c, long n, void *f) { return n + 1; }';"
        " texts = [text + chr(10) * i for i in range(5)];"
        " print([space['build'](one)(0, 0, 0, i, space['CALL']()) for i, one in enumerate(texts)])"
    )
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    found = [process.communicate()[0] for process in running]
    assert found == [b"[1, 2, 3, 4, 5]\n"] * 2
    assert len(list(own_cache.iterdir())) == 5  # and no temporary files


def test_large_steps_stay_eager_in_short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "LARGE", 1)
    fitted = fit(normal_mean, normal_mean_guide, X, steps=300, progress=False)
    assert "do not pay for TorchInductor" in fitted.compiled


def test_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program whose gradient has parts that are None."""
    monkeypatch.setattr(backends, "LARGE", 1)
    check("TorchInductor", convolution)
