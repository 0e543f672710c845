"""report(): a comparison as one HTML page to send to somebody.

The page holds all that it shows: the verdict, the table with every digit and the meaning of each
line, and the pictures that mean something for the programs at hand, with a user's own after them.
It asks nothing of the network and runs no script. What it looks like is in `page.html.jinja`.
"""

from __future__ import annotations

__all__ = ["report"]

import base64
import datetime
import io
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from os import PathLike
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from pyro_vi import diagnostics, files
from pyro_vi._version import __version__
from pyro_vi.comparison import Comparison, Row, shown
from pyro_vi.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 160  # of the pictures, which the page shows at 100 at most
_FEW = 10  # data points reconstructed
_OVERLAID = 4  # data points whose posteriors are drawn


def report(
    result: Comparison | Mapping[str, Comparison],
    path: str | PathLike[str],
    *,
    figures: Mapping[str, Figure] | None = None,
) -> None:
    """Writes a comparison, or several, to one self-contained HTML page; whole or not at all.

    Args:
        result: what `compare` returned; or several of them by heading, in the order of the page.
        path: the file; it is replaced if it exists. Nothing is drawn if it cannot be written.
        figures: matplotlib figures of your own by heading, which follow the comparisons in this
            order. The heading is the picture's text where it cannot be seen.

    Raises:
        TypeError: something else than comparisons, or than figures.
        ValueError: no comparison.
        FileNotFoundError: the file's folder does not exist.
        IsADirectoryError: `path` is a folder.

    Example:
        >>> import tempfile, pathlib
        >>> from types import SimpleNamespace
        >>> from pyro_vi import compare
        >>> from pyro_vi.families import MeanField
        >>> from pyro_vi.guides import Encoder
        >>> from pyro_vi.models import LinearGaussian
        >>> model = LinearGaussian(torch.ones(3, 2), torch.zeros(3), 1.0)
        >>> data = SimpleNamespace(train=torch.randn(64, 3), test=torch.randn(16, 3))
        >>> guides = {"mean-field": Encoder((3,), MeanField(2, context_dim=8))}
        >>> result = compare(model, guides, data, num_samples=50, steps=5, progress=False)
        >>> from matplotlib.figure import Figure
        >>> figure = Figure()
        >>> points = figure.add_subplot().scatter(data.test[:, 0], data.test[:, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = pathlib.Path(folder) / "report.html"
        ...     report({"Three sensors": result}, page, figures={"Two of the sensors": figure})
        ...     '<h2 id="figure-1">Two of the sensors</h2>' in page.read_text(encoding="utf-8")
        True
    """
    import jinja2

    results = _by_heading(result)
    own = _own_figures(figures)
    with files.replacing(path) as fresh:
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        source = resources.files("pyro_vi.reporting").joinpath("page.html.jinja")
        template = environment.from_string(source.read_text(encoding="utf-8"))
        now = datetime.datetime.now(datetime.UTC)
        page = template.render(
            parts=[_part(heading, one) for heading, one in results.items()],
            own=[{"heading": heading, **_picture(figure)} for heading, figure in own.items()],
            families=[
                shown(family)
                for family in dict.fromkeys(row.family for r in results.values() for row in r.rows)
            ],
            local=not all(one.is_joint for one in results.values()),
            reference=any(one.noise for one in results.values()),
            diffusion=any(one.step_bounds for one in results.values()),
            posterior=any(one.posteriors for one in results.values()),
            bounds=sorted({one.num_samples: _bound(one) for one in results.values()}.items()),
            versions={
                "pyro_vi": __version__,
                "Pyro": pyro.__version__,
                "PyTorch": torch.__version__,
                "Python": platform.python_version(),
            },
            date=now.strftime("%Y-%m-%d"),
            time=now.strftime("%Y-%m-%d %H:%M UTC"),
        )
        fresh.write_bytes(page.encode(errors="replace"))  # a name may have half a character


def _by_heading(result: Any) -> dict[str, Comparison]:
    if isinstance(result, Comparison):
        return {"Which family to trust": result}
    if not isinstance(result, Mapping) or not all(
        isinstance(one, Comparison) for one in result.values()
    ):
        raise TypeError(
            f"expected a Comparison, or Comparisons by heading, got {type(result).__name__}"
        )
    if not result:
        raise ValueError("expected at least one Comparison to report, got none")
    return {str(heading): one for heading, one in result.items()}


def _own_figures(figures: Any) -> dict[str, Figure]:
    if figures is None:
        return {}
    from matplotlib.figure import Figure

    if not isinstance(figures, Mapping):
        raise TypeError(
            f"figures: expected matplotlib Figures by heading, got {type(figures).__name__}"
        )
    for heading, figure in figures.items():
        if not isinstance(figure, Figure):
            raise TypeError(
                f"figures: expected a matplotlib Figure as {heading!r}, got {type(figure).__name__}"
            )
    return {str(heading): figure for heading, figure in figures.items()}


