"""EU-k: train the last layers again from their initial weights, with everything before them frozen."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from lightning import LightningModule, seed_everything
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_unlearn.exceptions import MissingRequirementError
from lightning_unlearn.methods.base import Guarantee, Procedure, ProcedureContext, Requirement, hyperparameters
from lightning_unlearn.methods.last_layers import FrozenStatistics
from lightning_unlearn.methods.registry import register
from lightning_unlearn.methods.search_space import IntRange, SearchSpace
from lightning_unlearn.store.delta_store import DeltaStore
from lightning_unlearn.utilities.batch_norm import tracking_layers
from lightning_unlearn.utilities.checks import check_choice, check_positive_int, expected
from lightning_unlearn.utilities.layers import chosen_layers, frozen_statistics_layers
from lightning_unlearn.utilities.modes import preserved_modes, preserved_requires_grad
from lightning_unlearn.utilities.parameters import float_buffers

__all__ = ["ExactUnlearningK", "InitialValues"]

InitialValues: TypeAlias = Literal["auto", "recorded", "reset"]


@register
@hyperparameters
class ExactUnlearningK(Procedure):
    r"""EU-k: put the last k layers back to their initial weights and train them again, on the retain data only.

    The user's own optimizers and schedules are used, as in `Retrain`, which this is bit for bit where all layers are
    among the k.

    Guarantee: heuristic. Despite its name only the last k layers have not seen the forgotten samples; the frozen ones
    are as the original training left them.

    Cost: a training of the length given in the Trainer's arguments; backward passes end at the last frozen layer.

    Fails: where the early layers memorise (they do in large networks); with a short training the new layers are not
    done.

    Differs from code in use: a layer is a submodule that holds trainable parameters itself, as for
    `CatastrophicForgettingK`. The paper re-initialises from the saved initial weights, as `initial="recorded"`.

    Args:
        k: Layers to train again, counted from the last registered. 1, the classifier of most networks (ours).
        layers: Patterns of layer names instead, such as `["net.layer4"]` for a block.
        initial: `"recorded"` takes the store's initial weights, `"reset"` calls each layer's `reset_parameters`, which
            knows nothing of an initialisation of the user's own; `"auto"` is the former where there is a store.
        frozen_statistics: As for `CatastrophicForgettingK`.
        order: `"same"` keeps the user's batches and leaves the forgotten samples out of them; `"fresh"` gives the
            retain data to a loader of its own, which several processes need.

    Raises:
        ValueError: fewer than k layers, or a pattern that matches none; no weight was changed.

    Source: Goel et al. 2022, arXiv 2201.06640.

    >>> ExactUnlearningK(k=2)
    ExactUnlearningK(k=2, layers=None, initial='auto', frozen_statistics='keep', order='same')
    """

    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.RETAIN_DATA})
    guarantee: ClassVar[Guarantee] = "heuristic"
    source: ClassVar[str] = "Goel et al. 2022, arXiv 2201.06640"
    search_space: ClassVar[SearchSpace] = {
        "k": IntRange(1, 3),
    }

    k: int = 1
    layers: Sequence[str] | None = None
    initial: InitialValues = "auto"
    frozen_statistics: FrozenStatistics = "keep"
    order: Literal["same", "fresh"] = "same"

    def __post_init__(self) -> None:
        self.k = check_positive_int("k", self.k)
        self.layers = None if self.layers is None else tuple(self.layers)
        self.initial = check_choice("initial", self.initial, ("auto", "recorded", "reset"))
        self.frozen_statistics = check_choice("frozen_statistics", self.frozen_statistics, ("keep", "update"))
        self.order = check_choice("order", self.order, ("same", "fresh"))

    def missing(self, available: Iterable[Requirement]) -> list[Requirement]:
        """As the base, and the initial weights where recorded ones are asked for."""
        present = set(available)
        needed = self.requires | ({Requirement.INITIAL_WEIGHTS} if self.initial == "recorded" else set())
        return [requirement for requirement in Requirement if requirement in needed - present]

    def run(self, context: ProcedureContext) -> LightningModule:
        """Train the last layers from scratch and return the module.

        Raises:
            MissingRequirementError: nothing says what a layer's initial values are.
        """
        module, data = context.module, context.data
        chosen = chosen_layers(module, self.k, self.layers)
        recorded = None if self.initial == "reset" or context.store is None else context.store
        if self.initial == "recorded" and recorded is None:
            raise MissingRequirementError(f"{self.name} needs {Requirement.INITIAL_WEIGHTS.value}.")
        if context.seed is not None:
            seed_everything(context.seed, workers=True, verbose=False)
        if recorded is None:
            _reset(chosen)
            for layer in _without_parameters(module, chosen):
                layer.reset_running_stats()
        else:
            _restore(module, [*chosen.values(), *_without_parameters(module, chosen)], recorded)
        trained = {parameter for layer in chosen.values() for parameter in layer.parameters(recurse=False)}
        with preserved_requires_grad(module), preserved_modes(module), warnings.catch_warnings():
            # Frozen layers are in eval mode on purpose.
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
            for parameter in module.parameters():
                if parameter not in trained:
                    parameter.requires_grad_(False)
            if self.frozen_statistics == "keep":
                for still in frozen_statistics_layers(module, chosen):
                    still.training = False
            if self.order == "same":
                context.make_trainer(leave_out=data.forget_positions).fit(module, datamodule=data.users_data)
            else:
                context.make_trainer().fit(module, datamodule=data.retain_only())
        return module


def _without_parameters(module: nn.Module, chosen: Mapping[str, nn.Module]) -> list[_NormBase]:
    """Layers with running statistics and no parameters that go with the chosen ones."""
    frozen = frozen_statistics_layers(module, chosen)
    return [layer for layer in tracking_layers(module) if layer not in frozen and layer not in chosen.values()]


def _reset(chosen: Mapping[str, nn.Module]) -> None:
    resets = {name: getattr(layer, "reset_parameters", None) for name, layer in chosen.items()}
    for name, reset in resets.items():
        if not callable(reset):
            remedy = "Record the training and pass `store=`, or name other `layers`."
            raise MissingRequirementError(
                expected(name, "a layer with `reset_parameters`", type(chosen[name]).__name__, remedy)
            )
    for reset in resets.values():
        if callable(reset):
            reset()


@torch.no_grad()
def _restore(module: nn.Module, layers: Sequence[nn.Module], store: DeltaStore) -> None:
    """Put recorded initial values into the parameters and float buffers of some layers."""
    initial = store.initial_weights()
    own = {id(one) for layer in layers for one in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))}
    # By the module's names, under which a tied parameter was recorded once.
    parameters = {name: one for name, one in module.named_parameters() if id(one) in own}
    unknown = [name for name in parameters if name not in initial and name not in store.frozen]
    if unknown:
        rule = f"one with an initial value of {unknown[0]}"
        raise MissingRequirementError(expected("store", rule, "one without", "Use initial='reset'."))
    buffers = {name: one for name, one in float_buffers(module).items() if id(one) in own}
    for name, tensor in {**parameters, **buffers}.items():
        if name in initial:
            tensor.copy_(initial[name])
    for layer in tracking_layers(module):
        if layer in layers and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.zero_()
