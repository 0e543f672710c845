"""The page holds the numbers of the CSV file, digit by digit, and opens without complaint."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from example_programs import SCHOOLS_SIGMA, SCHOOLS_Y, STRANGE_NAMES, eight_schools, renamed
from matplotlib.figure import Figure
from matplotlib.image import imread
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import pyro_vi
from pyro_vi import compare, judge, plots, report
from pyro_vi.comparison import Comparison, shown
from pyro_vi.diffusion import CosineSchedule, Diffusion, MLPDenoiser
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.guides import Encoder, ForwardProcess
from pyro_vi.inference import fit
from pyro_vi.models import DDPM, VAE, LearnedDiscretizedLogistic, LinearGaussian
from pyro_vi.weighting import warmup

SHAPE = (1, 4, 4)
NAMES = ("mean-field", '<b>full</b> & "covariance"')
HEADING = "<script>alert('1')</script> & Co."
IMAGES = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(0)).round()
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(HTMLParser):
    """What a page holds, tag by tag."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "tags that nothing closes"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.setdefault(tag, []).append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def numbers(self) -> list[tuple[str, str, str]]:
        """Family, column and value of every number in the tables."""
        return [
            (cell["data-family"], cell["data-column"], cell["data-value"])
            for cell in self.all("td")
            if "data-value" in cell
        ]


def local_result(**options: Any) -> Comparison:
    guides = {
        name: Encoder(SHAPE, family(2, 8))
        for name, family in zip(NAMES, (MeanField, FullCovariance), strict=True)
    }
    data = SimpleNamespace(train=IMAGES[:30], test=IMAGES[30:])
    model = options.pop("model", VAE(SHAPE, 2))
    return compare(model, guides, data, num_samples=40, steps=3, progress=False, **options)


@pytest.fixture(scope="module")
def local() -> Comparison:
    return local_result()


@pytest.fixture(scope="module")
def frozen() -> Comparison:
    guide = Encoder(SHAPE, MeanField(2, 8))
    shared = fit(VAE(SHAPE, 2), guide, IMAGES[:30], steps=3, progress=False).model
    return local_result(model=shared)


@pytest.fixture(scope="module")
def diffusion() -> Comparison:
    process = Diffusion(SHAPE, CosineSchedule(4))
    model = DDPM(
        process, MLPDenoiser(SHAPE, 4, hidden=(8,)), likelihood=LearnedDiscretizedLogistic(2)
    )
    vae = VAE(SHAPE, 2)
    return compare(
        {"vae": vae, "ddpm": model},
        {"vae": Encoder(SHAPE, MeanField(2, 8)), "ddpm": ForwardProcess(process)},
        SimpleNamespace(train=IMAGES[:30], test=IMAGES[30:]),
        num_samples=40,
        steps=3,
        progress=False,
    )


@pytest.fixture(scope="module")
def joint() -> Comparison:
    generator = np.random.default_rng(0)
    return compare(
        eight_schools,
        {
            kind.__name__: kind(eight_schools)
            for kind in (AutoNormal, AutoMultivariateNormal, AutoDelta)
        },
        (SCHOOLS_Y, SCHOOLS_SIGMA),
        reference={"mu": generator.normal(size=90), "eta": generator.normal(size=(90, 8))},
        num_samples=40,
        steps=3,
        progress=False,
    )


