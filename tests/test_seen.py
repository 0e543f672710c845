"""All that programs read is seen when it changes, wherever it is; nothing else is an alarm."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections import ChainMap, UserDict
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import nullcontext
from contextvars import ContextVar
from copy import deepcopy
from functools import lru_cache, partial, singledispatch
from operator import attrgetter
from pathlib import Path
from threading import local
from types import MappingProxyType, SimpleNamespace
from typing import Any
from weakref import ref

import places
import pyro
import pytest
import torch
from places import (
    AttrDict,
    Case,
    Network,
    Trainer,
    X,
    behind_code,
    draw,
    observe,
    reset,
    times,
    unseeable,
)
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset

from pyro_vi.compiled import Recorded
from pyro_vi.svi import SVI

pytestmark = pytest.mark.usefixtures("double", "recorded_alone")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each step that a record took."""
    found, replay = list[None](), Recorded.__call__

    def counted(self: Recorded, batch: Any) -> Tensor:
        found.append(None)
        return replay(self, batch)

    monkeypatch.setattr(Recorded, "__call__", counted)
    return found


def started(build: Callable[[], Case], compile: bool) -> tuple[Case, Callable[[], float]]:
    """A run, from the same seed each time, in which gradients tell in the parameters."""
    reset()
    pyro.clear_param_store()
    torch.manual_seed(0)
    case = build()
    optim = pyro.optim.SGD({"lr": 0.01, "momentum": 0.9})
    svi = SVI(case.model, case.guide, optim, Trace_ELBO(), compile=compile)

    def step() -> float:
        with case.around:
            return svi.step(case.batch)

    return case, step


def numbers() -> list[float]:
    """Of the store."""
    params = [p.detach().flatten() for p in pyro.get_param_store()._params.values()]
    return torch.cat(params).tolist()


def check_seen(build: Callable[[], Case], words: str, replays: list[None]) -> None:
    """Of five steps a record takes two; then something changes, and matters."""
    found = {}
    for kind in ("unchanged", "eager", "compiled"):
        case, step = started(build, kind == "compiled")
        losses = [step() for _ in range(5)]
        assert len(replays) == (2 if kind == "compiled" else 0)
        if kind != "unchanged":
            case.then()
        said = pytest.warns(
            UserWarning, match="the next 20 steps of each .*: .*" + re.escape(words)
        )
        with said if kind == "compiled" else nullcontext():
            losses.append(step())
        found[kind] = [*losses, step(), step(), *numbers()]
    assert len(replays) == 2
    assert found["compiled"] == pytest.approx(found["eager"], rel=1e-10, abs=0.0)
    assert found["unchanged"] != pytest.approx(found["eager"], rel=1e-6)


def check_replayed(build: Callable[[], Case], replays: list[None]) -> None:
    """All steps but three are a record's, without a warning."""
    found = []
    for compile in (False, True):
        case, step = started(build, compile)
        losses = []
        for _ in range(12):
            losses.append(step())
            case.then()
        found.append(losses + numbers())
    assert len(replays) == 12 - 3
    assert found[1] == pytest.approx(found[0], rel=1e-10, abs=0.0)


