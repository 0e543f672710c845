"""Who may import whom, read from the sources; and importing the library changes nothing."""

import ast
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"pyro_vi": "pyro_vi", "models": "pyro_vi.models", "guides": "pyro_vi.guides"}
LIBRARY = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted(
    path for folder in ("examples", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
)
BUILDING_BLOCKS = tuple(
    f"pyro_vi.{name}"
    for name in ("augmentation", "checks", "diffusion", "families", "flows", "networks")
)
COMPOSITION_ROOT = ("cli.py", "__main__.py")
MOST_FLOORS = 12


def name_of(path: Path) -> str:
    """The dotted name of a file of the library."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGES[folder], *(part for part in rest if part != "__init__")))


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
    """What a file of the repository does that its folder may not."""
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


# The graph of imports


def graph_of(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports, by name; names that are none are left out."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        is_package = any(other.startswith(f"{module}.") for other in sources)
        package = module if is_package else module.rpartition(".")[0]
        graph[module] = set()
        for name in imports(source, package):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def unit_of(module: str) -> str:
    """The file or folder directly in pyro_vi/ that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def units_of(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The graph of files and folders directly in pyro_vi/."""
    units: dict[str, set[str]] = {}
    for module, imported in graph.items():
        mine = units.setdefault(unit_of(module), set())
        mine |= {unit_of(other) for other in imported} - {unit_of(module)}
    return units


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """Some modules that import one another in a circle; empty if there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        for other in () if module in done else sorted(graph[module]):
            if circle := visit(other, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in graph if (circle := visit(module, []))), [])


def floors_of(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """The floor of each module of a graph without circles: one above the highest that it needs."""

    @cache
    def floor(module: str) -> int:
        return 1 + max((floor(other) for other in graph[module]), default=0)

    return {module: floor(module) for module in graph}


def into_insides(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports of a file inside of another folder, past its `__init__.py`."""
    return [
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in sorted(imported)
        if other.count(".") > 1 and unit_of(other) != unit_of(module)
    ]


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in LIBRARY}
GRAPH = graph_of(SOURCES)


def test_the_files_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in LIBRARY} == set(PACKAGES)
    assert Path(__file__).resolve() in SCRIPTS and "pyro_vi.programs.state" in GRAPH


def test_no_files_import_one_another_in_a_circle() -> None:
    assert circle_in(GRAPH) == []


def test_folders_stand_on_floors() -> None:
    """No circle of folders either; and the sentence can be read off them, from below to above."""
    units = units_of(GRAPH)
    assert circle_in(units) == []
    floors = floors_of(units)
    assert max(floors.values()) <= MOST_FLOORS
    # `Fit.posterior` makes a posterior, and so a fit stands above it.
    order = ["data", "programs", "posterior", "inference", "comparison", "plots", "reporting"]
    stages = [floors[name] for name in order]
    assert stages == sorted(set(stages))


def test_a_folder_is_imported_as_a_whole() -> None:
    assert into_insides(GRAPH) == []


def test_circles_floors_and_insides_are_found() -> None:
    sources = {
        "pyro_vi": "from pyro_vi.a import f",
        "pyro_vi.a": "from pyro_vi import b",
        "pyro_vi.b": "from pyro_vi.c.d import g",
        "pyro_vi.c": "from .d import g",
        "pyro_vi.c.d": "def h():\n    import pyro_vi.e",
        "pyro_vi.e": "",
    }
    graph = graph_of(sources)
    assert circle_in(graph) == [] and floors_of(units_of(graph))["__init__"] == 5
    assert into_insides(graph) == ["pyro_vi.b imports pyro_vi.c.d"]
    back = graph_of({**sources, "pyro_vi.e": "if TYPE_CHECKING:\n    from pyro_vi.a import f"})
    assert set(circle_in(back)) == {"pyro_vi.a", "pyro_vi.b", "pyro_vi.c.d", "pyro_vi.e"}


# What single files may do


@pytest.mark.parametrize(
    "path", [*LIBRARY, *SCRIPTS], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_file_keeps_to_its_layer(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert violations(folder, path.name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("folder", "file", "source"),
    [
        ("pyro_vi", "fitting.py", "from pyro_vi.models import VAE"),
        ("pyro_vi", "fitting.py", "from pyro_vi import guides"),
        ("pyro_vi", "fitting.py", "from .guides.encoder import Encoder"),
        ("pyro_vi", "__init__.py", "import pyro_vi.models.vae"),
        ("pyro_vi", "judging.py", "def f():\n    from pyro_vi.models import VAE"),
        ("pyro_vi", "judging.py", "import zuko"),
        ("pyro_vi", "families.py", "from pyro.contrib.zuko import ZukoToPyro"),
        ("pyro_vi", "fitting.py", "print('step')"),
        ("models", "vae.py", "from pyro_vi.inference import fit"),
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


# Names, and what an import does


def shared_names(package: ModuleType) -> list[str]:
    """Public names of a package that hide a module of it: `pyro_vi.fit` can't be both."""
    modules = {path.stem for folder in package.__path__ for path in Path(folder).glob("*.py")}
    return [
        name
        for name in package.__all__
        if name in modules and not isinstance(getattr(package, name), ModuleType)
    ]


FOLDERS = sorted({name for name in GRAPH if any(other.startswith(f"{name}.") for other in GRAPH)})


@pytest.mark.parametrize("name", FOLDERS)
def test_no_module_shares_its_name_with_a_function(name: str) -> None:
    assert shared_names(importlib.import_module(name)) == []


def test_shared_name_is_found(tmp_path: Path) -> None:
    for name in ("fit.py", "data.py"):
        (tmp_path / name).touch()
    package = ModuleType("planted")
    package.__path__ = [str(tmp_path)]
    package.__all__ = ["data", "fit", "report"]  # type: ignore[attr-defined]
    package.data, package.fit, package.report = ModuleType("data"), len, len  # type: ignore
    assert shared_names(package) == ["fit"]


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


def test_importing_changes_no_global_state() -> None:
    assert import_effects([name for name in GRAPH if not name.endswith("__main__")]) == []


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