def written(result: Any, folder: Path) -> str:
    report(result, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(
    local: Comparison,
    frozen: Comparison,
    joint: Comparison,
    diffusion: Comparison,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Pages by name; "both" holds two comparisons."""
    found = {}
    for name, result in {
        "local": local,
        "frozen": frozen,
        "joint": joint,
        "diffusion": diffusion,
        "both": {HEADING: local, "Second": joint},
    }.items():
        found[name] = tmp_path_factory.mktemp(name) / "report.html"
        report(result, found[name])
    return found


def opened(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def in_csv(result: Comparison, path: Path) -> list[tuple[str, str, str]]:
    """The same numbers from the CSV file, of the quantities and cells that the table shows."""
    result.to_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [
        (line["family"], column.name, line[column.name])
        for column in result.columns
        for cell, line in zip(column.cells, lines, strict=True)
        if cell
    ]


@pytest.mark.parametrize("kind", ["local", "frozen", "joint", "diffusion"])
def test_every_number_is_that_of_the_csv(
    kind: str, pages: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    result: Comparison = request.getfixturevalue(kind)
    page = opened(pages[kind])
    expected = in_csv(result, tmp_path / "table.csv")
    assert page.numbers() == expected and len(expected) >= 20
    assert "" not in {value for _, _, value in expected}
    shown = [text for text in page.texts["td"] if text]
    cells = [cell for column in result.columns for cell in column.cells]
    assert shown == [cell for cell in cells if cell]
    errors = [float(cell["data-error"]) for cell in page.all("td") if "data-error" in cell]
    bounded = [row.elbo_se for row in result.rows if row.family in result.elbos]
    assert errors[: len(bounded)] == bounded


def test_every_quantity_is_labelled_and_explained(
    joint: Comparison, pages: dict[str, Path]
) -> None:
    page = opened(pages["joint"])
    found = joint.columns
    labels, meanings = page.texts["dt"], page.texts["dd"]
    assert labels[: len(found)] == [column.label for column in found]
    assert meanings[: len(found)] == [column.meaning for column in found]
    heads = list(zip(page.all("th"), page.texts["th"], strict=True))
    assert [text for th, text in heads if th["scope"] == "row"] == labels[: len(found)]
    families = [*joint.fits, "reference"]
    assert [text for th, text in heads if th["scope"] == "col"] == ["quantity", *families]


def pictures(page: Page) -> dict[str, bytes]:
    """The pictures by the heading above them; all of them valid, and with something on them."""
    found = {}
    for image in page.all("img"):
        head, _, data = image["src"].partition(",")
        assert head == "data:image/png;base64"
        content = base64.b64decode(data, validate=True)
        pixels = imread(io.BytesIO(content), format="png")
        assert pixels.std() > 0.01
        height, width = pixels.shape[:2]
        shown = int(image["width"]) / int(image["height"])
        assert width / height == pytest.approx(shown, rel=0.02)
        title = next(text for text in page.texts["h3"] if image["alt"].startswith(f"{text} of "))
        assert len(image["alt"]) > len(title) + 40
        found[title] = content
    return found


def test_pictures_are_those_that_mean_something(pages: dict[str, Path]) -> None:
    images = ["Training", "Samples", "Reconstructions", "Latent space"]
    for kind, titles in (
        ("local", [*images, "k-hat"]),
        ("frozen", [*images, "Posteriors of single images", "k-hat"]),
        ("joint", ["Training", "Marginals", "Pairs"]),
        (
            "diffusion",
            [
                *("Training", "Samples", "From noise to images", "The bound by step"),
                *("Noise schedules", "Reconstructions", "Latent space", "k-hat"),
            ],
        ),
    ):
        assert list(pictures(opened(pages[kind]))) == titles


def test_diffusions_alone_have_no_pictures_of_posteriors(
    diffusion: Comparison, tmp_path: Path
) -> None:
    result = judge({"ddpm": diffusion.fits["ddpm"]}, IMAGES)
    text = written(result, tmp_path)
    page = Page(text)
    titles = ["Training", "Samples", "From noise to images", "The bound by step", "Noise schedules"]
    assert list(pictures(page)) == titles
    assert "The k-hat says" not in " ".join(page.texts["p"]) and "A diffusion has" in text.replace(
        "<strong>diffusion</strong>", "diffusion"
    )
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts["Steps of the chain"] == "4" and "Posterior draws" not in facts


def facts(page: Page) -> dict[str, str]:
    return dict(zip(page.texts["dt"], page.texts["dd"], strict=True))


def test_weights_are_told_and_the_bound_is_shown(tmp_path: Path) -> None:
    model, x = LinearGaussian(torch.ones(3, 1), torch.zeros(3), 1.0), torch.randn(20, 3)

    def page(*weights: Any) -> Page:
        guide = Encoder((3,), MeanField(1, 8))
        fits = {
            f"q{i}": fit(*(model, guide, x), kl_weight=w, steps=4, progress=False)
            for i, w in enumerate(weights)
        }
        return Page(written(judge(fits, x, num_samples=40), tmp_path))

    found = page(1.0)
    assert not any("Weight" in name for name in facts(found))
    assert facts(page(0.5, 0.5))["Weight on the KL"] == "0.5"
    found = page(0.5, warmup(4))
    assert facts(found)["Weight on the KL"] == "q0: 0.5, q1: 0.25 to 1, by step"
    assert "Weight on the reconstruction" not in facts(found)
    assert not any("weighted objective" in text for text in found.texts["figcaption"])
    assert list(pictures(found)) == ["Training", "k-hat"]


def test_fits_of_no_steps_have_no_picture_of_training(tmp_path: Path) -> None:
    model, x = LinearGaussian(torch.ones(3, 1), torch.zeros(3), 1.0), torch.randn(20, 3)
    bound = fit(model, Encoder((3,), MeanField(1, 8)), x, steps=0, progress=False)
    found = Page(written(judge({"q": bound}, x, num_samples=40), tmp_path))
    assert list(pictures(found)) == ["k-hat"] and facts(found)["Gradient steps"] == "0"


def test_a_weighted_objective_is_called_one(local: Comparison, tmp_path: Path) -> None:
    nan = torch.full((3,), float("nan"))
    fits = {
        name: replace(one, weights=torch.full((3, 2), 0.5), kl=nan, reconstruction=nan)
        for name, one in local.fits.items()
    }
    page = Page(written(replace(local, fits=fits), tmp_path))
    assert "it is the weighted objective, which bounds nothing" in page.texts["figcaption"][0]


def test_data_that_are_no_images_have_no_pictures_of_them(tmp_path: Path) -> None:
    model = LinearGaussian(torch.ones(3, 1), torch.zeros(3), 1.0)
    x = torch.randn(20, 3)
    result = compare(
        model, {"q": Encoder((3,), MeanField(1, 8))}, x, num_samples=40, steps=2, progress=False
    )
    assert list(pictures(Page(written(result, tmp_path)))) == ["Training", "k-hat"]


def test_figures_of_ones_own_follow_the_comparisons(joint: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    own = {HEADING: Figure(figsize=(4, 3)), "Second": Figure(figsize=(6, 2))}
    for figure in own.values():
        figure.add_subplot().plot([0, 1])
    report(joint, path, figures=own)
    page = opened(path)
    assert page.texts["h2"] == [
        *("Which family to trust", *own),
        *("How to read this", "How it was made"),
    ]
    assert page.texts["a"] == page.texts["h2"] and not page.all("script")
    *_, first, second = page.all("img")
    assert [image["alt"] for image in (first, second)] == list(own)
    for image, size in ((first, (400, 300)), (second, (600, 200))):
        assert (int(image["width"]), int(image["height"])) == size
        head, _, data = image["src"].partition(",")
        assert head == "data:image/png;base64"
        pixels = imread(io.BytesIO(base64.b64decode(data, validate=True)), format="png")
        assert pixels.shape[:2] == (size[1] * 1.6, size[0] * 1.6) and pixels.std() > 0.01
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"].removeprefix("#") for link in page.all("a")} <= ids


def test_other_things_than_figures_are_refused(joint: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    for wrong, came in (
        ({"Curve": Figure().add_subplot()}, "a matplotlib Figure as 'Curve', got Axes"),
        ({"Fine": Figure(), "File": "curve.png"}, "a matplotlib Figure as 'File', got str"),
        (Figure(), "matplotlib Figures by heading, got Figure"),
    ):
        with pytest.raises(TypeError, match=f"figures: expected {came}"):
            report(joint, path, figures=wrong)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_names_and_headings_are_text(joint: Comparison, pages: dict[str, Path]) -> None:
    page = opened(pages["both"])
    assert not page.all("script") and not page.all("b")
    assert page.texts["h2"][:2] == [HEADING, "Second"]
    families = (*NAMES, *joint.fits)
    assert page.texts["th"].count(NAMES[1]) == 1
    assert {family for family, _, _ in page.numbers()} == {*families, "reference"}
    assert page.texts["title"] == [f"Variational posteriors: {', '.join(families)}"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"].removeprefix("#") for link in page.all("a")}
    assert targets <= set(ids) and all(link["href"].startswith("#") for link in page.all("a"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))


def test_any_name_is_text(local: Comparison, joint: Comparison, tmp_path: Path) -> None:
    names = list(STRANGE_NAMES)
    for first, result in ((0, local), (7, local), (9, joint)):
        pair = names[first : first + 2]
        page = Page(written(renamed(result, *pair), tmp_path))
        heads = page.texts["th"]
        assert all(heads.count(shown(name)) == 1 for name in pair)
        assert not page.all("script") and not page.all("b")
        assert all(shown(name) in page.texts["title"][0] for name in pair)
        assert all(shown(name) in image["alt"] for name in pair for image in page.all("img"))


def test_the_page_asks_nothing_of_the_network(pages: dict[str, Path]) -> None:
    text = pages["both"].read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
    assert "url(" not in text and "@import" not in text and "http" not in text


def test_the_page_says_what_was_found_and_how_it_was_made(
    local: Comparison, joint: Comparison, pages: dict[str, Path]
) -> None:
    facts = {}
    for kind, result in (("local", local), ("joint", joint)):
        page = opened(pages[kind])
        assert result.verdict in page.texts["p"]
        for warning in result.warnings:
            assert f"Warning: {warning}." in page.texts["p"]
        facts[kind] = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
        assert facts[kind]["pyro_vi"] == pyro_vi.__version__
        assert facts[kind]["PyTorch"] == torch.__version__
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts[kind]["Date"])
        assert facts[kind]["Gradient steps"] == "3"
    assert facts["local"]["Data"] == "test data of shape (10, 1, 4, 4)"
    assert facts["local"]["Latents"] == "z (2) for each data point"
    assert facts["local"]["Posterior draws"] == "40 for each data point"
    assert facts["joint"]["Data"] == "training data of shape (8) and (8)"
    assert facts["joint"]["Latents"] == "mu, tau, eta (8)"
    assert facts["joint"]["Posterior draws"] == "40 of all data together"
    assert facts["joint"]["Reference draws"] == "90"


# Files


def test_a_page_is_written_whole_or_not_at_all(
    local: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(result: Comparison) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "khats", fail)
        with pytest.raises(OSError, match="no space left"):
            report(local, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    report(local, path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_that_cannot_be_written_costs_no_drawing(
    local: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(result: Comparison) -> None:
        raise AssertionError("drawing began")

    monkeypatch.setattr(plots, "losses", fail)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing to write report"):
        report(local, tmp_path / "missing" / "report.html")
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        report(local, tmp_path)


def test_other_things_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    for wrong in ([1], "report", {"a": 1}, None):
        with pytest.raises(
            TypeError, match="expected a Comparison, or Comparisons by heading, got"
        ):
            report(wrong, path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one Comparison to report"):
        report({}, path)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_library_imports_no_templates_and_no_plots() -> None:
    script = (
        "import sys, pyro_vi\n"
        "print([name for name in ('jinja2', 'matplotlib', 'arviz', 'xarray')"
        " if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# In a browser


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_same_numbers(
    local: Comparison, joint: Comparison, pages: dict[str, Path], tmp_path: Path
) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    page = pages["both"].as_uri()
    ran = subprocess.run(
        [str(CHROMIUM), *options, profile, page], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert [line for line in ran.stderr.splitlines() if "CONSOLE" in line] == []
    expected = [
        number
        for index, result in enumerate((local, joint))
        for number in in_csv(result, tmp_path / f"{index}.csv")
    ]
    assert Page(ran.stdout).numbers() == expected
