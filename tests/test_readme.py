"""The Python of the README and of the documents runs as it stands, with fewer steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README, DIFFUSION = ROOT / "README.md", ROOT / "docs" / "diffusion_and_prediction.md"


def blocks(path: Path = README) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, loading, *_ = blocks()
    short = code.replace('"steps": 1_500', '"steps": 5, "progress": False')
    short = short.replace("num_samples=1_000", "num_samples=50")
    assert short.count("5, ") and short != code
    short = short.replace("digits, **options)", "digits, num_samples=50, **options)")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(short, str(README), "exec"), names)
    own = loading.replace("runs/digits/flow.pt", "fit.pt").replace("Flow(6", "FullCovariance(6")
    saved = names["fitted"]
    exec(compile(own, str(README), "exec"), names)
    assert bool((names["fitted"].losses == saved.losses).all())
    assert names["images"].shape == (64, 1, 8, 8)
    assert (tmp_path / "fit.pt").stat().st_size > 100_000
    shown = capsys.readouterr().out
    for family in ("MeanField", "FullCovariance", "LowRank", "Flow"):
        assert family in shown


@pytest.mark.filterwarnings("ignore:the restarts disagree", "ignore:k-hat is")
def test_the_classical_model_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = blocks()[2]
    short = code.replace("steps=2_000", "steps=300, progress=False").replace("lr=0.01", "lr=0.05")
    assert short.count("steps=300") == 1 and "lr=0.05" in short
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(short, str(README), "exec"), names)
    assert names["corrected"]["theta"].shape == (1_000, 8)
    assert names["idata"].posterior["theta"].sizes == {"chain": 2, "draw": 1_000, "data": 8}
    assert {path.name for path in tmp_path.iterdir()} == {"schools.nc", "schools.html"}
    shown = capsys.readouterr().out
    assert "R-hat across restarts" in shown and "full covariance" in shown


def test_the_diffusion_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(DIFFUSION)
    short = code.replace("steps=1_500", "steps=5, progress=False").replace("digits.test)", "X)")
    assert "steps=5" in short
    short = short.replace("bits_per_dim)", "bits_per_dim.value)").replace("X)", "digits.test[:20])")
    names: dict[str, Any] = {}
    exec(compile(short, str(README), "exec"), names)
    assert names["images"].shape == (64, 1, 8, 8)
    assert 2 < float(capsys.readouterr().out) < 100


def test_every_file_that_the_readme_names_exists() -> None:
    text = README.read_text(encoding="utf-8")
    named = re.findall(r"\]\(([\w/.]+)\)|`(examples/\w+\.py)`", text)
    assert len(named) >= 7
    for pair in named:
        assert (README.parent / (pair[0] or pair[1])).is_file(), pair