HYPER = """
from types import SimpleNamespace
from torch import nn
BETA, TABLE, SPACE = 1.0, {"beta": 1.0}, SimpleNamespace(beta=1.0)
class Config:
    beta = 1.0
    def times(self):
        return self.beta * BETA
CONFIG = Config()
def read():
    return BETA
layer, other, dropout = nn.Linear(1, 1), nn.Linear(1, 1), nn.Dropout(0.5)
"""
FILES = {  # what a program reads there, what becomes 2.0, and how that is called
    "number": ("hyper.BETA", "hyper.BETA", "'hyper.BETA"),
    "dictionary": ("hyper.TABLE['beta']", "hyper.TABLE['beta']", "'hyper.TABLE.beta"),
    "namespace": ("hyper.SPACE.beta", "hyper.SPACE.beta", "'SimpleNamespace.beta"),
    "class": ("hyper.Config.beta", "hyper.Config.beta", "'Config.beta"),
    "behind a method": ("hyper.CONFIG.times()", "hyper.BETA", "'BETA"),
    "behind a function": ("hyper.read()", "hyper.BETA", "'BETA"),
    "submodule": ("hypers.deep.BETA", "hypers.deep.BETA", "'hypers.deep.BETA"),
    "import": ("import hyper; hyper.BETA", "hyper.BETA", "'hyper.BETA"),
    "import from": ("from hyper import BETA; BETA", "hyper.BETA", "'hyper.BETA"),
    "import of a submodule": ("import hypers.deep as h; h.BETA", "hypers.deep.BETA", "BETA"),
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Makes a module that reads of others, which are new too."""
    (tmp_path / "hypers").mkdir()
    (tmp_path / "hypers" / "__init__.py").touch()
    for path in (tmp_path / "hyper.py", tmp_path / "hypers" / "deep.py"):
        path.write_text(HYPER)
    monkeypatch.syspath_prepend(tmp_path)

    def forget() -> None:
        for name in ("hyper", "hypers", "hypers.deep", "hyper_read"):
            sys.modules.pop(name, None)

    def loaded(reading: str) -> Any:
        forget()
        *imports, read = reading.split("; ")
        lines = "".join(f"    {line}\n" for line in [*imports, f"return {read}"])
        (tmp_path / "hyper_read.py").write_text(f"import hyper, hypers.deep\ndef read():\n{lines}")
        return importlib.import_module("hyper_read")

    yield loaded
    forget()


@pytest.mark.parametrize("name", FILES)
def test_what_is_in_other_files_is_seen(
    name: str, load: Callable[[str], Any], replays: list[None]
) -> None:
    read, place, words = FILES[name]

    def build() -> Case:
        module = load(read)
        return Case(times(module.read), lambda: exec(f"{place} = 2.0", vars(module)))

    check_seen(build, f"{words}' is 2.0, and was 1.0", replays)


def layers(load: Callable[[str], Any], change: str) -> Case:
    """Layers of another file, of which a model trains one."""
    module = load("hyper.layer, hyper.dropout")
    read = module.read

    def model(x: Tensor) -> None:
        layer, dropout = read()
        pyro.module("layer", layer)
        observe(layer(dropout(draw().expand(20)).mean().reshape(1))[0], x)

    return Case(model, lambda: exec(change, vars(module)))


LAYERS = {
    "exchanged": ("hyper.layer = hyper.other", "'hyper.layer' is another one"),
    "frozen": ("hyper.layer.requires_grad_(False)", "was frozen, thawed or hooked"),
    "mode": ("hyper.dropout.eval()", "'Dropout.training' is False, and was True"),
}


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")  # says Pyro
@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_other_files_are_seen(
    name: str, load: Callable[[str], Any], replays: list[None]
) -> None:
    check_seen(partial(layers, load, LAYERS[name][0]), LAYERS[name][1], replays)


def test_layers_in_other_files_are_trained(load: Callable[[str], Any], replays: list[None]) -> None:
    check_replayed(partial(layers, load, ""), replays)
    assert pyro.param("layer$$$bias").grad is not None  # the layer's own
    assert pyro.param("layer$$$bias") is sys.modules["hyper"].layer.bias


@pytest.mark.parametrize("name", behind_code())
def test_what_is_behind_code_is_seen(name: str, replays: list[None]) -> None:
    words = behind_code()[name][1]
    check_seen(lambda: behind_code()[name][0], words, replays)


def options(*bases: type, **attributes: Any) -> Callable[[], Any]:
    """Makes an object of a class of its own."""
    return lambda: type("Options", bases, deepcopy(attributes))()


class Other:
    """What an object may become."""

    beta = 2.0


NEW, OTHER = "is 2.0, and was absent", "is another one"
GONE, space = "is None, and was absent", partial(SimpleNamespace, beta=1.0)
BETA, LATE, MEAN = ("beta", 2.0), ("late", 2.0), ("running_mean", torch.zeros(20))
batch_norm = partial(nn.BatchNorm1d, 10, affine=False)
masked, unmasked = partial(SimpleNamespace, mask=X), partial(SimpleNamespace, mask=None)
HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], tuple[str, Any], str]] = {
    "by name": (options(beta=1.0), lambda o: getattr(o, "beta", 0.5), BETA, NEW),
    "late": (options(), lambda o: getattr(o, "late", 1.0), LATE, NEW),
    "asked for": (options(), lambda o: 2.0 if hasattr(o, "late") else 1.0, LATE, NEW),
    "by a made name": (space, lambda o: getattr(o, f"{'be'}ta"), BETA, "is 2.0, and was 1.0"),
    "shadowed": (options(mask=X), lambda o: 1.0 if o.mask is None else 2.0, ("mask", None), GONE),
    "of a dictionary": (options(dict, beta=1.0), lambda o: o.beta, BETA, NEW),
    "entry": (partial(AttrDict, beta=1.0), lambda o: o.beta, BETA, "is 2.0, and was 1.0"),
    "shape of a buffer": (batch_norm, lambda o: len(o.running_mean) / 10, MEAN, OTHER),
    "tensor": (unmasked, lambda o: 1.0 if o.mask is None else 2.0, ("mask", X), OTHER),
    "None": (masked, lambda o: 2.0 if o.mask is None else 1.0, ("mask", None), OTHER),
}


@pytest.mark.parametrize("name", HELD)
def test_attributes_are_seen(name: str, replays: list[None]) -> None:
    make, read, (attribute, value), words = HELD[name]

    def build() -> Case:
        held = make()
        return Case(times(lambda: read(held)), lambda: setattr(held, attribute, value))

    check_seen(build, f".{attribute}' {words}", replays)


class Settings:
    """An object of a user's, in which a number is kept."""

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta


class Late:
    """An attribute that its objects may have one day."""


class Kind(type):
    """What a class keeps may be its own class's."""

    beta = 1.0


class Kinds(metaclass=Kind):
    """Has one that it does not have."""


class Slotted:
    """Its attribute goes by another name outside."""

    __slots__ = ("__beta",)

    def __init__(self) -> None:
        self.set(1.0)

    def set(self, beta: float) -> None:
        self.__beta = beta

    def get(self) -> float:
        return self.__beta


Held = tuple[Callable[[], Any], Callable[[], Any], str]  # what reads, what changes, what is said


def in_libraries() -> dict[str, Held]:
    """Where objects of Python's and torch's keep what is a user's."""
    parts, user, chain = UserDict(beta=1.0), Settings(), ChainMap({}, {"beta": 1.0})
    file, inner, data = ConfigParser(), {"beta": 1.0}, TensorDataset(torch.ones(1))
    file["a"], view, key, some = (
        {"beta": "1"},
        MappingProxyType(inner),
        {user: 1},
        frozenset([user]),
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule, slotted, weak = StepLR(optimizer, 10), Slotted(), ref(user)
    weights, own = torch.ones(1), local()
    weights.beta = own.beta = 1.0  # type: ignore[attr-defined]
    named, settings = attrgetter("beta"), lru_cache(Settings)
    change = partial(setattr, user, "beta", 2.0)
    for one, name in ((Late, "late"), (places, "LATE")):
        if hasattr(one, name):
            delattr(one, name)
    Kind.beta = 1.0

    @singledispatch
    def overloaded(value: object) -> float:
        return 1.0

    return {
        "attrgetter": (lambda: named(user), change, "'Settings.beta' is 2.0, and was 1.0"),
        "cached": (
            lambda: settings().beta,
            lambda: setattr(settings(), "beta", 2.0),
            "'Settings.beta' is 2.0, and was 1.0",
        ),
        "UserDict": (
            lambda: parts["beta"],
            lambda: parts.update(beta=2.0),
            "'UserDict.data.beta' is 2.0, and was 1.0",
        ),
        "ChainMap": (
            lambda: chain["beta"],
            lambda: chain.update(beta=2.0),
            "'ChainMap.maps.0' has 1 entries, and had 0",
        ),
        "ConfigParser": (
            lambda: float(file["a"]["beta"]),
            lambda: file["a"].update(beta="2"),
            "'ConfigParser._sections.a.beta' is '2', and was '1'",
        ),
        "view": (
            lambda: view["beta"],
            lambda: inner.update(beta=2.0),
            "'view.beta' is 2.0, and was 1.0",
        ),
        "data set": (
            lambda: data[0][0],
            lambda: setattr(data, "tensors", (torch.full((1,), 2.0),)),
            "'TensorDataset.tensors' is another one",
        ),
        "schedule": (
            lambda: 1.0 + schedule.last_epoch,
            lambda: setattr(schedule, "last_epoch", 1),
            "'StepLR.last_epoch' is 1, and was 0",
        ),
        "optimizer": (
            lambda: optimizer.param_groups[0]["lr"],
            lambda: optimizer.param_groups[0].update(lr=2.0),
            "'SGD.param_groups.0.lr' is 2.0, and was 1.0",
        ),
        "of a file, late": (
            lambda: getattr(places, "LATE", 1.0),
            lambda: setattr(places, "LATE", 2.0),
            "'places.LATE' is 2.0, and was absent",
        ),
        "of a class, late": (
            lambda: getattr(LATE_ONE, "late", 1.0),
            lambda: setattr(Late, "late", 2.0),
            "'Late.late' is 2.0, and was absent",
        ),
        "private slot": (
            slotted.get,
            lambda: slotted.set(2.0),
            "'Slotted._Slotted__beta' is 2.0, and was 1.0",
        ),
        "class of a class": (
            lambda: Kinds.beta,
            lambda: setattr(Kind, "beta", 2.0),
            "'Kind.beta' is 2.0, and was 1.0",
        ),
        "frozen set": (lambda: max(some).beta, change, "'Settings.beta' is 2.0, and was 1.0"),
        "key": (lambda: max(key).beta, change, "'Settings.beta' is 2.0, and was 1.0"),
        "weak": (lambda: weak().beta, change, "'Settings.beta' is 2.0, and was 1.0"),
        "of a thread": (
            lambda: own.beta,
            lambda: setattr(own, "beta", 2.0),
            "'_local.beta' is 2.0, and was 1.0",
        ),
        "of a tensor": (
            lambda: weights.beta,  # type: ignore[attr-defined]
            lambda: setattr(weights, "beta", 2.0),
            "'Tensor.beta' is 2.0, and was 1.0",
        ),
        "overloaded": (
            lambda: overloaded(1.0),
            lambda: overloaded.register(float, lambda value: 2.0),
            "has 2 entries, and had 1",
        ),
    }


LATE_ONE = Late()


@pytest.mark.parametrize("name", in_libraries())
def test_what_objects_of_libraries_keep_is_seen(name: str, replays: list[None]) -> None:
    def build() -> Case:
        read, change, _ = in_libraries()[name]
        return Case(times(read), change)

    check_seen(build, in_libraries()[name][2], replays)


def test_what_the_environment_says_is_seen(
    monkeypatch: pytest.MonkeyPatch, replays: list[None]
) -> None:
    def build() -> Case:
        monkeypatch.setenv("BETA", "1")
        read = lambda: float(os.environ["BETA"])  # noqa: E731
        return Case(times(read), lambda: monkeypatch.setenv("BETA", "2"))

    check_seen(build, "os.environ['BETA']", replays)


def test_another_class_of_an_object_is_seen(replays: list[None]) -> None:
    def build() -> Case:
        held = options(beta=1.0)()
        return Case(times(lambda: held.beta), lambda: setattr(held, "__class__", Other))

    check_seen(build, "the class of an object was exchanged", replays)


@pytest.mark.parametrize("keeps", [lambda m: m, lambda m: SimpleNamespace(module=m)])
def test_a_module_that_is_kept_is_followed(
    keeps: Callable[[Any], Any], load: Callable[[str], Any], replays: list[None]
) -> None:
    def build() -> Case:
        file = load("hyper.BETA")
        kept = keeps(file.hyper)
        read = lambda: getattr(kept, "module", kept).BETA  # noqa: E731
        return Case(times(read), lambda: setattr(file.hyper, "BETA", 2.0))

    check_seen(build, "hyper.BETA' is 2.0, and was 1.0", replays)


@pytest.mark.parametrize("base", [object, nn.Module])
def test_dictionaries_of_classes_are_seen(base: type, replays: list[None]) -> None:
    def build() -> Case:
        held = options(base, table={"beta": 1.0})()
        return Case(times(lambda: held.table["beta"]), lambda: held.table.update(beta=2.0))

    check_seen(build, "'Options.table.beta' is 2.0, and was 1.0", replays)


def trainer(model: str) -> Case:
    own = Trainer()
    return Case(getattr(own, model), own.note)


def network(**options: Any) -> Case:
    net = Network(**options)
    return Case(net, net.note)


def entries() -> Case:
    own: Any = AttrDict(beta=1.0, size=(28, 28), values=[1.0], items=3)
    return Case(times(lambda: own.beta), lambda: None)


QUIET: dict[str, Callable[[], Case]] = {
    "eval of a trainer": partial(trainer, "quiet"),
    "getattr of a trainer": partial(trainer, "by_name"),
    "name of a global": partial(trainer, "by_data"),
    "module": network,
    "vocabulary": partial(network, words=20_000),
    "eval of a module": partial(network, is_quiet=True),
    "entries": entries,
}


@pytest.mark.parametrize("name", QUIET)
def test_what_is_not_read_is_no_alarm(name: str, replays: list[None]) -> None:
    check_replayed(QUIET[name], replays)


@pytest.mark.parametrize("name", unseeable())
def test_what_cannot_be_seen_is_refused(name: str, replays: list[None]) -> None:
    words, found = re.escape(unseeable()[name][1]), []
    for compile in (False, True):
        case, step = started(lambda: unseeable()[name][0], compile)
        said = pytest.warns(UserWarning, match=f"steps stay eager: .*{words}")
        with said if compile else nullcontext():
            losses = [step() for _ in range(6)]
        found.append([*losses, *numbers(), *case.then()])
    assert not replays and found[1] == found[0]


def test_a_late_look_finds_what_no_place_tells(replays: list[None]) -> None:
    found = []
    for compile in (False, True):
        rate = ContextVar("rate", default=1.0)
        _, step = started(partial(Case, times(rate.get)), compile)
        found.append([step() for _ in range(3 + 150)])
    assert len(replays) == 149  # and the 100th both ways
    assert found[1] == pytest.approx(found[0], rel=1e-10)
    rate.set(2.0)
    for _ in range(49):
        step()
    with pytest.warns(UserWarning, match="eager: after 200 compiled steps, one has another loss"):
        step()
    for _ in range(5):
        step()
    assert len(replays) == 198


def test_late_looks_change_nothing(replays: list[None]) -> None:
    found = []
    for compile in (False, True):
        _, step = started(partial(Case, times(lambda: 1.0)), compile)
        found.append([*(step() for _ in range(1000)), *numbers()])
    assert len(replays) == 1000 - 3 - 4  # the 100th, 200th, 400th and 800th
    assert found[1] == pytest.approx(found[0], rel=1e-8, abs=1e-12)