def _bound(result: Comparison) -> float:
    return float(diagnostics.khat_threshold(result.num_samples))


def _part(heading: str, result: Comparison) -> dict[str, Any]:
    """What the page says of one comparison."""
    from pyro_vi.plots import colours

    rows = result.all_rows
    return {
        "heading": heading,
        "question": _question(result),
        "verdict": result.verdict,
        "warnings": result.warnings,
        "families": [(shown(row.family), colours(result).get(row.family)) for row in rows],
        "lines": [
            {
                "label": column.label,
                "indented": column.indent,
                "meaning": column.meaning,
                "cells": [
                    _cell(column.name, text, row)
                    for text, row in zip(column.cells, rows, strict=True)
                ],
            }
            for column in result.columns
        ],
        "pictures": [
            {"title": title, "caption": caption, **_picture(figure)}
            for title, caption, figure in _figures(result)
        ],
        "facts": dict(_facts(result)),
    }


def _question(result: Comparison) -> str:
    if result.shared:
        return (
            "All families explain the data with one and the same model, which is not trained: what"
            " differs is inference alone."
        )
    if len({id(fitted.model.function) for fitted in result.fits.values()}) > 1:
        return (
            "Programs with models of their own, on the same data: what differs is the model and the"
            " guide together."
        )
    return (
        "Each family trained its own copy of the model, from the same initial weights on the same"
        " batches: what differs is the model and the guide together."
    )


def _cell(name: str, text: str, row: Row) -> dict[str, Any]:
    """A number as the table shows it, and with every digit, as `Comparison.to_csv` writes it."""
    error = getattr(row, f"{name}_se", math.nan)
    return {
        "family": row.family,
        "column": name,
        "text": text,
        "value": str(getattr(row, name)) if text else None,
        "error": str(error) if text and not math.isnan(error) else None,
    }


