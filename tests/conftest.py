"""What every test starts from: the device asked for, a fixed seed, an empty parameter store."""

from collections.abc import Iterator

import pyro
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the tests that take the `device` fixture put their tensors (default: cpu)",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the tensors here are small: more threads would wait for one another
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device on this machine")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device named on the command line."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def clean_slate() -> None:
    """Each test gives the same numbers alone and in any order."""
    pyro.clear_param_store()
    pyro.enable_validation(True)
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """Numbers are of double precision, unless a test says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(before)
