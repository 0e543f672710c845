"""The command line: names to objects, results to files.

pyro-vi compare --data digits --out runs/digits
pyro-vi sample runs/digits/flow.pt --num 64 --out samples.png
"""

from __future__ import annotations

__all__ = ["main"]

import argparse
import csv
import difflib
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import __version__, data, networks
from pyro_vi.checks import check_seed, checked_device
from pyro_vi.comparison import Comparison, check_draws, compare, fit_each, judge_each
from pyro_vi.data import ImageData
from pyro_vi.diffusion import (
    Affine,
    CosineSchedule,
    Diffusion,
    LearnedSchedule,
    LinearSchedule,
    Schedule,
    UNet,
    Velocity,
)
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder, ForwardProcess
from pyro_vi.inference import (
    COUNT,
    POSITIVE,
    TEXT,
    Fit,
    Interruption,
    Kind,
    Maybe,
    check_entries,
    fit,
    interruptible,
    read_fit,
)
from pyro_vi.models import (
    DDPM,
    VAE,
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    LearnedDiscretizedLogistic,
    LearnedGaussian,
    PixelGaussian,
)
from pyro_vi.programs import Batches
from pyro_vi.reporting import report
from pyro_vi.weighting import warmup

_CONTEXT = 128  # width of the encoder's output, the families' context

