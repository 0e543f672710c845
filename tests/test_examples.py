"""Each example, run as a reader would: what it promises to print and draw, and that it holds."""

import ast
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHORT = {
    "vae_families": ("--steps", "12"),
    "linear_gaussian": ("--steps", "600"),
    "plain_pyro_svi": ("--steps", "25"),
    "drop_in": ("--steps", "30"),
    "ddpm_gaussian": ("--steps", "120"),
    "ddpm_digits": ("--steps", "40"),
    "ddpm_fashion": (
        *("--data", "fashion", "--chain", "10", "--steps", "3", "--batch-size", "4"),
        *("--test-images", "8", "--quiet"),
    ),
    "noise_augmentation": ("--steps", "30", "--seeds", "1", "--sizes", "40", "80"),
    "loss_design": ("--steps", "40", "--seeds", "2", "--betas", "10", "1"),
    "eight_schools": ("--steps", "250", "--nuts", "100"),
    "regression_families": ("--steps", "300"),
}

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


def stops(
    name: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> int:
    """The exit status of an example that stops at its arguments; here, since nothing runs yet."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert list(folder.iterdir()) == []
    return int(stopped.value.code or 0)


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
        if "fashion" in SHORT[name]:
            noise_in_place_of_fashion_mnist(folder / "fashion")
        ran = run(name, folder, *SHORT[name], "--out", str(out))
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr == ""
        assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        picture = imread(out)
        assert min(picture.shape[:2]) > 300
        assert picture.min() < 0.1 and picture.max() > 0.9  # something is drawn on the white
        # and nothing else was written
        assert {path.name for path in folder.iterdir()} - {"fashion"} == {out.parent.name}
        assert ran.stdout.rstrip().endswith(str(out))
        outputs[name] = ran.stdout
    return outputs[name]


def noise_in_place_of_fashion_mnist(folder: Path) -> None:
    folder.mkdir()
    for part, count in (("train", 270), ("t10k", 8)):
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        pixels = np.random.default_rng(0).integers(0, 256, count * 784, dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("printed", [name], indirect=True, ids=[name])


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(NUMBER, text)]


def tables(text: str) -> list[dict[str, list[str]]]:
    """The comparisons in an output: the cells of each line by its label, "" for the header."""
    return [table(block) for block in re.split(r"^(?=\d\. )", text, flags=re.MULTILINE)[1:]]


def table(text: str) -> dict[str, list[str]]:
    """The same of one comparison, from the third line of the text."""
    header, *lines = text.splitlines()[2:]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[: lines.index("")]]
    return {"": re.split(r"\s{2,}", header.strip()), **{c[0]: c[1:] for c in cells}}


def row(table: dict[str, list[str]], label: str) -> list[float]:
    """The numbers of the line with this label, without their errors."""
    return [numbers(cell)[0] for cell in table[label]]


@pytest.mark.parametrize("name", SHORT)
def test_help_says_what_can_be_chosen(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert stops(name, ("--help",), monkeypatch, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "--steps" in printed and "--out" in printed


@pytest.mark.parametrize("name", SHORT)
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
        bits = row(table, "evidence (bits per dimension)")
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


GAP = "gap: best evidence - ELBO"
KHAT = "k-hat (trusted to 0.70)"


@of("eight_schools")
def test_eight_schools_is_cured_by_the_other_parametrisation(printed: str) -> None:
    centred, noncentred = tables(printed)
    for found in (centred, noncentred):
        assert found[""] == ["mean-field", "full covariance", "low-rank", "flow", "reference"]
        assert all(-40 < bound < -30 for bound in row(found, "ELBO (nats)"))
        assert len(row(found, GAP)) == 4
        assert len(row(found, "sd error")) == 5  # NUTS has its own noise
    for gaussian in range(3):
        assert row(centred, GAP)[gaussian] > row(noncentred, GAP)[gaussian] + 1
        assert row(centred, KHAT)[gaussian] > 0.7
    assert row(noncentred, KHAT)[0] < 0.7
    assert min(row(centred, GAP)) == row(centred, GAP)[3]  # the flow bends


@of("eight_schools")
def test_eight_schools_shows_what_a_posterior_is_for(printed: str) -> None:
    _, _, rest = printed.partition("corrected: mean ± sd\n")
    assert [line[:10].strip() for line in rest.splitlines()[2:5]] == ["mu", "log tau", "theta, A"]
    guide, _, corrected, _, nuts, _ = numbers(rest.splitlines()[3].replace("log tau", ""))
    assert -1 < nuts < corrected + 1 and abs(guide) < 3
    (left_out,) = (line for line in printed.splitlines() if line.startswith("Each school left out"))
    elpd, se = numbers(left_out)[:2]
    assert -35 < elpd < -28 and 0 < se < 3  # ArviZ gives -30.8 for the posterior of NUTS
    (agreed,) = re.findall(rf"largest R-hat is ({NUMBER})", printed)
    assert 0.99 < float(agreed) < 1.05
    assert all(f"theta[{school}]" in rest for school in "ABCDEFGH")


@of("regression_families")
def test_regression_families_meet_the_exact_answers(printed: str) -> None:
    (evidence,) = re.findall(rf"^exact log evidence of 342 patients: ({NUMBER})", printed, re.M)
    found = table(printed)
    families = ["mean-field", "low-rank", "full covariance", "by hand", "Laplace", "point"]
    assert found[""] == [*families, "reference"]
    bounds, gaps = row(found, "ELBO (nats)"), row(found, GAP)
    assert len(bounds) == len(gaps) == len(row(found, KHAT)) == 5  # a point has no density
    assert all(bound < float(evidence) + 0.05 for bound in bounds)
    assert row(found, "evidence (nats)")[4] == pytest.approx(float(evidence), abs=0.2)
    # The best that independent normals can do is four nats behind, and k-hat knows.
    assert gaps[0] > 3 and row(found, KHAT)[0] > 0.7
    assert gaps[4] < 0.3 and row(found, KHAT)[4] < 0.7
    predictive = row(found, "log predictive (nats)")
    assert len(predictive) == 6 and max(predictive) - min(predictive) < 0.1


@of("regression_families")
def test_regression_families_say_how_sure_they_are(printed: str) -> None:
    sds = {}
    for name in ("mean-field", "Laplace", "point", "exact"):
        (line,) = re.findall(rf"^{name} +(-?[\d.]+ ± .+)", printed, re.M)
        _, sds[name], *_ = map(float, re.findall(r"-?[\d.]+", line))
    assert sds["point"] == 0
    assert sds["mean-field"] < 0.3 * sds["exact"]
    assert sds["Laplace"] == pytest.approx(sds["exact"], rel=0.15)
    inside = re.findall(r"^  [\w -]+? +(\d+), mean width", printed, re.M)
    assert len(inside) == 6 and all(75 < int(share) <= 99 for share in inside)


@of("ddpm_gaussian")
def test_ddpm_gaussian_meets_the_closed_forms(printed: str) -> None:
    """Two steps are trained by then; sixteen are not, but no bound may be above the exact one."""
    rows = [numbers(line) for line in printed.splitlines() if re.match(r"\s+\d+ ", line)]
    assert [int(row[0]) for row in rows] == [2, 4, 16]
    for steps, *cells in rows:
        found, errors, exact = cells[::3], cells[1::3], cells[2::3]
        assert len(found) == 3
        assert exact[2] < exact[1] < exact[0]
        for loss, error, known in zip(found, errors, exact, strict=True):
            assert loss > known - 4.5 * error
            assert steps > 2 or loss < known + 0.05 + 4.5 * error


@of("ddpm_digits")
def test_ddpm_digits_says_both_in_bits(printed: str) -> None:
    label = r"^(?:ELBO|evidence) \(bits per dimension\)"
    elbos, evidence = (numbers(line) for line in re.findall(f"{label} (.*)", printed, re.M))
    assert all(1.8 < bits < 6 for bits in (*elbos, *evidence))
    assert len(elbos) == 2 and len(evidence) == 1 and evidence[0] < elbos[1]
    assert re.search(r"^StepBound\(ELBO -\d", printed, re.M)


@of("ddpm_fashion")
def test_ddpm_fashion_tells_its_curve_and_its_bound(printed: str) -> None:
    """On noise, of which no bound can be below 8 bits."""
    curve = [numbers(line) for line in printed.splitlines() if re.match(r" +\d+ +\d", line)]
    assert [step for step, _ in curve] == [1, 2, 3] and all(8 < bits < 20 for _, bits in curve)
    bits, error = numbers(re.findall(r"8 test images: (.+) bits", printed)[0])
    assert 0 < error < bits < 20 and bits + 4 * error > 8  # of eight images and few steps


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sizes", "40", "5000"), r"--sizes from 10 to the 1437 images, got \[5000\]"),
        (("--seeds", "0"), "--steps and --seeds of at least 1"),
    ],
)
def test_noise_augmentation_refuses(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert stops("noise_augmentation", arguments, monkeypatch, tmp_path) == 2
    assert re.search(words, capsys.readouterr().err)


@of("noise_augmentation")
def test_noise_augmentation_says_what_it_gains(printed: str) -> None:
    assert printed.startswith("log p(lower half | upper half) of 360 test images, nats per image")
    rows = [numbers(line) for line in printed.splitlines() if re.match(r" +\d+ +-", line)]
    assert [int(row[0]) for row in rows] == [40, 80]
    for _, none, noisy, back, *gains in rows:
        assert all(-32 * math.log(17) < density < -32 for density in (none, noisy, back))
        assert gains == pytest.approx([noisy - none, back - none], abs=0.011)


@of("loss_design")
def test_loss_design_tells_rate_from_distortion(printed: str) -> None:
    rows = [numbers(line) for line in printed.splitlines() if re.match(r" +[\d.]+ +\d", line)]
    assert [row[0] for row in rows] == [1, 10]
    assert rows[0][1] > rows[1][1] >= 0  # the heavier the KL, the less of it
    for _, rate, _, distortion, _, elbo, _, active, _ in rows:
        assert elbo == pytest.approx(-(rate + distortion), abs=0.016)  # three roundings
        assert 32 < distortion < 64 * math.log(17) and 0 <= active <= 6
    (page,) = re.findall(r"with the curve of all seeds: (.+\.html)", printed)
    assert "Rate and distortion</h2>" in Path(page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "--steps: expected at least 1, got 0"),
        (("--seeds", "-1"), "--seeds: expected at least 1, got -1"),
        (("--betas", "1", "nan"), "--betas: expected a finite KL weight of at least 0, got nan"),
        (("--betas", "1", "-2"), "--betas: expected a finite KL weight of at least 0, got -2.0"),
        (("--betas", "1", "1.0000001"), "--betas: expected weights that differ in six digits"),
        (("--betas", "2"), "--betas: expected 1, the ELBO itself, among the weights, got [2.0]"),
        (("--out", "figure"), "--out: expected the name of an image file, such as x.png"),
        (("--out", "page.html"), "--out: expected the name of an image file, such as x.png"),
    ],
)
def test_loss_design_refuses_before_training(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert stops("loss_design", arguments, monkeypatch, tmp_path) == 2
    assert message in capsys.readouterr().err


@of("plain_pyro_svi")
def test_plain_pyro_svi_trains(printed: str) -> None:
    pattern = rf"epoch +(\d+): bound +({NUMBER}) on training, +({NUMBER}) on test images"
    epochs = [tuple(map(float, found)) for found in re.findall(pattern, printed)]
    assert [epoch for epoch, _, _ in epochs] == [1, 3]  # 25 steps are 12 + 12 + 1
    (_, train, test), (_, later_train, later_test) = epochs
    # All grey levels alike would give -64 log 17 nats, and no bound on discrete data is above 0.
    assert -64 * math.log(17) < test < 0
    assert train < later_train < 0 and test < later_test < 0


@of("drop_in")
def test_drop_in_is_the_same_run(printed: str) -> None:
    pattern = rf"steps in +({NUMBER}) s, the last ones +({NUMBER}) ms each; ELBO ({NUMBER})"
    runs = [tuple(map(float, found)) for found in re.findall(pattern, printed)]
    (_, _, bound), (_, _, ours), (_, _, compiled) = runs
    assert ours == bound and compiled == pytest.approx(bound, abs=0.011)


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
        "from pyro_vi.inference.fitting import fit",
        "def f():\n    import pyro_vi.inference.svi",
    ],
)
def test_import_of_the_engine_is_found(source: str) -> None:
    assert len(from_the_engine(source)) == 1


def test_other_imports_are_let_through() -> None:
    source = "import pyro\nfrom pyro.infer import SVI\nfrom pyro_vi import data\n"
    assert from_the_engine(source + "from pyro_vi.models import VAE") == []
