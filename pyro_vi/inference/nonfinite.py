"""Errors that end training: a NaN in loss or gradient, a parameter or value outside its constraint.

A distribution checks its parameters when it is made and values when they are scored. A step that is
too large drives a scale to 0, a rate to infinity, or a covariance out of the positive definite
matrices. Then the check raises an error before the loss becomes NaN. Both raise `NonFiniteError`.
"""

from __future__ import annotations

__all__ = ["LastGood", "NonFiniteError", "describe_constraint_error", "is_support_error"]

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyro_vi.inference.fitted import Fit

_ADVICE = (
    "The usual cause is a step that is too large: lower the learning rate"
    " (optim=partial(torch.optim.Adam, lr=...)), clip the gradient (clip_norm=10.0), or bound"
    " scales and rates away from 0 in the program"
)


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not finite, or a parameter or value that left its constraint.

    Attributes:
        step: the step at which it appeared, from 0.
        fit: the fit with the parameters of the last step whose loss was finite.
    """

    def __init__(self, message: str, *, step: int, fit: Fit) -> None:
        super().__init__(message)
        self.step, self.fit = step, fit


class LastGood:
    """The values that some tensors had in the last step whose loss was finite.

    The loss is known only after the update has changed the tensors. So `mark` copies the values
    before a step, and `accept` keeps that copy once the loss is known to be finite. Compiled steps
    do the same by themselves.

    Args:
        tensors: parameters and buffers; they must be changed only in place.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._marked: list[Tensor] | None = None
        self._good: list[Tensor] | None = None

    def mark(self) -> None:
        """Copies the present values."""
        if self._marked is None:
            self._marked = [tensor.clone() for tensor in self._tensors]
        elif self._tensors:
            torch._foreach_copy_(self._marked, self._tensors)

    def accept(self) -> None:
        """Keeps the values of the last `mark`."""
        assert self._marked is not None
        if self._good is None:
            self._good = [tensor.clone() for tensor in self._marked]
        elif self._good:
            torch._foreach_copy_(self._good, self._marked)

    def state_dict(self) -> dict[str, Any]:
        """The last good values."""
        return {"good": None if self._good is None else [one.clone() for one in self._good]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self._good = None if state["good"] is None else [one.clone() for one in state["good"]]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Every tensor, and the tensor with its last good value; compiled steps update that."""
        return list(zip(self._tensors, self._good or (), strict=False))

    def restore(self) -> None:
        """Puts the last good values back; without a good copy, nothing changes."""
        if self._good:
            torch._foreach_copy_(self._tensors, self._good)


def describe_constraint_error(error: Exception, where: str) -> str | None:
    """The message for an error about a parameter or value outside of its constraint.

    Args:
        error: what a step raised.
        where: where it was raised, in words, unless the error names a site itself.

    Returns:
        Where, what, and what to do; None for an error of another kind.
    """
    text = str(error)
    named = re.search(r"Error while computing log_prob at site '([^']*)'", text)
    if named:
        where = f"site {named[1]!r}"
    if match := _CONSTRAINT.search(text):
        kind, shape, distribution, constraint, values = match.groups()
        what = (
            f"{kind} of {distribution}, of shape {shape}, left its constraint {constraint}: its"
            f" values are {_short(values)}"
        )
    elif match := _SUPPORT.search(text):
        shape, constraint, distribution, values = match.groups()
        what = (
            f"a value of shape {shape} left the support of {distribution}, {constraint}: it is"
            f" {_short(values)}"
        )
    elif match := _MATRIX_OR_SAMPLER.search(text):
        what = match[0]
    else:
        return None
    return f"{where}: {what}. {_ADVICE}"


def is_support_error(error: Exception) -> bool:
    """Whether an error says that a value is outside of its distribution's support."""
    return bool(_SUPPORT.search(str(error)))


# What torch's distributions say of a parameter and of a value that they refuse.
_CONSTRAINT = re.compile(
    r"Expected (parameter \w+) \(\w+ of shape (\(.*?\))\) of distribution (\w+).*?"
    r" to satisfy the constraint (.*?), but found invalid values:\n(.*)",
    re.DOTALL,
)
_SUPPORT = re.compile(
    r"Expected value argument \(\w+ of shape (\(.*?\))\) to be within the support \((.*?)\)"
    r" of the distribution (\w+).*?, but found invalid values:\n(.*)",
    re.DOTALL,
)
# What torch says where a matrix has no Cholesky factor, or a sampler refuses its parameters.
_MATRIX_OR_SAMPLER = re.compile(
    r"linalg[.\w]*: .*(positive-definite|singular|ill-conditioned)[^\n]*"
    r"|normal expects all elements of std >= 0[^\n]*"
    r"|probability tensor contains either[^\n]*"
)


def _short(values: str) -> str:
    """The first numbers of a tensor's text, on one line."""
    words = " ".join(values.partition("Trace Shapes")[0].split())  # Pyro adds a table
    return words if len(words) <= 80 else f"{words[:80]} ..."