_DATA: dict[str, Callable[[], ImageData]] = {
    "digits": data.digits,
    "fashion-mnist": data.fashion_mnist,
}
_FAMILIES: dict[str, Callable[[int, int], nn.Module]] = {
    "mean-field": MeanField,
    "full-covariance": FullCovariance,
    "low-rank": LowRank,
    "flow": Flow,
}
_LIKELIHOODS: dict[str, Callable[[int], nn.Module]] = {
    "bernoulli": lambda levels: Bernoulli(),
    "continuous-bernoulli": lambda levels: ContinuousBernoulli(),
    "gaussian": lambda levels: Gaussian(0.1),
    "learned-gaussian": lambda levels: LearnedGaussian(),
    "pixel-gaussian": lambda levels: PixelGaussian(),
    "discretized-logistic": DiscretizedLogistic,
}
_NETWORKS: dict[str, tuple[Any, Any]] = {
    "mlp": (networks.MLPEncoder, networks.MLPDecoder),
    "conv": (networks.ConvEncoder, networks.ConvDecoder),
}
_MODELS = {"vae": VAE, "ddpm": DDPM}
# Entries of a saved recipe; other releases may lack some.
_RECIPE = {
    "shape": Maybe(
        Kind(
            "a list of three whole numbers of at least 1",
            lambda value: (
                isinstance(value, list) and len(value) == 3 and all(map(POSITIVE.fits, value))
            ),
        )
    ),
    "levels": Maybe(COUNT),
    "latent_dim": Maybe(POSITIVE),
    "chain": Maybe(POSITIVE),
    **dict.fromkeys(("likelihood", "network", "family", "schedule"), Maybe(TEXT)),
}
_SCHEDULES: dict[str, Callable[[int, float], Schedule]] = {
    "learned": lambda steps, first: LearnedSchedule(steps, first=first),
    "cosine": lambda steps, first: CosineSchedule(steps),
    "linear": lambda steps, first: LinearSchedule(steps),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0: success. 1: a family failed; the others were written. 2: wrong input. 130: interrupted; one
    Ctrl-C writes the finished results, two write nothing.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        status: int = options.run(options)
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        reason = str(error).partition("\n")[0]  # without the shapes that Pyro adds
        print(f"{parser.prog}: error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing was written", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    formatter = partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=28)
    parser = argparse.ArgumentParser(prog="pyro-vi", description=_summary())
    parser.add_argument("--version", action="version", version=f"pyro-vi {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "compare",
        help="fit one VAE under several variational families, and diffusions, and judge them",
        description="Fits one VAE under several variational families, each with its own copy of"
        " the model, then once more with the best model frozen, so that inference alone differs;"
        " and diffusions, whose bounds stand in the first table. Prints the tables; leaves them,"
        " plots, a report, every fit, and netCDF files of the posteriors under the frozen model in"
        " the output folder.",
        formatter_class=formatter,
    )
    command.set_defaults(run=_compare, batch_size=None)
    add = command.add_argument
    add(
        "--data",
        default="digits",
        help="digits (8x8, from scikit-learn), fashion-mnist (Debian's dataset-fashion-mnist), a"
        " folder of IDX files, or an .npz file with arrays train and test",
    )
    add("--models", default="vae", help=f"comma-separated: {', '.join(_MODELS)}")
    add(
        "--families",
        default=",".join(_FAMILIES),
        help="of the VAE, comma-separated; differences are to the first",
    )
    add("--latent-dim", type=int, default=6, help="dimensions of the VAE's latent z")
    add(
        "--schedules",
        default="learned",
        help=f"noise schedules of the diffusions, comma-separated: {', '.join(_SCHEDULES)}",
    )
    add("--chain", type=int, default=100, help="steps T of a diffusion's chain")
    add(
        "--likelihood",
        default="auto",
        help=f"of a pixel in the VAE: {', '.join(_LIKELIHOODS)}, or auto: bernoulli with"
        " --binarize, discretized-logistic where the data have grey levels, else gaussian. A"
        " diffusion's has the same levels, or is a density too",
    )
    add("--binarize", action="store_true", help="draw each pixel as 0 or 1, anew in every batch")
    add("--network", default="mlp", help=f"the VAE's two: {', '.join(_NETWORKS)}")
    add(
        "--steps",
        type=int,
        default=1_500,
        help="gradient steps for each fit; a VAE's KL is warmed up over the first fifth",
    )
    add(
        "--batch-size",
        type=int,
        default=argparse.SUPPRESS,  # the help text states the default
        help="images in a step (default: 128, or all training images where they are fewer)",
    )
    add("--learning-rate", type=float, default=2e-3, help="of Adam; falls to 0 along a cosine")
    add("--seed", type=int, default=0, help="of initial weights, batches, noise and draws")
    add(
        "--device",
        default="auto",
        help="cpu, cuda, or auto: cuda where there is one",
    )
    add("--draws", type=int, default=1_000, help="posterior draws for each test image")
    add("--test-images", type=int, default=1_000, help="test images to judge on, at most")
    add("--threads", type=int, default=1, help="of the CPU; small networks gain nothing from more")
    add("--out", type=Path, default="runs/DATA", help="output folder")
    add(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write report.html, one page with both tables and all pictures",
    )
    add("--overwrite", action="store_true", help="replace the output folder if it exists")
    add("--quiet", action="store_true", help="no progress bars")

    command = commands.add_parser(
        "sample",
        help="draw images from a saved fit",
        description="Draws images from a fit that `pyro-vi compare` saved.",
        formatter_class=formatter,
    )
    command.set_defaults(run=_sample)
    add = command.add_argument
    add(
        "fit",
        type=Path,
        help="the saved fit, such as runs/digits/flow.pt; of a folder the one of the highest ELBO",
    )
    add("--num", type=int, default=64, help="how many images")
    add("--seed", type=int, default=0, help="of the draws")
    add("--out", type=Path, default=Path("samples.png"), help="the picture to write")
    add("--overwrite", action="store_true", help="replace the picture if it exists")
    return parser


def _summary() -> str:
    return "Fit, compare and judge variational posteriors of deep generative models."


def _compare(options: argparse.Namespace) -> int:
    families, schedules, device = _check_options(options)
    images = _checked_images(options)
    recipes = _recipes(options, images, families, schedules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        programs = _programs(recipes)
    vae, ddpm = _fit_options(options, images, device)
    _print_setting(options, images, recipes, families, schedules, device)
    makers = {
        name: partial(
            fit,
            *programs[name],
            images.train,
            progress=False if options.quiet else name,
            **(vae if name in families else ddpm),
        )
        for name in recipes
    }
    guides = {name: programs[name][1] for name in families}
    with interruptible() as interruption:
        results = _train_and_judge(options, images, makers, guides, vae, interruption)
        with _replacing(options.out) as folder:
            _write_all(options, folder, results, recipes)
    print(f"\nTables, plots and fits are in {options.out}")
    if options.report:
        print(f"All of it on one page: {options.out / 'report.html'}")
    if interruption.requested:
        return 130
    return int(any(result.failures for result in results.values()))


def _check_options(
    options: argparse.Namespace,
) -> tuple[list[str], list[str], torch.device | None]:
    """The families, the schedules and the device; sets the number of threads and the folder."""
    models = _names("model", options.models, _MODELS)
    families = _names("family", options.families, _FAMILIES)
    schedules = _names("schedule", options.schedules, _SCHEDULES)
    if "ddpm" not in models and (options.schedules, options.chain) != ("learned", 100):
        raise ValueError("--schedules and --chain are a diffusion's: add ddpm to --models")
    if "vae" not in models and families != list(_FAMILIES):
        raise ValueError("--families are a VAE's: add vae to --models")
    if not options.learning_rate > 0:
        raise ValueError(f"expected a positive learning rate, got {options.learning_rate}")
    if options.test_images < 2:
        raise ValueError(f"expected at least two test images, got {options.test_images}")
    if options.latent_dim < 2:
        raise ValueError(
            "expected at least two latent dimensions, since families differ in how they relate"
            f" them, got {options.latent_dim}"
        )
    check_draws(options.draws)
    if options.steps < 1:
        raise ValueError(f"expected at least one step, got {options.steps}")
    if options.chain < 1:
        raise ValueError(f"expected at least one step of the chain, got {options.chain}")
    check_seed(options.seed)
    if options.threads < 1:
        raise ValueError(f"expected at least one thread, got {options.threads}")
    torch.set_num_threads(options.threads)
    available = "cuda" if torch.cuda.is_available() else "cpu"
    device = checked_device(available if options.device == "auto" else options.device)
    if options.out == Path("runs/DATA"):
        options.out = Path("runs") / Path(options.data).stem
    _check_out(options.out, options.overwrite)
    return (
        families if "vae" in models else [],
        schedules if "ddpm" in models else [],
        device,
    )


def _checked_images(options: argparse.Namespace) -> ImageData:
    """The data set with the test images that are asked for; sets the batch size."""
    images = _load(options.data)
    images = replace(images, test=images.test[: options.test_images])
    if len(images.test) < 2 or images.shape[0] not in (1, 3):
        raise ValueError(
            "expected at least two test images, of one channel or three, got"
            f" {len(images.test)} of shape {images.shape}"
        )
    if options.batch_size is None:
        options.batch_size = min(128, len(images.train))
    Batches(images.train, batch_size=options.batch_size)  # raises if it exceeds the data
    return images


def _fit_options(
    options: argparse.Namespace, images: ImageData, device: torch.device | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of `fit` for a VAE, and for a diffusion."""
    both: dict[str, Any] = {
        "loss": TraceMeanField_ELBO(),
        "optim": partial(torch.optim.Adam, lr=options.learning_rate),
        "schedule": partial(CosineAnnealingLR, T_max=max(1, options.steps)),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "transform": data.binarize if options.binarize else None,
        "seed": options.seed,
        "device": device,
    }
    # Without a warm-up the families collapse to different numbers of active units by chance.
    return {**both, "kl_weight": warmup(max(1, options.steps // 5))}, {**both, "clip_norm": 1.0}


def _print_setting(
    options: argparse.Namespace,
    images: ImageData,
    recipes: Mapping[str, Mapping[str, Any]],
    families: Sequence[str],
    schedules: Sequence[str],
    device: torch.device | None,
) -> None:
    """Prints the data and the programs in one line."""
    programs = []
    if families:
        likelihood = recipes[families[0]]["likelihood"]
        programs.append(f"{likelihood} likelihood, {options.latent_dim} latent dimensions")
    if schedules:
        programs.append(f"diffusions of {options.chain:,} steps")
    print(
        f"{images.name}: {len(images.train):,} training images, {len(images.test):,} test images,"
        f" shape {images.shape}; {'; '.join(programs)}, on {device}",
        flush=True,
    )


def _train_and_judge(
    options: argparse.Namespace,
    images: ImageData,
    makers: Mapping[str, Callable[[], Fit]],
    guides: Mapping[str, Any],
    vae: Mapping[str, Any],
    interruption: Interruption,
) -> dict[str, Comparison]:
    """The comparisons by their heading: of all programs, and of the guides of one frozen model."""
    judged: dict[str, Any] = {"num_samples": options.draws, "progress": not options.quiet}
    fits, failures = fit_each(makers)
    joint = judge_each(
        makers,
        fits,
        failures,
        images,
        transform=vae["transform"],
        seed=options.seed,
        **judged,
    )
    heading = "Each with a model of its own"
    results = {heading: joint}
    print(f"{heading}:\n{joint}", flush=True)
    ranked = [row for row in joint.rows if row.family in guides and row.elbo == row.elbo]
    if ranked and not interruption.requested:
        best = max(ranked, key=lambda row: row.elbo)
        heading = f"Inference alone, with the model of {best.family} frozen"
        results[heading] = compare(
            joint.fits[best.family].model,
            {row.family: guides[row.family] for row in ranked},
            images,
            **judged,
            **vae,
        )
        print(f"\n{heading}:\n{results[heading]}", flush=True)
    return results


def _write_all(
    options: argparse.Namespace,
    folder: Path,
    results: Mapping[str, Comparison],
    recipes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes tables, plots, fits and the report into a folder."""
    text = "\n\n".join(f"{heading}:\n{result}" for heading, result in results.items())
    (folder / "comparison.txt").write_text(f"{text}\n", encoding="utf-8")
    joint, *inference = results.values()
    _write(folder, joint, recipes)
    if inference:
        _write_inference(folder, inference[0], recipes)
    if options.report:
        report(results, folder / "report.html")


def _write(folder: Path, joint: Comparison, recipes: Mapping[str, Mapping[str, Any]]) -> None:
    from pyro_vi import plots

    joint.to_csv(folder / "comparison.csv")
    for name, fitted in joint.fits.items():
        fitted.save(folder / f"{name}.pt", recipe=recipes[name])
    assert isinstance(joint.data, torch.Tensor)
    figures = {"losses": plots.losses, "samples": plots.samples}
    if joint.posteriors:
        figures["reconstructions"] = partial(plots.reconstructions, images=joint.data[:10])
    if joint.step_bounds:
        figures |= {"strips": plots.strips, "schedules": plots.schedules}
        if any(len(bound.steps) > 1 for bound in joint.step_bounds.values()):
            figures["bits"] = plots.bits
    for name, draw in figures.items():
        draw(joint).savefig(folder / f"{name}.png", dpi=120)


def _write_inference(
    folder: Path, alone: Comparison, recipes: Mapping[str, Mapping[str, Any]]
) -> None:
    from pyro_vi import plots

    alone.to_csv(folder / "inference.csv")
    (folder / "inference").mkdir()
    for name, fitted in alone.fits.items():
        fitted.save(folder / "inference" / f"{name}.pt", recipe=recipes[name])
        alone.posteriors[name].to_netcdf(folder / "inference" / f"{name}.nc")
    assert isinstance(alone.data, torch.Tensor)
    plots.posteriors(alone, alone.data[:4]).savefig(folder / "posteriors.png", dpi=120)
    plots.khats(alone).savefig(folder / "khat.png", dpi=120)


def _sample(options: argparse.Namespace) -> int:
    from pyro_vi import plots

    if options.out.is_dir():
        raise ValueError(f"{options.out} is a folder: name a file to write the picture to")
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"{options.out} exists; --overwrite replaces it")
    if options.fit.is_dir():
        options.fit = _best_of(options.fit)
    recipe = read_fit(options.fit)["recipe"]
    if not {"family", "schedule"} & recipe.keys():
        raise ValueError(f"{options.fit} was not saved by `pyro-vi compare`: load it from Python")
    check_entries(recipe, _RECIPE, options.fit, ("recipe",))
    try:
        model, guide = _programs({"": recipe})[""]
    except KeyError as error:
        raise ValueError(
            f"{options.fit} was saved by another release: its recipe has or lacks {error}"
        ) from error
    except Exception as error:  # invalid options may raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{options.fit} is damaged: 'recipe': the saved options build no program: {reason}"
        ) from error
    fitted = Fit.load(options.fit, model, guide)
    drawn = fitted.generate(options.num, expected=True, seed=options.seed)
    images = drawn["x_0" if "schedule" in recipe else "x"]
    form = options.out.suffix.lstrip(".") or "png"
    with tempfile.TemporaryDirectory(dir=_folder(options.out.parent)) as folder:
        picture = Path(folder) / "picture"
        plots.grid(images).savefig(picture, dpi=120, format=form)
        picture.replace(options.out)
    print(f"{options.num} {'sample' if options.num == 1 else 'samples'} of {options.fit}:", end=" ")
    print(options.out)
    return 0


def _best_of(folder: Path) -> Path:
    """The fit of the highest ELBO in a folder that `_compare` wrote."""
    table = folder / "comparison.csv"
    if not table.is_file():
        raise ValueError(f"{folder} was not written by `pyro-vi compare`: it has no {table.name}")
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["elbo"]]  # others failed
        elbos = {row["family"]: float(row["elbo"]) for row in rows}
        return folder / f"{max(elbos, key=elbos.__getitem__)}.pt"
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(
            f"{table} is damaged: expected columns family and elbo; pass the path of a fit in"
            f" {folder} instead"
        ) from error


