"""The wheel holds the three folders under pyro_vi, and nothing else."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Where each folder of the repository stands in an installation.
FOLDERS = {"pyro_vi": "pyro_vi", "models": "pyro_vi/models", "guides": "pyro_vi/guides"}


def build_wheel(tree: Path, out: Path) -> Path:
    """The wheel of a source tree, built offline."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def sources(tree: Path) -> set[str]:
    """The names that the Python files of a source tree should have in its wheel."""
    return {
        f"{target}/{path.relative_to(tree / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (tree / folder).rglob("*.py")
    }


def subfolders(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel, built from a copy so that no build folder is left in the root."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in (*FOLDERS, "examples", "benchmarks", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    wheel = build_wheel(tree, tmp_path_factory.mktemp("wheel"))
    out = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out)
    return out


def test_wheel_holds_the_folders_and_nothing_else(unpacked: Path) -> None:
    files = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    (info,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
    packed = {name for name in files if not name.startswith(f"{info}/")}
    data = {"py.typed", "reporting/page.html.jinja", "compiling/special.h", "compiling/matrices.h"}
    assert packed == sources(ROOT) | {f"pyro_vi/{name}" for name in data}
    assert f"{info}/licenses/LICENSE" in files


def test_entry_point(unpacked: Path) -> None:
    (path,) = unpacked.glob("*.dist-info/entry_points.txt")
    entry_points = configparser.ConfigParser()
    entry_points.read(path)
    assert dict(entry_points["console_scripts"]) == {"pyro-vi": "pyro_vi.cli:main"}


def test_unpacked_wheel_imports(unpacked: Path, tmp_path: Path) -> None:
    script = (
        "import pyro_vi, pyro_vi.models, pyro_vi.guides\n"
        "for module in (pyro_vi, pyro_vi.models, pyro_vi.guides): print(module.__file__)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
    )
    assert ran.returncode == 0, ran.stderr
    expected = [str(unpacked / target / "__init__.py") for target in FOLDERS.values()]
    assert ran.stdout.split() == expected


@pytest.mark.parametrize("folder", ["models", "guides"])
def test_folder_is_flat(folder: str) -> None:
    # A sub-folder would import in an editable install and be missing from the wheel.
    assert subfolders(ROOT / folder) == []


def test_subfolder_is_found(tmp_path: Path) -> None:
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    nested = tmp_path / "models" / "nested"
    nested.mkdir()
    (nested / "deep.py").touch()
    assert subfolders(tmp_path / "models") == ["nested"]
    assert sources(tmp_path) == {"pyro_vi/models/nested/deep.py"}
