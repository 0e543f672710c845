"""Pyro's own tests of SVI, judged on `pyro_vi.SVI`: eager, and compiled.

    python benchmarks/pyro_suite.py CHECKOUT [--files test_gradient.py ...]

CHECKOUT is a copy of pyro-ppl's repository, of which only the tests are taken; the package is the
installed one. Each file of `tests/infer` runs three times, each time in a process of its own, which
loads this file as a plugin of pytest: with Pyro's SVI, and with ours in its place, eager and
compiled. A test that fails with Pyro's SVI too says nothing, so the outcomes are compared.

Most of these tests take one step, or ask for gradients alone. So the compiled kind follows a first
step with those that it takes to record, to prove and to run compiled, and gradients come from a
compiled step too. Steps of every size become C. What took longer than `--limit` seconds counts as
failed, for Pyro's SVI too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch

from pyro_vi.compiling import backends, steps
from pyro_vi.inference import svi

KINDS = ("Pyro's", "eager", "compiled")
FILES = ("test_gradient.py", "test_valid_models.py", "test_inference.py", "test_autoguide.py")
Outcomes = dict[str, dict[str, Any]]  # of the tests, by name

_FIRST = 5  # steps of which the last is a compiled one
_now: dict[str, Any] = {"compiled": False, "refused": [], "other": []}  # of the test that runs


class _Eager(svi.SVI):
    """Ours, whatever the settings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compile=False, **kwargs)


class _Gradients(pyro.optim.PyroOptim):
    """Keeps the gradients of a step, and moves nothing."""

    def __init__(self) -> None:
        super().__init__(torch.optim.SGD, {"lr": 0.0})
        self.found: dict[Any, Any] = {}

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.found = {p: _copy(p.grad) for p in params}


class _Compiled(svi.SVI):
    """Ours, whose first step is followed by as many as it takes to have a compiled one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compile=True, **kwargs)
        self._first, self._inside, self._inner = True, False, dict[Any, svi.SVI]()
        self._given = args[3] if len(args) > 3 else kwargs["loss"]
        if self._compiler is None:
            _now["other"].append(getattr(self._given, "__name__", type(self._given).__name__))
            return
        self._plain = self.loss_and_grads
        self.loss_and_grads = self._gradients

    def step(self, *args: Any, **kwargs: Any) -> Any:
        times = _FIRST if self._first and self._compiler is not None else 1
        self._first, self._inside = False, True
        try:
            for _ in range(times):
                loss = super().step(*args, **kwargs)
        finally:
            self._inside = False
            _now["compiled"] |= self.compiled_steps > 0
        return loss

    def _gradients(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """What a test that takes no step asks for: the loss, and gradients in the parameters."""
        if self._inside:
            return self._plain(model, guide, *args, **kwargs)
        inner, store = self._inner.get((model, guide)), pyro.get_param_store()
        if inner is None:
            inner = svi.SVI(model, guide, _Gradients(), self._given, compile=True)
            self._inner[model, guide] = inner
        before = {p: _copy(p.grad) for p in store._params.values()}
        state = torch.get_rng_state()
        for _ in range(1 if inner.compiled_steps else _FIRST):
            torch.set_rng_state(state)
            for p in store._params.values():
                p.grad = None
            loss = inner.step(*args, **kwargs)
        _now["compiled"] |= inner.compiled_steps > 0
        for p, gradient in inner.optim.found.items():  # added, as by a backward pass
            p.grad = gradient if before.get(p) is None else before[p] + gradient
        return loss


def _copy(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None else gradient.clone()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--svi", choices=KINDS, default=KINDS[0])
    parser.addoption("--limit", type=int, default=0, help="seconds for a test")
    parser.addoption("--outcomes", type=Path, help="file for a line of JSON a test")


def pytest_configure(config: pytest.Config) -> None:
    """Puts our SVI where Pyro's is, before the tests are imported."""
    kind, pyros = config.getoption("--svi"), pyro.infer.SVI
    if kind == "Pyro's":
        return
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("SVI") is pyros:
            module.SVI = _Eager if kind == "eager" else _Compiled  # type: ignore[attr-defined]
    backends.LARGE = math.inf  # type: ignore[assignment]

    def collected(message: Any, *args: Any, **kwargs: Any) -> None:
        said = re.match("steps stay eager: (?!those of)|the compiled step is dropped", str(message))
        if said:  # else of losses that are never recorded, or of something else
            _now["refused"].append(str(message).removeprefix("steps stay eager: "))
        elif not str(message).startswith("steps stay eager"):
            warnings.warn(message, *args, **kwargs)

    for module in (steps, svi):
        module.warnings = SimpleNamespace(warn=collected)  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _now.clear()
    _now.update(name=item.nodeid, outcome="passed", error="", compiled=False, refused=[], other=[])
    result = yield
    with open(item.config.getoption("--outcomes"), "a") as file:
        file.write(json.dumps(_now) + "\n")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    limit = item.config.getoption("--limit")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"took more than {limit} s"))
    signal.alarm(limit)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "wasxfail"):
        _now["outcome"] = "xfailed" if report.skipped else "xpassed"
    elif not report.passed:
        _now["outcome"] = report.outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        _now["error"] = crash.message.partition("\n")[0] if crash is not None else ""