def _recipes(
    options: argparse.Namespace,
    images: ImageData,
    families: Sequence[str],
    schedules: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """What it takes to build each program again, in plain values, by name."""
    likelihood = _likelihood(options, images)
    common = {"data": images.name, "shape": list(images.shape)}
    vae = {
        "latent_dim": options.latent_dim,
        "likelihood": likelihood,
        "levels": images.levels or 0,
        "network": _known("network", options.network, _NETWORKS),
    }
    discrete = {"bernoulli": 2, "discretized-logistic": images.levels}
    ddpm = {"chain": options.chain, "levels": discrete.get(likelihood) or 0}
    recipes = {name: {**common, **vae, "family": name} for name in families}
    recipes |= {f"ddpm-{name}": {**common, **ddpm, "schedule": name} for name in schedules}
    return recipes


def _programs(recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Model and guide of each; the families share one VAE, and so its first weights."""
    found: dict[str, tuple[Any, Any]] = {}
    vae = None
    for name, recipe in recipes.items():
        if "schedule" in recipe:
            found[name] = _diffusion(recipe)
            continue
        vae = _vae(recipe) if vae is None else vae
        encoder = Encoder(
            recipe["shape"],
            _FAMILIES[recipe["family"]](recipe["latent_dim"], _CONTEXT),
            network=_NETWORKS[recipe["network"]][0],
        )
        found[name] = vae, encoder
    return found


def _vae(recipe: Mapping[str, Any]) -> VAE:
    return VAE(
        recipe["shape"],
        recipe["latent_dim"],
        likelihood=_LIKELIHOODS[recipe["likelihood"]](recipe["levels"]),
        decoder=_NETWORKS[recipe["network"]][1],
    )


def _diffusion(recipe: Mapping[str, Any]) -> tuple[DDPM, ForwardProcess]:
    shape, chain, levels = recipe["shape"], recipe["chain"], recipe["levels"]
    # The first step's noise is about a grey level wide (values are from -1 to 1), or fine.
    first = min(-1.0, 2 * math.log(2 / (levels - 1)) + 1.2) if levels else -8.0
    diffusion = Diffusion(
        shape, _SCHEDULES[recipe["schedule"]](chain, first), coordinates=Affine(0.5, 0.5)
    )
    depth = max(1, int(math.log2(min(shape[1:]) / 4))) if min(shape[1:]) >= 8 else 0
    channels = [16 * 2**level for level in range(min(depth, 3) + 1)]
    model = DDPM(
        diffusion,
        UNet(shape, chain, channels=channels, attention=(len(channels) - 1,)),
        prediction=Velocity(),
        likelihood=LearnedDiscretizedLogistic(levels) if levels else LearnedGaussian(0.1),
    )
    return model, ForwardProcess(diffusion)


def _load(name: str) -> ImageData:
    if name in _DATA:
        return _DATA[name]()
    path = Path(name)
    if path.is_dir():
        return data.idx(path)
    if path.suffix == ".npz" or path.is_file():
        return data.npz(path)
    nearest = difflib.get_close_matches(name, _DATA, n=1, cutoff=0.4)
    raise ValueError(
        f"unknown data {name!r}: expected {', '.join(_DATA)}, a folder of IDX files or an .npz"
        f" file{f'; did you mean {nearest[0]}?' if nearest else ''}"
    )


def _likelihood(options: argparse.Namespace, images: ImageData) -> str:
    if options.likelihood == "auto":
        if options.binarize:
            return "bernoulli"
        return "discretized-logistic" if images.levels else "gaussian"
    name = _known("likelihood", options.likelihood, _LIKELIHOODS)
    if name == "discretized-logistic" and not images.levels:
        raise ValueError(
            f"the discretized logistic needs data with grey levels; those of {images.name} are"
            " continuous (an .npz file can say `levels`)"
        )
    if name == "bernoulli" and not options.binarize and images.levels != 2:
        raise ValueError(
            f"a Bernoulli likelihood takes 0 and 1 alone, and {images.name} has grey levels: add"
            " --binarize, or choose continuous-bernoulli or discretized-logistic"
        )
    return name


def _names(what: str, names: str, known: Mapping[str, Any]) -> list[str]:
    """Names that are separated by commas, each of them known, and there once."""
    found = [_known(what, name.strip(), known) for name in names.split(",")]
    if len(set(found)) != len(found):
        raise ValueError(f"expected each {what} once, got {names}")
    return found


def _known(what: str, name: str, known: Mapping[str, Any]) -> str:
    if name in known:
        return name
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    raise ValueError(
        f"unknown {what} {name!r}: expected one of {', '.join(known)}"
        f"{f'; did you mean {nearest[0]}?' if nearest else ''}"
    )


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuses before any work is done what could not be written at its end."""
    if out.exists():
        if not overwrite:
            raise ValueError(f"output folder {out} exists; --overwrite replaces it")
        if not out.is_dir():
            raise ValueError(f"{out} is a file, not a folder")
        ours = {"comparison.csv", "comparison.txt"}
        if any(out.iterdir()) and not ours <= {path.name for path in out.iterdir()}:
            raise ValueError(
                f"{out} is not replaced: pyro-vi compare did not write it (it holds no"
                f" {' and '.join(sorted(ours))})"
            )
        if out.is_mount():
            raise ValueError(
                f"{out} is a mount point, which cannot be replaced: name a folder in it"
            )
    above = next(folder for folder in out.resolve().parents if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=above):
            pass
    except OSError as error:
        raise ValueError(f"output folder {out} cannot be made: {error}") from error


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A fresh folder that becomes `out` when all is written, and vanishes if something fails."""
    out = out.resolve()
    with tempfile.TemporaryDirectory(dir=_folder(out.parent), prefix=f".{out.name}.") as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        fresh.mkdir()
        yield fresh
        if out.exists():
            out.rename(old)
        try:
            fresh.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
