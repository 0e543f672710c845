"""What a compiled step needs of the SVI that it belongs to."""

from __future__ import annotations

__all__ = ["Stepper"]

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pyro.optim import PyroOptim
from torch import Tensor


class ElboTerms(Protocol):
    """A loss that keeps reconstruction and KL of its last evaluation."""

    _given: Any  # the loss as the user gave it

    def terms(self, loss: Tensor | float) -> tuple[Tensor, Tensor]: ...


class Stepper(Protocol):
    """An SVI. `pyro_vi.inference.SVI` and `SVITrainer` are the implementations.

    Attributes:
        model, guide, loss, loss_and_grads, optim: as of Pyro's SVI.
        elbo_terms: the loss, if it keeps its terms.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    loss: Any
    loss_and_grads: Any
    optim: PyroOptim

    @property
    def elbo_terms(self) -> ElboTerms | None: ...

    @property
    def _parameters(self) -> list[Tensor]:
        """The parameters of the last evaluation, in the order in which the programs used them."""
        ...

    @property
    def _scale(self) -> float:
        """The factor on gradients."""
        ...

    @property
    def _has_fixed_batch(self) -> bool:
        """Whether all steps have the same batch."""
        ...

    @property
    def _varying(self) -> Sequence[Tensor]:
        """Tensors that change between steps, besides parameters, buffers and the batch."""
        ...

    def _evaluate(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """The loss, and the parameters with their gradients."""
        ...

    def _evaluated(self, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
        """The same in an eager step: checks the results, and remembers the parameters."""
        ...

    def _check(self, loss: float, parameters: Sequence[Tensor]) -> None:
        """Raises an error in the place of the update."""
        ...

    def _update(self, parameters: Sequence[Tensor]) -> None:
        """Steps the optimizer."""
        ...

    def _after_update(self) -> None:
        """What tensors do after the update."""
        ...

    def _advance_schedule(self) -> None: ...

    def _schedule_state(self) -> Any: ...

    def _load_schedule(self, state: Any) -> None: ...

    def _copies(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Tensors, and where their values from before the last step are kept."""
        ...

    def _scheduled(self) -> Sequence[Tensor]:
        """Numbers that are set before each step."""
        ...
