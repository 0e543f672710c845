"""What distributions check of their parameters and values, for runs on tensors without values.

torch and Pyro check where a distribution is made and where a value is scored. `Checks` lets that
very code run and answers for it, so that what is checked is what an eager run checks: what a
distribution wraps, what was given and what is lazy, who has validation turned off.
"""

from __future__ import annotations

__all__ = ["Checks"]

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.overrides import TorchFunctionMode

# Where the question "do all satisfy this" is a check, and no branch of an algorithm.
_CHECKING = {
    *(f"torch.distributions.{m}" for m in ("distribution", "constraints", "geometric")),
    "pyro.distributions.von_mises_3d",
}
_QUESTIONS = {torch._is_all_true, torch.Tensor.all}


class Checks(TorchFunctionMode):
    """Lets every check pass, and keeps the conditions that it depends on.

    Left out are those of Python's numbers, which an eager step has checked, and those that only a
    NaN fails, which the loss shows.

    Args:
        conditions: where they are appended to.
    """

    def __init__(self, conditions: list[Tensor]) -> None:
        super().__init__()
        self._conditions = conditions

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _QUESTIONS or len(args) > 1 or kwargs:
            return func(*args, **(kwargs or {}))
        asking = sys._getframe(1)
        while asking.f_back is not None and asking.f_code.co_name == "__torch_function__":
            asking = asking.f_back  # of other modes
        if asking.f_globals.get("__name__") not in _CHECKING:
            return func(*args)
        (condition,) = args
        checked = asking.f_locals.get("constraint", asking.f_locals.get("support"))
        is_number = getattr(condition, "constant", None) is not None  # the same in every step
        if not is_number and not _fails_by_nan_alone(checked):
            self._conditions.append(condition)
        return True


def _fails_by_nan_alone(constraint: Any) -> bool:
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return type(constraint) is type(constraints.real)
