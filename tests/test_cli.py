"""The command line: what it writes is what it prints, and wrong input costs no training."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import pyro_vi
from pyro_vi import cli, files, plots
from pyro_vi.data import npz
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.guides import Encoder
from pyro_vi.inference import Fit, fitting
from pyro_vi.models import VAE, DiscretizedLogistic
from pyro_vi.posterior import arviz

torch.set_num_threads(1)

TINY = ["--steps", "3", "--draws", "50", "--test-images", "20", "--latent-dim", "2", "--quiet"]
PICTURES = {"losses", "reconstructions", "samples", "posteriors", "khat"}


def write_npz(path: Path, levels: int | None = 4, shape: tuple[int, ...] = (4, 4)) -> Path:
    generator = np.random.default_rng(0)
    if levels is None:
        arrays = {name: generator.random((60, *shape)) for name in ("train", "test")}
        np.savez(path, **arrays)
    else:
        arrays = {
            name: generator.integers(0, levels, (60, *shape)).astype(np.uint8)
            for name in ("train", "test")
        }
        np.savez(path, levels=levels, **arrays)
    return path


@dataclass
class Run:
    """A finished `pyro-vi compare`."""

    folder: Path
    data: Path
    printed: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    data = write_npz(folder / "noise.npz")
    printed = io.StringIO()
    arguments = ["compare", "--data", str(data), "--out", str(folder / "deep" / "out"), *TINY]
    arguments += ["--families", "mean-field,full-covariance", "--device", "cpu"]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()) as errors:
        assert cli.main(arguments) == 0
    assert errors.getvalue() == ""
    return Run(folder / "deep" / "out", data, printed.getvalue())


def rows(path: Path) -> dict[str, dict[str, float]]:
    with path.open(newline="") as file:
        return {
            row.pop("family"): {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        }


def listing(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Everything below a folder, with its time and content."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in folder.rglob("*")
    }


def is_picture(path: Path) -> bool:
    """A PNG file with something on it."""
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and float(imread(path).std()) > 0.01


# What it writes


def test_everything_is_there_and_nothing_else(run: Run) -> None:
    found = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*")}
    assert found == {
        *(f"{name}.png" for name in PICTURES),
        *("comparison.csv", "inference.csv", "comparison.txt", "inference", "report.html"),
        *("mean-field.pt", "full-covariance.pt"),
        *("inference/mean-field.pt", "inference/full-covariance.pt"),
        *("inference/mean-field.nc", "inference/full-covariance.nc"),
    }
    for name in PICTURES:
        assert is_picture(run.folder / f"{name}.png")
    assert {path.name for path in run.folder.parent.iterdir()} == {"out"}  # no litter beside it
    assert run.folder.stat().st_mode & 0o777 == run.folder.parent.stat().st_mode & 0o777


def test_the_tables_on_paper_are_those_in_the_files(run: Run) -> None:
    text = (run.folder / "comparison.txt").read_text(encoding="utf-8")
    blocks = (
        re.split(r"\n\n(?=Inference alone)", run.printed),
        re.split(r"\n\n(?=Inference alone)", text),
    )
    for name, block, written in zip(("comparison", "inference"), *blocks, strict=True):
        table = rows(run.folder / f"{name}.csv")
        assert list(table) == ["mean-field", "full-covariance"]
        lines = {
            found[1]: re.split(r"\s{2,}", found[2].strip())
            for line in block.splitlines()
            if (found := re.match(r"(\w.*?)\s{2,}(.*)", line))
        }
        values = list(table.values())
        assert lines["test ELBO (nats)"] == [
            f"{row['elbo']:.2f} ± {row['elbo_se']:.2f}" for row in values
        ]
        assert lines["evidence (nats)"] == [
            f"{row['evidence']:.2f} ± {row['evidence_se']:.2f}" for row in values
        ]
        for what in ("elbo", "evidence"):
            shown = [f"{row[f'{what}_bits']:.3f}" for row in values]
            label = what if what == "evidence" else "ELBO"
            assert lines[f"{label} (bits per dimension)"] == shown
        assert lines["k-hat, median"] == [f"{row['khat_median']:.2f}" for row in values]
        assert lines["parameters"] == [f"{int(row['parameters']):,}" for row in values]
        assert lines["active units"] == [f"{int(row['active_units'])} of 2" for row in values]
        for line in block.splitlines()[-10:]:
            assert line in written or "Tables, plots and fits" in line or "report.html" in line
        best = max(row["evidence"] for row in values)
        for row in values:
            evidence = row["evidence"] if name == "comparison" else best
            assert row["gap"] == pytest.approx(evidence - row["elbo"], abs=1e-9)
            for what in ("elbo", "evidence"):
                bits = -row[what] / (16 * np.log(2))
                assert row[f"{what}_bits"] == pytest.approx(bits, rel=1e-12)


def test_the_report_holds_the_numbers_of_both_tables(run: Run) -> None:
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    cell = r'data-family="(.+?)" data-column="(.+?)" data-value="(.+?)"'
    found = [(family, name, float(value)) for family, name, value in re.findall(cell, page)]
    tables = [rows(run.folder / f"{name}.csv") for name in ("comparison", "inference")]
    elbos = [(family, row["elbo"]) for table in tables for family, row in table.items()]
    assert [(family, value) for family, name, value in found if name == "elbo"] == elbos
    numbers = {(f, n, v) for table in tables for f, row in table.items() for n, v in row.items()}
    assert numbers >= set(found)
    assert f"All of it on one page: {run.folder / 'report.html'}\n" in run.printed
    best = max(tables[0], key=lambda family: tables[0][family]["elbo"])
    assert f">Inference alone, with the model of {best} frozen</h2>" in page


@pytest.mark.parametrize(
    ("options", "size"), [([], 60), (["--batch-size", "60"], 60), (["--batch-size", "7"], 7)]
)
def test_a_step_has_as_many_images_as_asked_for(
    options: list[str], size: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default of 128 adapts to the 60 images that there are."""

    def stop(*args: Any, batch_size: int, **kwargs: Any) -> None:
        assert batch_size == size
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "fit", stop)
    arguments = ["compare", "--data", str(run.data), "--out", str(tmp_path / "out"), *TINY]
    assert cli.main([*arguments, *options]) == 130


