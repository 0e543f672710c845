"""Who may import whom, read from the sources; and importing the library changes nothing."""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import pyro_vi

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"pyro_vi": "pyro_vi", "models": "pyro_vi.models", "guides": "pyro_vi.guides"}
LIBRARY = sorted(path for folder in PACKAGES for path in (ROOT / folder).glob("*.py"))
SCRIPTS = sorted(
    path for folder in ("examples", "benchmarks", "tests") for path in (ROOT / folder).glob("*.py")
)

BUILDING_BLOCKS = tuple(
    f"pyro_vi.{name}"
    for name in (
        "augmentation",
        "denoisers",
        "diffusion",
        "families",
        "flows",
        "kernels",
        "networks",
        "schedules",
    )
)
COMPOSITION_ROOT = ("cli.py", "__main__.py")


def imports(source: str, package: str = "") -> Iterator[str]:
    """The full dotted names that a file of `package` imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def prints(source: str) -> list[int]:
    """The lines that call `print`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def violations(folder: str, file: str, source: str) -> list[str]:
    """What a file of the repository does that its layer may not."""
    package = PACKAGES.get(folder, "")
    found = []
    for name in imports(source, package):
        if within(name, "models", "guides"):
            found.append(f"{name}: a second copy of pyro_vi.{name}")
        if not package:
            continue
        if within(name, "zuko", "pyro.contrib.zuko") and (folder, file) != ("pyro_vi", "flows.py"):
            found.append(f"{name}: flows.py alone imports zuko")
        if folder == "pyro_vi":
            if within(name, "pyro_vi.models", "pyro_vi.guides") and file not in COMPOSITION_ROOT:
                found.append(f"{name}: the core knows no model and no guide")
        elif within(name, "pyro_vi") and not within(name, package, *BUILDING_BLOCKS):
            found.append(f"{name}: {folder}/ may use the building blocks and its own files")
    if package and (folder, file) != ("pyro_vi", "cli.py"):
        found += [f"line {line}: print" for line in prints(source)]
    return found


def shared_names(package: ModuleType) -> list[str]:
    """Public names of a package that hide a module of it: `pyro_vi.fit` can't be both."""
    modules = {path.stem for folder in package.__path__ for path in Path(folder).glob("*.py")}
    return [
        name
        for name in package.__all__
        if name in modules and not isinstance(getattr(package, name), ModuleType)
    ]


def import_effects(modules: list[str], path: Path | None = None) -> list[str]:
    """The global state that importing `modules` changes, in a new interpreter."""
    script = f"""
import importlib, pyro, torch, pyro.infer

def state():
    return {{
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "validation of inference": pyro.infer.util.is_validation_enabled(),
        "default dtype": torch.get_default_dtype(),
        "RNG state": torch.random.get_rng_state().tolist(),
        "parameter store": sorted(pyro.get_param_store().keys()),
    }}

before = state()
for name in {modules!r}:
    importlib.import_module(name)
after = state()
for key in before:
    if before[key] != after[key]:
        print(key)
"""
    env = {**os.environ, "PYTHONPATH": str(path)} if path else None
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=path
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_the_files_are_found() -> None:
    assert {path.parent.name for path in LIBRARY} == set(PACKAGES)
    assert Path(__file__).resolve() in SCRIPTS


@pytest.mark.parametrize(
    "path", [*LIBRARY, *SCRIPTS], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_file_keeps_to_its_layer(path: Path) -> None:
    assert violations(path.parent.name, path.name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("folder", "file", "source"),
    [
        ("pyro_vi", "fitting.py", "from pyro_vi.models import VAE"),
        ("pyro_vi", "fitting.py", "from pyro_vi import guides"),
        ("pyro_vi", "fitting.py", "from .guides.encoder import Encoder"),
        ("pyro_vi", "__init__.py", "import pyro_vi.models.vae"),
        ("pyro_vi", "comparison.py", "def f():\n    from pyro_vi.models import VAE"),
        ("pyro_vi", "comparison.py", "import zuko"),
        ("pyro_vi", "families.py", "from pyro.contrib.zuko import ZukoToPyro"),
        ("pyro_vi", "fitting.py", "print('step')"),
        ("models", "vae.py", "from pyro_vi.inference.fitting import fit"),
        ("models", "vae.py", "from pyro_vi import fit"),
        ("models", "vae.py", "import pyro_vi"),
        ("models", "vae.py", "from pyro_vi.guides import Encoder"),
        ("models", "vae.py", "from zuko.flows import NSF"),
        ("models", "cli.py", "print('not the CLI')"),
        ("guides", "encoder.py", "from pyro_vi.models import VAE"),
        ("guides", "encoder.py", "from .. import svi"),
        ("examples", "vae.py", "from models import VAE"),
        ("tests", "test_vae.py", "import guides.encoder"),
    ],
)
def test_violation_is_found(folder: str, file: str, source: str) -> None:
    assert len(violations(folder, file, source)) == 1


@pytest.mark.parametrize(
    ("folder", "file", "source"),
    [
        ("pyro_vi", "cli.py", "from pyro_vi.models import VAE\nprint(VAE)"),
        ("pyro_vi", "__main__.py", "from pyro_vi.guides import Encoder"),
        ("pyro_vi", "flows.py", "import zuko\nfrom pyro.contrib.zuko import ZukoToPyro"),
        ("pyro_vi", "fitting.py", "from pyro_vi.inference.svi import SVI\nimport modelscope"),
        ("models", "__init__.py", "from pyro_vi.models.vae import VAE"),
        ("models", "vae.py", "from pyro_vi import networks\nfrom pyro_vi.flows import Flow"),
        ("guides", "encoder.py", "from pyro_vi.families import MeanField\nimport pyro"),
        ("examples", "vae.py", "from pyro_vi import fit\nimport zuko\nprint(fit)"),
    ],
)
def test_allowed_is_let_through(folder: str, file: str, source: str) -> None:
    assert violations(folder, file, source) == []


def test_no_module_shares_its_name_with_a_public_function() -> None:
    assert shared_names(pyro_vi) == []


def test_shared_name_is_found(tmp_path: Path) -> None:
    for name in ("fit.py", "data.py"):
        (tmp_path / name).touch()
    package = ModuleType("planted")
    package.__path__ = [str(tmp_path)]
    package.__all__ = ["data", "fit", "report"]  # type: ignore[attr-defined]
    package.data, package.fit, package.report = ModuleType("data"), len, len  # type: ignore
    assert shared_names(package) == ["fit"]


def test_importing_changes_no_global_state() -> None:
    modules = [
        PACKAGES[path.parent.name] + ("" if path.stem == "__init__" else f".{path.stem}")
        for path in LIBRARY
        if path.stem != "__main__"
    ]
    assert import_effects(modules) == []


def test_changed_global_state_is_found(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(
        "import pyro, torch\n"
        "pyro.param('w', torch.randn(2))\n"
        "torch.set_default_dtype(torch.float64)\n"
        "pyro.enable_validation(not pyro.infer.util.is_validation_enabled())\n"
        "torch.distributions.Distribution.set_default_validate_args(False)\n",
        encoding="utf-8",
    )
    assert import_effects(["planted"], path=tmp_path) == [
        "validation of distributions",
        "validation of inference",
        "default dtype",
        "RNG state",
        "parameter store",
    ]
