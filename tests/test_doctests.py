"""Every example in a docstring runs and gives what it says.

pytest's own collection would import models/ by its path, as a second copy of pyro_vi.models; here
each module comes under the name that users import.
"""

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest
import torch

PACKAGES = ("pyro_vi", "pyro_vi.models", "pyro_vi.guides")


def module_names(package: str) -> list[str]:
    """The package and its modules; `__main__` is left out, since its import runs the program."""
    path = importlib.import_module(package).__path__
    modules = (module.name for module in pkgutil.walk_packages(path, f"{package}."))
    return [package, *(name for name in modules if not name.endswith(".__main__"))]


def run_doctests(module: ModuleType) -> doctest.TestResults:
    """Examples see the names of their module, and torch, which nearly all of them need."""
    return doctest.testmod(
        module,
        extraglobs={"torch": torch},
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )


# A sub-package would come twice: once from pyro_vi in a wheel install, once by its own name.
@pytest.mark.parametrize("name", sorted({name for p in PACKAGES for name in module_names(p)}))
def test_docstring_examples(name: str) -> None:
    results = run_doctests(importlib.import_module(name))
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples; see the output"


def test_wrong_example_is_found() -> None:
    module = ModuleType("planted")
    module.__doc__ = ">>> 1 + 1\n3\n"
    assert run_doctests(module) == doctest.TestResults(failed=1, attempted=1)