def _picture(figure: Figure) -> dict[str, Any]:
    """A figure as a PNG within the page, and its size there in pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    width, height = figure.get_size_inches() * 100
    data = base64.b64encode(buffer.getvalue()).decode()
    return {
        "source": f"data:image/png;base64,{data}",
        "width": round(width),
        "height": round(height),
    }


def _figures(result: Comparison) -> Iterator[tuple[str, str, Figure]]:
    """Title, caption and figure of what means something for the programs at hand."""
    from pyro_vi import plots

    data = "test data" if result.on_test else "data"
    bound = f"{_bound(result):.2f}"
    if any(len(fitted.losses) for fitted in result.fits.values()):
        yield "Training", _training(result), plots.losses(result)
    if result.is_joint:
        yield from _joint_figures(result)
        return
    images = _images(result)
    if images is not None:
        yield (
            "Samples",
            "Mean images of latents drawn from the prior: what the model has learned.",
            plots.samples(result),
        )
    if result.step_bounds:
        yield from _diffusion_figures(result, images)
    first = next(iter(result.posteriors.values()), None)
    if first is None:
        return
    units = sum(values[0, 0].numel() for values in first.draws.values())
    if images is not None:
        yield (
            "Reconstructions",
            f"Some of the {data}, and what one draw from each family's posterior keeps of them.",
            plots.reconstructions(result, images[:_FEW]),
        )
    if units >= 2:
        yield (
            "Latent space",
            f"The {data}, each at the mean of its posterior"
            f"{'' if units == 2 else ', along the two directions in which these spread most'}."
            f" Hollow: the k-hat is above {bound}, and the draws are not the posterior's.",
            plots.latent_space(result),
        )
    if images is not None and units >= 2 and result.shared:
        yield (
            "Posteriors of single images",
            "What each family makes of the same image: contours of 50% and 90% of the mass"
            + (
                ", with the exact posterior in grey."
                if units == 2
                else ", in the two latent units that correlate most."
            ),
            plots.posteriors(result, images[:_OVERLAID]),
        )
    if result.points:
        yield (
            "k-hat",
            f"The share of the {data} up to each k-hat. Left of {bound} draws can be reweighted to"
            " the exact posterior: the higher a curve is there, the better.",
            plots.khats(result),
        )


def _training(result: Comparison) -> str:
    """The caption of the bound against steps."""
    from pyro_vi import plots

    weighted = [
        shown(name) for name, one in result.fits.items() if plots.training_bounds(one) is None
    ]
    return "".join(
        (
            "The bound during training; higher is better. A strong line is a running median",
            " (of a diffusion, which draws terms of its bound, the mean)"
            if result.step_bounds
            else "",
            ", with the raw values faint behind it. The start of training runs out of the picture.",
            " Guides that train a point (AutoDelta, AutoLaplaceApproximation) have no bound: theirs"
            " is the log joint there."
            if result.is_joint
            else "",
            f" Of {', '.join(weighted)} it is the weighted objective, which bounds nothing."
            if weighted
            else "",
        )
    )


def _diffusion_figures(
    result: Comparison, images: Tensor | None
) -> Iterator[tuple[str, str, Figure]]:
    from pyro_vi import plots

    models = [result.fits[name].model for name in result.step_bounds]
    if images is not None and any(hasattr(model, "trajectory") for model in models):
        yield (
            "From noise to images",
            "States of the reverse chain, evenly spaced over its steps: noise at the left, the mean"
            " image at the right. All diffusions start from the same noise.",
            plots.strips(result),
        )
    if any(len(bound.steps) > 1 for bound in result.step_bounds.values()):
        yield (
            "The bound by step",
            "What each step of the chain costs, on a log scale. The first of them, the"
            " reconstruction, and the prior's term are in the legend; the sum of all is -ELBO.",
            plots.bits(result),
        )
    if any(hasattr(model, "diffusion") for model in models):
        yield (
            "Noise schedules",
            "How much signal is left: the log signal-to-noise ratio, from the data at the left to"
            " the prior at the right.",
            plots.schedules(result),
        )


def _joint_figures(result: Comparison) -> Iterator[tuple[str, str, Figure]]:
    from pyro_vi import plots

    behind = ", with the reference in grey behind" if result.reference else ""
    points = any(posterior.point for posterior in result.posteriors.values())
    yield (
        "Marginals",
        f"Each quantity by itself under every family{behind}."
        f"{' A vertical line is a family that holds it at a point.' if points else ''}",
        plots.marginals(result),
    )
    first = next(iter(result.posteriors.values()))
    if sum(v[0].numel() for v in (*first.draws.values(), *first.deterministic.values())) >= 2:
        yield (
            "Pairs",
            "The quantities that depend on one another most: contours of 50% and 90% of the"
            f" mass{behind}."
            f"{' A cross is a family that holds them at a point.' if points else ''}",
            plots.pairs(result),
        )


def _images(result: Comparison) -> Tensor | None:
    """The data, if they are images, and these are what the models observe."""
    data = result.data
    if (
        not isinstance(data, Tensor)
        or not data.is_floating_point()
        or data.dim() != 4
        or data.shape[1] not in (1, 3)
        or not (data.min() >= 0 and data.max() <= 1)
    ):
        return None
    if not result.posteriors:
        return data  # a diffusion observes what it is given
    observed, _ = next(iter(result.posteriors.values())).data()
    return data if [value.shape for value in observed.values()] == [data.shape] else None


def _facts(result: Comparison) -> Iterator[tuple[str, str]]:
    """How the comparison was made."""
    of = "test data" if result.on_test else "training data"
    yield "Data", f"{of} of shape {_shapes(result.data)}"
    for posterior in list(result.posteriors.values())[:1]:
        yield "Latents", ", ".join(_latent(posterior, name) for name in posterior.draws)
        each = "of all data together" if result.is_joint else "for each data point"
        yield "Posterior draws", f"{result.num_samples:,} {each}"
    if result.step_bounds:
        chains = {len(bound.steps) for bound in result.step_bounds.values()}
        yield "Steps of the chain", " or ".join(f"{steps:,}" for steps in sorted(chains))
    if result.reference:
        drawn = {len(values) for values in result.reference.values()}
        yield "Reference draws", " or ".join(f"{number:,}" for number in sorted(drawn))
    steps = {len(fitted.losses) for fitted in result.fits.values()}
    yield "Gradient steps", " or ".join(f"{number:,}" for number in sorted(steps))
    for column, name in enumerate(("Weight on the reconstruction", "Weight on the KL")):
        weights = {family: _weight(one.weights[:, column]) for family, one in result.fits.items()}
        if set(weights.values()) != {"1"}:
            same = len(set(weights.values())) == 1
            yield (
                name,
                next(iter(weights.values()))
                if same
                else ", ".join(f"{shown(family)}: {weight}" for family, weight in weights.items()),
            )


def _weight(weights: Tensor) -> str:
    """A weight over the steps of a fit, in words."""
    found = weights.unique()
    if len(found) > 1:
        return f"{float(found[0]):g} to {float(found[-1]):g}, by step"
    return f"{float(found[0]):g}" if len(found) else "1"


def _shapes(data: Any) -> str:
    if isinstance(data, Mapping):
        return ", ".join(f"{shown(name)}: {_shapes(value)}" for name, value in data.items())
    if isinstance(data, (tuple, list)):
        return " and ".join(_shapes(value) for value in data)
    return _shape(data.shape)


def _latent(posterior: Posterior, name: str) -> str:
    shape = posterior.draws[name].shape[1:]
    if posterior.is_joint:
        return f"{shown(name)} {_shape(shape)}" if shape else shown(name)
    own = f" {_shape(shape[1:])}" if len(shape) > 1 else ""
    return f"{shown(name)}{own} for each data point"


def _shape(sizes: Sequence[int]) -> str:
    return f"({', '.join(f'{size:,}' for size in sizes)})"