def run(folder: Path, file: str, kind: str, options: argparse.Namespace) -> tuple[Outcomes, float]:
    """One file with one kind of SVI: what became of its tests, and the seconds it took."""
    lines = folder / f"{file}.{KINDS.index(kind)}.jsonl"
    lines.touch()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pyro_suite", "-p", "no:cacheprovider"]
    command += ["--svi", kind, "--outcomes", str(lines), "--limit", str(options.limit)]
    command += options.pytest
    path = f"{Path(__file__).resolve().parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    started = time.perf_counter()
    done = subprocess.run(
        [*command, f"tests/infer/{file}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1):
        print(f"{file}, {kind}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    return {one["name"]: one for one in found}, time.perf_counter() - started


def main() -> None:
    """Runs the suite; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of pyro-ppl/pyro")
    parser.add_argument("--files", nargs="+", default=FILES, metavar="FILE")
    parser.add_argument("--limit", type=int, default=300, help="seconds for a test")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="options for pytest")
    options = parser.parse_args()
    results: dict[str, list[Outcomes]] = {}
    print(f"{'':22}{'tests':>6}  passed:", *(f"{kind:>8}" for kind in KINDS), end="")
    print(f"{'in C':>10}{'refused':>9}   seconds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(options.checkout / "tests", folder / "tests")
        shutil.copy(options.checkout / "setup.cfg", folder)  # its filters of warnings
        for file in options.files:
            found = [run(folder, file, kind, options) for kind in KINDS]
            results[file] = [outcomes for outcomes, _ in found]
            first, *_, last = results[file]
            print(f"{file:22}{len(first):6}{'':9}", end="")
            for outcomes in results[file]:
                print(f"{sum(one['outcome'] == 'passed' for one in outcomes.values()):9}", end="")
            print(f"{sum(one['compiled'] for one in last.values()):10}", end="")
            print(f"{sum(bool(one['refused']) for one in last.values()):9}   ", end="")
            print(", ".join(f"{seconds:.0f}" for _, seconds in found), flush=True)
    report(results)


def report(results: dict[str, list[Outcomes]]) -> None:
    """Prints the differences from Pyro's, and why steps were not compiled."""
    counts: dict[str, Counter[str]] = {"refused": Counter(), "of losses not compiled": Counter()}
    print("\noutcomes that differ from Pyro's:")
    for pyros, *ours in results.values():
        for name, before in pyros.items():
            found = {
                kind: outcomes.get(name, {"outcome": "not run", "error": ""})
                for kind, outcomes in zip(KINDS[1:], ours, strict=True)
            }
            if differ := [k for k, one in found.items() if one["outcome"] != before["outcome"]]:
                print(f"{name}: {', '.join(differ)} {found[differ[0]]['outcome']}")
                error = found[differ[0]]["error"] or f"Pyro's {before['outcome']}"
                print(f"    {error[:200]}")
        for one in ours[-1].values():
            reasons = {re.sub(r" \(\S+:\d+\)$", "", reason) for reason in one["refused"]}
            counts["refused"].update(reasons)
            counts["of losses not compiled"].update(set(one["other"]))
    for title, counted in counts.items():
        print(f"\ntests with steps {title}:")
        for reason, count in counted.most_common():
            print(f"{count:6}  {reason}")


if __name__ == "__main__":
    main()