def test_the_report_can_be_left_out(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [*TINY, "--steps", "1", "--families", "mean-field", "--no-report"]
    assert cli.main(["compare", "--data", str(run.data), "--out", str(out), *options]) == 0
    assert (out / "khat.png").exists() and not (out / "report.html").exists()


@pytest.mark.parametrize("family", ["mean-field", "full-covariance"])
def test_the_posteriors_are_those_of_the_frozen_model(run: Run, family: str) -> None:
    tree = arviz.load(run.folder / "inference" / f"{family}.nc")
    row = rows(run.folder / "inference.csv")[family]
    assert dict(tree["sample_stats"].sizes) == {"chain": 1, "draw": 50, "data": 20}
    assert float(tree["sample_stats"]["log_weight"].mean()) == pytest.approx(row["elbo"], abs=1e-9)
    assert float(tree["fit"]["khat"].median()) == row["khat_median"]


@pytest.mark.parametrize("family", ["mean-field", "full-covariance"])
def test_the_fits_that_were_saved_are_those_in_the_tables(run: Run, family: str) -> None:
    kind = {"mean-field": MeanField, "full-covariance": FullCovariance}[family]
    test = npz(run.data).test[:20]
    for folder, table in (
        (run.folder, "comparison.csv"),
        (run.folder / "inference", "inference.csv"),
    ):
        model = VAE((1, 4, 4), 2, likelihood=DiscretizedLogistic(4))
        fitted = Fit.load(folder / f"{family}.pt", model, Encoder((1, 4, 4), kind(2, 128)))
        assert len(fitted.losses) == 3
        posterior = fitted.posterior(test, 50, seed=0)
        row = rows(run.folder / table)[family]
        assert row["elbo"] == pytest.approx(posterior.elbo().value.mean(), abs=1e-4)
        assert row["khat_median"] == pytest.approx(np.median(posterior.khat()), abs=1e-3)


def test_inference_alone_is_with_the_best_model(run: Run) -> None:
    table = rows(run.folder / "comparison.csv")
    best = max(table, key=lambda name: table[name]["elbo"])
    assert f"Inference alone, with the model of {best} frozen:" in run.printed
    expected = files.load(run.folder / f"{best}.pt")["tensors"]
    for name in table:
        found = files.load(run.folder / "inference" / f"{name}.pt")["tensors"]
        for key in (key for key in expected if key.startswith("model.")):
            assert torch.equal(found[key], expected[key])
        assert found.keys() - {key for key in found if key.startswith("model.")}


def test_digits_with_every_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits"
    options = [*TINY, "--steps", "1", "--test-images", "5", "--device", "cpu"]
    assert cli.main(["compare", "--out", str(out), *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith(
        "digits: 1,437 training images, 5 test images, shape (1, 8, 8);"
        " discretized-logistic likelihood, 2 latent dimensions, on cpu\n"
    )
    families = ["mean-field", "full-covariance", "low-rank", "flow"]
    assert list(rows(out / "comparison.csv")) == families
    for name in families:
        recipe = files.load(out / f"{name}.pt")["recipe"]
        assert recipe["family"] == name and recipe["levels"] == 17
    picture = tmp_path / "new" / "flow.png"
    assert cli.main(["sample", str(out / "flow.pt"), "--num", "3", "--out", str(picture)]) == 0
    assert is_picture(picture)


DDPM_TINY = [*TINY, "--schedules", "learned,cosine", "--chain", "4"]


def test_diffusions_stand_beside_the_families(run: Run, tmp_path: Path) -> None:
    out, families = tmp_path / "out", ["mean-field", "ddpm-learned", "ddpm-cosine"]
    options = [*DDPM_TINY, "--models", "vae,ddpm", "--families", "mean-field", "--seed", "3"]
    assert cli.main(["compare", "--data", str(run.data), "--out", str(out), *options]) == 0
    table = rows(out / "comparison.csv")
    assert list(table) == families and list(rows(out / "inference.csv")) == ["mean-field"]
    for name in families:
        assert table[name]["elbo_bits"] == pytest.approx(-table[name]["elbo"] / 16 / np.log(2))
        assert ("khat_bad" in table[name]) == (name == "mean-field")
    pictures = PICTURES | {"strips", "bits", "schedules"}
    assert {path.stem for path in out.glob("*.png")} == pictures
    assert all(is_picture(out / f"{name}.png") for name in pictures)
    page = (out / "report.html").read_text(encoding="utf-8")
    for heading in ("From noise to images", "The bound by step", "Noise schedules"):
        assert f">{heading}</h3>" in page
    recipe = files.load(out / "ddpm-cosine.pt")["recipe"]
    assert (recipe["chain"], recipe["levels"], recipe["schedule"]) == (4, 4, "cosine")


def test_diffusions_alone_have_one_table_and_are_sampled(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out", tmp_path / "samples.png"
    options = [*DDPM_TINY, "--models", "ddpm", "--overwrite"]
    arguments = ["compare", "--data", str(run.data), "--out", str(out), *options]
    assert cli.main(arguments) == 0 and cli.main(arguments) == 0  # its folder is replaced
    assert {path.name for path in out.iterdir()} == {
        *("comparison.csv", "comparison.txt", "report.html"),
        *("ddpm-learned.pt", "ddpm-cosine.pt"),
        *("losses.png", "samples.png", "strips.png", "bits.png", "schedules.png"),
    }
    assert "Inference alone" not in (out / "comparison.txt").read_text(encoding="utf-8")
    table = rows(out / "comparison.csv")
    best = max(table, key=lambda name: table[name]["elbo"])
    capsys.readouterr()
    assert cli.main(["sample", str(out), "--num", "3", "--out", str(picture)]) == 0
    assert capsys.readouterr().out == f"3 samples of {out / best}.pt: {picture}\n"
    assert is_picture(picture)
    first = picture.read_bytes()
    named = ["sample", str(out / f"{best}.pt"), "--num", "3", "--out", str(picture)]
    assert cli.main([*named, "--overwrite"]) == 0 and picture.read_bytes() == first
    assert "has no comparison.csv" in refused(["sample", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("levels", "options", "expected"),
    [(None, [], 0), (4, ["--binarize"], 2), (4, ["--likelihood", "gaussian"], 0), (4, [], 4)],
)
def test_a_diffusion_observes_what_the_vae_does(
    levels: int | None, options: list[str], expected: int, tmp_path: Path
) -> None:
    data, out = write_npz(tmp_path / "images.npz", levels), tmp_path / "out"
    tiny = [*TINY, "--models", "vae,ddpm", "--families", "mean-field", "--chain", "2"]
    arguments = ["compare", "--data", str(data), "--out", str(out), *tiny, "--no-report", *options]
    assert cli.main(arguments) == 0
    assert files.load(out / "ddpm-learned.pt")["recipe"]["levels"] == expected
    bits = [row.get("elbo_bits") for row in rows(out / "comparison.csv").values()]
    assert [bit is None for bit in bits] == [expected == 0] * 2


def test_the_seed_gives_the_same_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    options = ["--families", "mean-field,full-covariance", "--device", "cpu"]
    arguments = ["compare", "--data", str(run.data), "--out", str(out), *TINY, *options]
    assert cli.main(arguments) == 0
    for name in ("comparison.csv", "inference.csv"):
        first, second = rows(run.folder / name), rows(out / name)
        for row in (*first.values(), *second.values()):
            assert row.pop("seconds_per_step") > 0
        assert first == second


def test_binarized_images_under_bernoulli(tmp_path: Path) -> None:
    data, out = write_npz(tmp_path / "grey.npz"), tmp_path / "out"
    options = [*TINY, "--binarize", "--likelihood", "bernoulli", "--families", "mean-field"]
    assert cli.main(["compare", "--data", str(data), "--out", str(out), *options]) == 0
    assert files.load(out / "mean-field.pt")["recipe"]["likelihood"] == "bernoulli"
    template = files.load(out / "mean-field.pt")["template"]
    assert set(template.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("levels", "options", "expected"),
    [
        (None, [], "gaussian"),
        (2, [], "discretized-logistic"),
        (4, ["--binarize"], "bernoulli"),
        (2, ["--likelihood", "bernoulli"], "bernoulli"),
        (None, ["--likelihood", "continuous-bernoulli"], "continuous-bernoulli"),
        (None, ["--likelihood", "learned-gaussian"], "learned-gaussian"),
        (None, ["--likelihood", "pixel-gaussian"], "pixel-gaussian"),
    ],
)
def test_the_likelihood_is_the_one_named_or_the_one_of_the_data(
    levels: int | None,
    options: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[VAE] = []

    def stop(model: VAE, *args: Any, **kwargs: Any) -> None:
        seen.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "fit", stop)
    data, out = write_npz(tmp_path / "images.npz", levels), tmp_path / "out"
    assert cli.main(["compare", "--data", str(data), "--out", str(out), *TINY, *options]) == 130
    captured = capsys.readouterr()
    assert f"; {expected} likelihood, " in captured.out
    assert captured.err == "pyro-vi: interrupted; nothing was written\n"
    assert isinstance(seen[0].likelihood, type(cli._LIKELIHOODS[expected](levels or 2)))
    assert {path.name for path in tmp_path.iterdir()} == {"images.npz"}


def test_samples_are_those_of_the_fit(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "samples.png"
    arguments = ["sample", str(run.folder / "mean-field.pt"), "--num", "5", "--out", str(picture)]
    assert cli.main(arguments) == 0
    assert is_picture(picture)
    first = picture.read_bytes()
    assert list(tmp_path.iterdir()) == [picture]
    model = VAE((1, 4, 4), 2, likelihood=DiscretizedLogistic(4))
    guide = Encoder((1, 4, 4), MeanField(2, 128))
    fitted = Fit.load(run.folder / "mean-field.pt", model, guide)
    expected = io.BytesIO()
    plots.grid(fitted.generate(5, expected=True, seed=0)["x"]).savefig(
        expected, dpi=120, format="png"
    )
    expected.seek(0)
    assert np.array_equal(imread(picture), imread(expected))
    assert cli.main([*arguments, "--overwrite", "--seed", "1"]) == 0
    assert picture.read_bytes() != first
    vector = tmp_path / "samples.pdf"
    assert cli.main([*arguments[:-1], str(vector)]) == 0
    assert vector.read_bytes().startswith(b"%PDF")


# Wrong input


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a step is taken: what is wrong must be said before minutes of training."""

    def take(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(fitting.SVITrainer, "take", take)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that ends with status 2: one line on stderr."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("pyro-vi: error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--families", "mean-field,flwo"], r"unknown family 'flwo': .*; did you mean flow\?"),
        (["--families", ""], r"unknown family '': expected one of mean-field, full-covariance"),
        (["--families", "flow,flow"], r"each family once, got flow,flow"),
        (["--models", "vae,dppm"], r"unknown model 'dppm': .*; did you mean ddpm\?"),
        (["--models", "ddpm", "--schedules", "cosin"], r"unknown schedule 'cosin'.*mean cosine\?"),
        (["--schedules", "cosine"], r"--schedules and --chain are a diffusion's: add ddpm"),
        (["--chain", "50"], r"--schedules and --chain are a diffusion's: add ddpm"),
        (["--models", "ddpm", "--families", "flow"], r"--families are a VAE's: add vae"),
        (["--models", "ddpm", "--families", "foo"], r"unknown family 'foo'"),
        (["--models", "ddpm", "--chain", "0"], r"at least one step of the chain, got 0"),
        (["--data", "digit"], r"unknown data 'digit': .*; did you mean digits\?"),
        (["--data", "zzzz"], r"unknown data 'zzzz': expected digits, fashion-mnist, a folder of"),
        (["--data", "missing.npz"], r"missing\.npz"),
        (["--likelihood", "bernouli"], r"unknown likelihood 'bernouli'.*mean bernoulli\?"),
        (["--network", "cnn"], r"unknown network 'cnn'.*did you mean conv\?"),
        (
            ["--likelihood", "bernoulli"],
            r"takes 0 and 1 alone, and images has grey levels: add --b",
        ),
        (["--steps", "0"], r"at least one step, got 0"),
        (["--steps", "-5"], r"at least one step, got -5"),
        (["--draws", "0"], r"at least 21 posterior draws for a k-hat, got 0"),
        (["--draws", "20"], r"at least 21 posterior draws for a k-hat, got 20"),
        (["--test-images", "0"], r"at least two test images, got 0"),
        (["--test-images", "1"], r"at least two test images, got 1"),
        (["--latent-dim", "0"], r"at least two latent dimensions, .* got 0"),
        (["--latent-dim", "1", "--families", "flow"], r"at least two latent dimensions, .* got 1"),
        (["--latent-dim", "-2"], r"at least two latent dimensions, .* got -2"),
        (["--batch-size", "0"], r"a batch size from 1 to the number of data points, 60, got 0"),
        (["--batch-size", "61"], r"a batch size from 1 to the number of data points, 60, got 61"),
        (["--learning-rate", "0"], r"a positive learning rate, got 0"),
        (["--learning-rate", "nan"], r"a positive learning rate, got nan"),
        (["--device", "gpu"], r"unknown device 'gpu': expected cpu or cuda"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused_before_training(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "images.npz")
    before = listing(tmp_path)
    arguments = ["compare", "--data", "images.npz", "--out", "deep/out", *TINY, *options]
    assert re.search(message, refused(arguments, capsys))
    assert listing(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_where_there_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_training: None
) -> None:
    arguments = ["compare", "--out", str(tmp_path / "out"), "--device", "cuda", *TINY]
    message = refused(arguments, capsys)
    assert "device 'cuda' was asked for, but torch sees no CUDA here" in message
    assert list(tmp_path.iterdir()) == []


def idx_files(folder: Path, cut: int = 0) -> None:
    folder.mkdir()
    for name in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (9, 4, 4))
        whole = header + bytes(range(144))
        (folder / f"{name}-images-idx3-ubyte").write_bytes(whole[: len(whole) - cut])


def save(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    arrays: dict[str, Any] = {"train": np.full((9, 4, 4), 0.5), "test": np.full((5, 4, 4), 0.5)}
    change(arrays)
    np.savez(path, **arrays)


DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty folder": (lambda p: p.mkdir(), r"train-images-idx3-ubyte .*found neither"),
    "truncated IDX": (lambda p: idx_files(p, cut=7), r"truncated: expected 160 bytes .*, got 153"),
    "no archive": (lambda p: p.write_bytes(b"hello"), r"images\.npz"),
    "NaN": (lambda p: save(p, lambda a: a["train"].__setitem__((1, 2, 3), np.nan)), "1 NaN"),
    "negative": (
        lambda p: save(p, lambda a: a["test"].__setitem__(0, -0.25)),
        r"values in \[0, 1\], got -0\.25 to 0\.5",
    ),
    "no test images": (lambda p: save(p, lambda a: a.pop("test")), "test"),
    "one test image": (
        lambda p: save(p, lambda a: a.update(test=a["test"][:1])),
        r"at least two test images, of one channel or three, got 1 of shape",
    ),
    "two channels": (
        lambda p: save(
            p, lambda a: a.update(train=np.ones((9, 2, 4, 4)), test=np.ones((5, 2, 4, 4)))
        ),
        r"of one channel or three, got 5 of shape \(2, 4, 4\)",
    ),
    "other shapes": (lambda p: save(p, lambda a: a.update(test=np.ones((5, 4, 5)))), "one shape"),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("name", DATA)
def test_wrong_data_are_refused_before_training(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = DATA[name]
    make(tmp_path / "images.npz")
    before = listing(tmp_path)
    out = tmp_path / "deep" / "out"
    arguments = ["compare", "--data", str(tmp_path / "images.npz"), "--out", str(out), *TINY]
    assert re.search(message, refused(arguments, capsys))
    assert listing(tmp_path) == before


def test_discretized_data_need_levels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_training: None
) -> None:
    data = write_npz(tmp_path / "smooth.npz", levels=None)
    arguments = ["compare", "--data", str(data), "--likelihood", "discretized-logistic"]
    message = refused([*arguments, "--out", str(tmp_path / "out"), *TINY], capsys)
    assert "needs data with grey levels; those of smooth are continuous" in message


def test_a_folder_of_idx_files_is_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "fit", stop)
    idx_files(tmp_path / "mine")
    out = tmp_path / "out"
    assert cli.main(["compare", "--data", str(tmp_path / "mine"), "--out", str(out), *TINY]) == 130
    expected = "mine: 9 training images, 9 test images, shape (1, 4, 4)"
    assert capsys.readouterr().out.startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--steps", "many"], "invalid int value: 'many'"),
        (["compare", "--colour"], "unrecognized arguments: --colour"),
        (["compare", "--steps"], "expected one argument"),
        (["fit"], "invalid choice: 'fit'"),
        ([], "required: COMMAND"),
        (["sample"], "required: fit"),
    ],
)
def test_what_the_parser_does_not_know_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# The output folder


@pytest.mark.usefixtures("no_training")
def test_a_folder_that_exists_is_left_as_it_is(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(run.folder.parent)
    arguments = ["compare", "--data", str(run.data), "--out", str(run.folder), *TINY]
    assert f"output folder {run.folder} exists; --overwrite replaces it" in refused(
        arguments, capsys
    )
    (tmp_path / "empty").mkdir()
    arguments = ["compare", "--data", str(run.data), "--out", str(tmp_path / "empty"), *TINY]
    assert "exists; --overwrite replaces it" in refused(arguments, capsys)
    assert listing(run.folder.parent) == before


@pytest.mark.usefixtures("no_training")
def test_a_folder_of_something_else_is_not_replaced(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("years of work")
    (tmp_path / "file").write_text("also of value")
    before = listing(tmp_path)
    base = ["compare", "--data", str(run.data), *TINY, "--overwrite", "--out"]
    message = refused([*base, str(tmp_path / "thesis")], capsys)
    assert "thesis is not replaced: pyro-vi compare did not write it" in message
    assert "file is a file, not a folder" in refused([*base, str(tmp_path / "file")], capsys)
    message = refused([*base, str(tmp_path / "file" / "out")], capsys)
    assert "out cannot be made: " in message
    assert listing(tmp_path) == before


@pytest.mark.usefixtures("no_training")
def test_a_mount_point_is_not_replaced(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a container: a folder that cannot be renamed would cost the whole run."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    base = ["compare", "--data", str(run.data), *TINY, "--overwrite", "--out"]
    assert "out is a mount point" in refused([*base, str(out)], capsys)


def test_a_failure_while_writing_leaves_the_old_folder(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "comparison.csv").write_text("old")
    (out / "comparison.txt").write_text("old")
    before = listing(tmp_path)

    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    options = [*TINY, "--steps", "1", "--families", "mean-field", "--overwrite"]
    arguments = ["compare", "--data", str(run.data), "--out", str(out), *options]
    with monkeypatch.context() as patch:
        patch.setattr(plots, "khats", fail)
        assert "no space left on device" in refused(arguments, capsys)
    assert {k: v[1] for k, v in listing(tmp_path).items()} == {k: v[1] for k, v in before.items()}
    assert cli.main(arguments) == 0
    assert (out / "comparison.csv").read_text() != "old" and (out / "khat.png").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "comparison.csv").write_text("old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt), cli._replacing(out) as folder:
        (folder / "comparison.csv").write_text("new")
    assert (out / "comparison.csv").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    with cli._replacing(tmp_path / "link") as folder:
        (folder / "comparison.csv").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "out" / "comparison.csv").read_text() == "new"


# Samples of what is no fit


def test_files_that_are_no_fits_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (run.folder / "mean-field.pt").read_bytes()
    out = tmp_path / "samples.png"
    cases: dict[str, tuple[Callable[[Path], Any], str]] = {
        "truncated.pt": (lambda p: p.write_bytes(whole[: len(whole) // 2]), "is truncated or no"),
        "text.pt": (lambda p: p.write_text("hello"), "is truncated or no saved fit"),
        "other.pt": (lambda p: torch.save({"a": torch.ones(1)}, p), "no saved fit of pyro_vi"),
        "missing.pt": (lambda p: None, "there is no saved fit at"),
        "folder.pt": (lambda p: p.mkdir(), "has no comparison.csv"),
        "python.pt": (
            lambda p: files.save(p, {**files.load(run.folder / "mean-field.pt"), "recipe": {}}),
            "was not saved by `pyro-vi compare`: load it from Python",
        ),
        "newer.pt": (
            lambda p: files.save(
                p, {**files.load(run.folder / "mean-field.pt"), "recipe": {"family": "new"}}
            ),
            "was saved by another release",
        ),
        "mixed.pt": (
            lambda p: files.save(
                p,
                {
                    **files.load(run.folder / "mean-field.pt"),
                    "recipe": files.load(run.folder / "full-covariance.pt")["recipe"],
                },
            ),
            "was made for other programs",
        ),
    }
    for name, (make, message) in cases.items():
        make(tmp_path / name)
        error = refused(["sample", str(tmp_path / name), "--out", str(out)], capsys)
        assert name in error and message in error
        assert not out.exists()


@pytest.mark.parametrize("name", ["family", "shape", "levels", "latent_dim", "likelihood"])
def test_damaged_recipes_are_refused(
    name: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = files.load(run.folder / "mean-field.pt")
    path, out = tmp_path / "fit.pt", tmp_path / "samples.png"
    strangers: list[Any] = [None, -1, 2.5, "text", [], [1, 4], {"a": 1}, (1, 4, 4), torch.ones(3)]
    recipes = [{**content["recipe"], name: value} for value in strangers]
    recipes.append({key: value for key, value in content["recipe"].items() if key != name})
    for recipe in [*recipes, [], None, {1: 2}, {"schedule": "learned", **content["recipe"]}]:
        files.save(path, {**content, "recipe": recipe})
        message = refused(["sample", str(path), "--out", str(out)], capsys)
        assert re.search(
            r"fit\.pt (is damaged|was saved by|was not saved by|was made for)", message
        )
        assert not out.exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"shape": [1, 4]}, r"'recipe', 'shape': expected a list of three whole numbers .* a list"),
        ({"levels": "4"}, r"'recipe', 'levels': expected a whole number of at least 0, got '4'"),
        ({"levels": 1}, r"'recipe': the saved options build no program: "),
        ({"family": ["flow"]}, r"'recipe', 'family': expected a string, got a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_damaged_in_a_recipe_is_named(
    recipe: dict[str, Any],
    message: str,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = files.load(run.folder / "mean-field.pt")
    path = tmp_path / "fit.pt"
    files.save(path, {**content, "recipe": {**content["recipe"], **recipe}})
    error = refused(["sample", str(path), "--out", str(tmp_path / "samples.png")], capsys)
    assert re.search(rf"fit\.pt is damaged: {message}", error)


@pytest.mark.parametrize(
    "table",
    [
        "",
        "family,elbo\n",
        "family\nflow\n",
        "family,elbo\nflow\n",
        "family,elbo\nflow,\n",
        "\0\xff",
    ],
    ids=["empty", "no lines", "no bounds", "short", "no number", "no text"],
)
def test_damaged_tables_are_refused(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "comparison.csv").write_bytes(table.encode("latin-1"))
    message = refused(["sample", str(tmp_path), "--out", str(tmp_path / "samples.png")], capsys)
    assert re.search(r"comparison\.csv is damaged: expected columns family and elbo", message)


def test_wrong_options_of_sample_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "samples.png"
    out.write_text("a picture of old")
    before = listing(tmp_path)
    base = ["sample", str(run.folder / "mean-field.pt"), "--out"]
    assert "exists; --overwrite replaces it" in refused([*base, str(out)], capsys)
    for num in ("0", "-1"):
        message = refused([*base, str(out), "--overwrite", "--num", num], capsys)
        assert f"at least one data point to generate, got {num}" in message
    message = refused([*base, str(tmp_path / "samples.xyz")], capsys)
    assert "xyz" in message
    assert listing(tmp_path) == before


# Help


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    [action] = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("command", ["compare", "sample"])
def test_every_option_is_explained_with_its_default(command: str) -> None:
    parser = subparsers(cli._parser())[command]
    shown = "".join(parser.format_help().split())
    assert "None" not in shown and shown.count("(default:") == len(
        [a for a in parser._actions if a.option_strings and a.dest != "help"]
    )
    for action in parser._actions:
        assert action.help and len(action.help) > 8, action.dest
        if action.option_strings and action.dest != "help":
            name = action.option_strings[-1]
            explained = shown[shown.rindex(name) :]
            own = action.default is argparse.SUPPRESS  # the help has the words itself
            default = "(default:" if own else f"(default:{action.default})".replace(" ", "")
            assert default in explained, name
            assert explained.index(default) == explained.index("(default:"), name


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["--help"], "judge variational posteriors"),
        (["compare", "--help"], "--latent-dim"),
        (["sample", "--help"], "--num"),
        (["--version"], f"pyro-vi {pyro_vi.__version__}"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in subparsers(cli._parser()))


def test_python_dash_m(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pyro_vi", "sample", "missing.pt"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("pyro_vi", run_name="__main__")
    assert stopped.value.code == 2
    assert "there is no saved fit at missing.pt" in capsys.readouterr().err
