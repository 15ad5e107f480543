"""What an unlearning method is: what all declare, and two of the three bases; the third is in `loss_method`.

A `WeightEdit` computes a change of the weights and leaves applying it to the caller, so dry run, size and undo come
free. A `LossMethod` is a loss over `{"forget": ..., "retain": ...}` batches that an ordinary Trainer minimises. A
`Procedure` owns whole training runs. No code outside a method asks which method it is; it asks what it declares.
"""

from __future__ import annotations

import enum
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, TypeAlias, TypeVar, dataclass_transform, get_type_hints

from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_unlearn.data.datamodule import UnlearningDataModule
from lightning_unlearn.deltas.plan import DeletionPlan
from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.functional.pruning import Keep
from lightning_unlearn.methods.search_space import SearchSpace
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.types import Scale, WeightChange
from lightning_unlearn.utilities.checks import expected

__all__ = [
    "Cost",
    "EditContext",
    "Forgets",
    "Guarantee",
    "Procedure",
    "ProcedureContext",
    "Requirement",
    "UnlearningMethod",
    "WeightEdit",
    "hyperparameters",
]

M = TypeVar("M", bound="UnlearningMethod")

Guarantee: TypeAlias = Literal["exact", "approximate", "heuristic"]
Cost: TypeAlias = Literal["weights only", "some steps", "full training"]
Forgets: TypeAlias = Literal["samples", "classes"]


class Requirement(enum.Enum):
    """What a method may need; the value completes the sentence *needs ...*."""

    DELTAS = "a store of recorded deltas: train with `DeltaRecorder` and pass `store=`"
    DENSE_DELTAS = (
        "a store recorded with keep=1.0: train with `DeltaRecorder(store, keep=1.0)`, or use PartialAmnesiac with "
        'prune="step"'
    )
    RETAIN_DATA = "the data to keep: pass the training data as `data=`"
    FORGET_DATA = "the data to forget: pass the training data as `data=`"
    VALIDATION_DATA = "validation data: pass `data={'train': ..., 'val': ...}`, or a datamodule with them"
    CHECKPOINTS = "checkpoints of the original training: pass `checkpoints=` to the method"
    SHARDS = "a training by `SisaTraining`: pass its `folder=` and its `module_factory=` to the method"
    INITIAL_WEIGHTS = "the weights before training: pass `store=`, or a `module_factory` to the method"


def _no_data(batch: Any) -> Any:
    raise MissingRequirementError(expected("method", "one that requires data", "one that does not", "Declare it."))


@dataclass(frozen=True, slots=True)
class EditContext:
    """What a `WeightEdit` may read. It changes nothing.

    Attributes:
        module: The trained module.
        plan: The plan of the request, `None` without a store.
        store: The recorded deltas, `None` where there are none.
        data: The split data, `None` where none was given.
        seed: Seed for methods that draw.
        loss: Batch -> the user's own training loss on it, differentiable; for methods that require data.
        outputs: Batch -> logits, differentiable, and targets, through the user's adapter.
    """

    module: LightningModule
    plan: DeletionPlan | None
    store: DeltaStore | None
    data: UnlearningDataModule | None
    seed: int | None = None
    loss: Callable[[Any], Tensor | None] = _no_data
    outputs: Callable[[Any], tuple[Tensor, Tensor]] = _no_data


@dataclass(frozen=True, slots=True)
class ProcedureContext:
    """What a `Procedure` is handed.

    Attributes:
        module: A private copy of the trained module; the procedure may overwrite it.
        data: The split data.
        make_trainer: Builds a fresh Trainer; keyword arguments override the user's. `leave_out=positions` keeps samples
            out of the batches of the training loader; `batches=` gives it those of a recorded run, and
            `random_states=` the random state before each of them (see `RecordedOrder`).
        store: The recorded deltas, `None` where there are none.
        seed: Seed of the run, `None` to draw from the current state.
    """

    module: LightningModule
    data: UnlearningDataModule
    make_trainer: Callable[..., Trainer]
    store: DeltaStore | None
    seed: int | None = None


