"""Pyro's own tests of SVI, judged on `pyro_vi.SVI`: eager, and recorded as a graph.

    python benchmarks/pyro_suite.py CHECKOUT [--files test_gradient.py ...] [--inductor]

CHECKOUT is a copy of pyro-ppl's repository, of which only the tests are taken; the package is the
installed one. Each file of `tests/infer` runs three times, each time in a process of its own, which
loads this file as a plugin of pytest: with Pyro's SVI, and with ours in its place, eager and
recorded. A test that fails with Pyro's SVI too says nothing, so the outcomes are compared.

Most of these tests take one step, or ask for gradients alone. So the recorded kind follows a first
step with those that it takes to record, to prove and to replay, and gradients are the record's. It
runs as it is; with `--inductor` it is compiled, which takes hours for all files. What took longer
than `--limit` seconds counts as failed, for Pyro's SVI too.
"""

from __future__ import annotations

import argparse
import json
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch

from pyro_vi import calls, capture, compiled, reach, recorder, svi

KINDS = ("Pyro's", "eager", "recorded")
FILES = ("test_gradient.py", "test_valid_models.py", "test_inference.py", "test_autoguide.py")
Outcomes = dict[str, dict[str, Any]]  # of the tests, by name

_PREFIX = "steps stay eager: "
_now: dict[str, Any] = {"replayed": False, "refused": [], "other": []}  # of the test that runs


class _Gradients(pyro.optim.PyroOptim):
    """Keeps the gradients of a record."""

    def __init__(self) -> None:
        super().__init__(torch.optim.SGD, {"lr": 0.0})
        self.found: dict[Any, Any] = {}

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.found.clear()
        self.found.update((p, p.grad) for p in params)


class _Eager(svi.SVI):
    """Ours, without a compiled step in runs of any length."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compile=False, **kwargs)


class _Recorded(svi.SVI):
    """Ours, which replays as soon as it has recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compile=True, **kwargs)
        self._plain, self._first, self._inside = self.loss_and_grads, True, False
        if self._recorder is None:
            loss = args[3] if len(args) > 3 else kwargs["loss"]
            _now["other"].append(getattr(loss, "__name__", type(loss).__name__))
            return
        self._kept, self._records = _Gradients(), dict[Any, compiled.Recorded]()
        kept = {"told": self.told, "optim": self._kept}
        self._programs = SimpleNamespace(loss_and_grads=self._plain, **kept)
        self.loss_and_grads = self._gradients

    def step(self, *args: Any, **kwargs: Any) -> Any:
        first, self._first, self._inside = self._first, False, True
        try:
            loss = super().step(*args, **kwargs)
            for _ in range(3):  # one that is recorded, one that proves it, and one that is it
                kinds = self._recorder._kinds.values() if self._recorder is not None else ()
                if first and any(not kind.is_refused for kind in kinds):
                    loss = super().step(*args, **kwargs)
        finally:
            self._inside = False
        return loss

    def _gradients(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """What a test that takes no step asks for: the loss, and gradients in the parameters."""
        if self._inside:
            return self._plain(model, guide, *args, **kwargs)
        self._programs.model, self._programs.guide = model, guide
        before = {p: _copy(p.grad) for p in pyro.get_param_store()._params.values()}
        key, batch = recorder._key(args, kwargs)
        found = self._records.get(key)
        if found is None or found.stale() is not None:
            state = torch.get_rng_state()
            with svi._Parameters() as used, calls.Calls().seen() as seen:
                loss = self._plain(model, guide, *args, **kwargs)
            try:
                found = compiled.record(self._programs, seen, list(used.live()), args, kwargs)
            except capture.Uncapturable as error:
                _now["refused"].append(str(error))
                return loss
            self._records[key] = found
            torch.set_rng_state(state)
        loss = found(batch)[0].item()
        found.finish()
        for p, gradient in self._kept.found.items():  # added, as by a backward pass
            p.grad = gradient if before.get(p) is None else before[p] + gradient
        return loss


def _copy(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None else gradient.clone()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--svi", choices=KINDS, default=KINDS[0])
    parser.addoption("--inductor", action="store_true")
    parser.addoption("--limit", type=int, default=0, help="seconds for a test")
    parser.addoption("--outcomes", type=Path, help="file for a line of JSON a test")


def pytest_configure(config: pytest.Config) -> None:
    """Puts our SVI where Pyro's is, before the tests are imported."""
    kind, pyros = config.getoption("--svi"), pyro.infer.SVI
    if kind == "Pyro's":
        return
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("SVI") is pyros:
            module.SVI = _Eager if kind == "eager" else _Recorded  # type: ignore[attr-defined]
    if kind == "eager":
        return
    if not config.getoption("--inductor"):
        capture.Graph.compile = lambda self, batch: None  # type: ignore[method-assign]
    replay = compiled.Recorded.__call__

    def counted(self: Any, batch: Sequence[Any]) -> Any:
        status = replay(self, batch)
        _now["replayed"] |= bool(status[4])
        return status

    def collected(message: Any, *args: Any, **kwargs: Any) -> None:
        reason = str(message).removeprefix(_PREFIX)
        if reason != str(message):
            if not reason.startswith("those of"):  # of losses that are never recorded
                _now["refused"].append(reason)
        else:
            warnings.warn(message, *args, **kwargs)

    compiled.Recorded.__call__ = counted  # type: ignore[method-assign]
    reach._LIBRARIES.add(__name__)  # what this file keeps is no program's
    for module in (recorder, svi):
        module.warnings = SimpleNamespace(warn=collected)  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _now.clear()
    _now.update(name=item.nodeid, outcome="passed", error="", replayed=False, refused=[], other=[])
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
    command += [*(["--inductor"] if options.inductor else []), *options.pytest]
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
    parser.add_argument("--inductor", action="store_true", help="compile the records")
    parser.add_argument("--limit", type=int, default=300, help="seconds for a test")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="options for pytest")
    options = parser.parse_args()
    results: dict[str, list[Outcomes]] = {}
    print(f"{'':22}{'tests':>6}  passed:", *(f"{kind:>8}" for kind in KINDS), end="")
    print(f"{'replayed':>10}{'refused':>9}   seconds")
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
            print(f"{sum(one['replayed'] for one in last.values()):10}", end="")
            print(f"{sum(bool(one['refused']) for one in last.values()):9}   ", end="")
            print(", ".join(f"{seconds:.0f}" for _, seconds in found), flush=True)
    report(results)


def report(results: dict[str, list[Outcomes]]) -> None:
    """Prints the differences from Pyro's, and why steps were not recorded."""
    counts: dict[str, Counter[str]] = {"refused": Counter(), "of losses not recorded": Counter()}
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
            counts["of losses not recorded"].update(set(one["other"]))
    for title, counted in counts.items():
        print(f"\ntests with steps {title}:")
        for reason, count in counted.most_common():
            print(f"{count:6}  {reason}")


if __name__ == "__main__":
    main()
