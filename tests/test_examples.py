"""Each example, run as a reader would: what it promises to print and draw, and that it holds."""

import ast
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.image import imread

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS = {"vae_families": 12, "linear_gaussian": 600, "plain_pyro_svi": 25}

NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"


def run(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An example in a new interpreter, in which every warning is an error."""
    return subprocess.run(
        [
            *(sys.executable, "-W", "error"),
            *("-W", "ignore::FutureWarning:arviz"),  # once a day, at its import
            *(EXAMPLES / f"{name}.py", *arguments),
        ],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        cwd=folder,
        timeout=600,
    )


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What each example has printed, filled as the tests run."""
    return {}


@pytest.fixture
def printed(
    request: pytest.FixtureRequest,
    outputs: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """What the example printed; it ran without an error and drew a picture where it was told to."""
    name: str = request.param
    if name not in outputs:
        folder = tmp_path_factory.mktemp(name)
        out = folder / "new folder" / "figure.png"
        ran = run(name, folder, "--steps", str(STEPS[name]), "--out", str(out))
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr == ""
        assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        picture = imread(out)
        assert min(picture.shape[:2]) > 300
        assert picture.min() < 0.1 and picture.max() > 0.9  # something is drawn on the white
        assert list(folder.iterdir()) == [out.parent]  # and nothing else was written
        assert ran.stdout.rstrip().endswith(str(out))
        outputs[name] = ran.stdout
    return outputs[name]


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("printed", [name], indirect=True, ids=[name])


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(NUMBER, text)]


def tables(text: str) -> list[dict[str, list[str]]]:
    """The comparisons in an output: the cells of each line by its label, "" for the header."""
    found = []
    for block in re.split(r"^(?=\d\. )", text, flags=re.MULTILINE)[1:]:
        header, *lines = block.splitlines()[2:]
        cells = [re.split(r"\s{2,}", line.strip()) for line in lines[: lines.index("")]]
        found.append({"": re.split(r"\s{2,}", header.strip()), **{c[0]: c[1:] for c in cells}})
    return found


def row(table: dict[str, list[str]], label: str) -> list[float]:
    """The numbers of the line with this label, without their errors."""
    return [numbers(cell)[0] for cell in table[label]]


@pytest.mark.parametrize("name", STEPS)
def test_help_says_what_can_be_chosen(name: str, tmp_path: Path) -> None:
    ran = run(name, tmp_path, "--help")
    assert ran.returncode == 0, ran.stderr
    assert "--steps" in ran.stdout and "--out" in ran.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", STEPS)
def test_docstring_says_how_to_run_it(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    assert docstring is not None and f"python examples/{name}.py" in docstring


@of("vae_families")
def test_vae_families_prints_two_tables_of_four_families(printed: str) -> None:
    joint, frozen = tables(printed)
    for table in (joint, frozen):
        assert table[""] == ["mean-field", "full covariance", "low-rank", "flow"]
        elbo, evidence = row(table, "test ELBO (nats)"), row(table, "evidence (nats)")
        own = table is joint  # one evidence serves all families of a frozen model
        gap = row(table, "gap: evidence - ELBO" if own else "gap: best evidence - ELBO")
        bits = row(table, "bits per dimension")
        rounding = 0.0051
        for i in range(4):
            # Jensen's inequality holds for the very draws: no Monte Carlo error here.
            assert elbo[i] <= evidence[i] + 2 * rounding
            closest = evidence[i] if own else max(evidence)
            assert gap[i] == pytest.approx(closest - elbo[i], abs=3 * rounding)
            expected = -evidence[i] / (64 * math.log(2))
            assert bits[i] == pytest.approx(expected, abs=0.0006 + rounding / 44)
        (label,) = (label for label in table if label.startswith("k-hat above"))
        assert all(0 <= share <= 100 for share in row(table, label))
    trained = zip(row(frozen, "parameters"), row(joint, "parameters"), strict=True)
    assert all(0 < guide < both for guide, both in trained)


@of("vae_families")
def test_vae_families_freezes_the_best_model(printed: str) -> None:
    joint, _ = tables(printed)
    named = re.search(r"the model that was trained with (.+), frozen", printed)
    assert named is not None
    elbo = row(joint, "test ELBO (nats)")
    best = joint[""].index(named[1])
    assert elbo[best] == max(elbo)


@of("linear_gaussian")
def test_linear_gaussian_meets_the_exact_answers(printed: str) -> None:
    (exact,) = (
        numbers(line)[-1] for line in printed.splitlines() if line.startswith("exact log evidence")
    )
    lines = {}
    for family in ("mean-field", "full covariance", "low-rank"):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{family}  "))
        lines[family] = re.split(r"\s{2,}", line)[1:]
    gaps, errors = {}, {}
    for family, (bound, gap, _, estimate, khat, share) in lines.items():
        elbo, error = numbers(bound)
        gaps[family], errors[family] = float(gap), 4 * error + 1e-4
        assert float(gap) == pytest.approx(exact - elbo, abs=2e-4)
        assert elbo <= exact + errors[family]
        assert elbo <= numbers(estimate)[0] + 1e-4  # Jensen's inequality, for the same draws
        assert math.isfinite(float(khat)) and 0 <= numbers(share)[0] <= 100
    # No mean-field guide comes closer than the closed form, however long it is trained.
    floor = float(lines["mean-field"][2])
    assert floor > 0.5
    assert gaps["mean-field"] >= floor - errors["mean-field"]
    assert gaps["mean-field"] == pytest.approx(floor, rel=0.02)
    assert float(lines["full covariance"][2]) == 0
    assert -errors["full covariance"] <= gaps["full covariance"] < 0.01
    assert gaps["full covariance"] < gaps["low-rank"] < gaps["mean-field"]


@of("plain_pyro_svi")
def test_plain_pyro_svi_trains(printed: str) -> None:
    pattern = rf"epoch +(\d+): bound +({NUMBER}) on training, +({NUMBER}) on test images"
    epochs = [tuple(map(float, found)) for found in re.findall(pattern, printed)]
    assert [epoch for epoch, _, _ in epochs] == [1, 3]  # 25 steps are 12 + 12 + 1
    (_, train, test), (_, later_train, later_test) = epochs
    # All grey levels alike would give -64 log 17 nats, and no bound on discrete data is above 0.
    assert -64 * math.log(17) < test < 0
    assert train < later_train < 0 and test < later_test < 0


def from_the_engine(source: str) -> list[str]:
    """What a script imports of the library beyond its models, guides, families and data."""

    def imported() -> Iterator[str]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    allowed = ("models", "guides", "families", "data")
    parts = {name: name.split(".") for name in imported()}
    return [
        name
        for name, (package, *rest) in parts.items()
        if package == "pyro_vi" and (not rest or rest[0] not in allowed)
    ]


def test_plain_pyro_svi_uses_nothing_of_the_engine() -> None:
    source = (EXAMPLES / "plain_pyro_svi.py").read_text(encoding="utf-8")
    assert from_the_engine(source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pyro_vi",
        "from pyro_vi import SVI",
        "from pyro_vi import plots",
        "from pyro_vi.fitting import fit",
        "def f():\n    import pyro_vi.svi",
    ],
)
def test_import_of_the_engine_is_found(source: str) -> None:
    assert len(from_the_engine(source)) == 1


def test_other_imports_are_let_through() -> None:
    source = "import pyro\nfrom pyro.infer import SVI\nfrom pyro_vi import data\n"
    assert from_the_engine(source + "from pyro_vi.models import VAE") == []