class UnlearningMethod(ABC):
    """Base of every method.

    Class attributes:
        requires: What has to be there; missing pieces raise `MissingRequirementError` before anything changes.
        guarantee: `"exact"`, `"approximate"` or `"heuristic"`; the docstring says when.
        cost: Cost class against retraining.
        forgets: Whether any samples can be forgotten, or whole classes only.
        source: Authors, year, arXiv id.
        search_space: What tuning varies: argument -> range or choice; empty: nothing to tune. Ranges are ours unless
            said. Every combination has to be one that the constructor takes.
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset()
    guarantee: ClassVar[Guarantee]
    cost: ClassVar[Cost]
    forgets: ClassVar[Forgets] = "samples"
    source: ClassVar[str]
    search_space: ClassVar[SearchSpace] = MappingProxyType({})

    @property
    def name(self) -> str:
        """Name in registries and reports."""
        return type(self).__name__

    @property
    def settings(self) -> dict[str, Any]:
        """The hyper-parameters, for reports and the ledger."""
        hidden: list[str] = [one.name for one in fields(self) if not one.repr] if is_dataclass(self) else []
        return {key: value for key, value in vars(self).items() if not key.startswith("_") and key not in hidden}

    @property
    def arguments(self) -> dict[str, Any]:
        """What the constructor takes, with the values in use: a default that depends on others is filled in.

        Read from fields, else from `settings`, else from an attribute of the argument's name. A method with an
        `__init__` of its own that keeps its arguments elsewhere, or passes some on as `**others`, overrides it.

        Raises:
            TypeError: an argument is kept nowhere.
        """
        declared: list[str] = [one.name for one in fields(self)] if is_dataclass(self) else []
        shown = self.settings
        found: dict[str, Any] = {}
        for name, parameter in inspect.signature(type(self)).parameters.items():
            named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            if not named or not (name in shown or hasattr(self, name)):
                rule = f"kept by {self.name}, in `settings` or under its own name"
                raise TypeError(expected(str(parameter), rule, sorted(shown), "Override `arguments`."))
            found[name] = getattr(self, name) if name in declared or name not in shown else shown[name]
        return found

    def with_hyperparameters(self, **changes: Any) -> Self:
        """This method with other hyper-parameters: a new instance, checked as any; everything else is kept.

        Raises:
            ValueError: no such hyper-parameter, or a value that the method refuses.
            TypeError: see `arguments`.

        >>> from lightning_unlearn.methods import NegGradPlus
        >>> NegGradPlus(max_epochs=2).with_hyperparameters(retain_weight=0.95).settings["max_epochs"]
        2
        """
        known = inspect.signature(type(self)).parameters
        unknown = [name for name in changes if name not in known]
        if unknown:
            rule = f"hyper-parameters of {self.name} ({', '.join(known) or 'it has none'})"
            raise ValueError(expected("changes", rule, unknown))
        return type(self)(**{**self._given(), **changes})

    def _given(self) -> dict[str, Any]:
        """The arguments that a new instance is given where nothing else is said."""
        return self.arguments

    def missing(self, available: Iterable[Requirement]) -> list[Requirement]:
        """Requirements that are not among `available`."""
        present = set(available)
        return [requirement for requirement in Requirement if requirement in self.requires - present]

    def check_requirements(self, available: Iterable[Requirement]) -> None:
        """Raise `MissingRequirementError` naming everything that is missing."""
        missing = self.missing(available)
        if missing:
            raise MissingRequirementError(f"{self.name} needs " + "; and ".join(item.value for item in missing) + ".")

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
def hyperparameters(cls: type[M]) -> type[M]:
    """Class decorator: annotated attributes of a method, and of its bases, are its keyword-only arguments.

    A dataclass, but equal to nothing else, and shown as methods are. Attributes of the class alone are `ClassVar`. To
    change a base's default, annotate the name again; `field(init=False)` takes the argument away and
    `field(repr=False)` keeps it out of `settings`. `__post_init__` checks, and calls that of a base that has one. Where
    arguments become something else, write an `__init__` instead; it may call that of a decorated base.
    """
    made = dataclass(kw_only=True, eq=False, repr=False)(cls)
    # Types of a base are written with names of its module. Where some are there for type checkers alone, all stay text.
    with suppress(NameError):
        hints, arguments = get_type_hints(made), vars(made)["__init__"].__annotations__
        arguments.update((name, hints[name]) for name in arguments.keys() & hints.keys())
    return made


class WeightEdit(UnlearningMethod):
    """A method that proposes a change of the weights; the caller applies it."""

    cost: ClassVar[Cost] = "weights only"

    @property
    def scale(self) -> Scale:
        """How much of a touched step a plan for this method subtracts; methods without deltas ignore it."""
        return "step"

    @property
    def keep(self) -> Keep:
        """How far the stored deltas, or their sum, are pruned further; `None` takes them as they are."""
        return None

    @abstractmethod
    def compute_edit(self, context: EditContext) -> WeightChange:
        """Compute what to add to the weights: name -> tensor. Nothing is changed here."""


class Procedure(UnlearningMethod):
    """A method that runs trainings of its own.

    Class attributes:
        knows_length: Whether it asks its Trainers for a length itself, so that the user need not give one.
    """

    cost: ClassVar[Cost] = "full training"
    knows_length: ClassVar[bool] = False

    @abstractmethod
    def run(self, context: ProcedureContext) -> LightningModule:
        """Run and return the resulting user's module (the one of the context, or a new one)."""
