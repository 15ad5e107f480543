"""What every registered method must do, whatever it is."""

import copy
import inspect
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_unlearn.api import unlearn
from lightning_unlearn.exceptions import LightningUnlearnError, MissingRequirementError, NoEffectWarning
from lightning_unlearn.methods import (
    METHODS,
    LossMethod,
    Procedure,
    Requirement,
    UnlearningMethod,
    WeightEdit,
    get_method,
    register,
)
from lightning_unlearn.procedures.sisa import SisaTraining
from tests.helpers.recorded import XYClassifier, datasets, loaders, record

# Sixty-four rows in twenty-four steps: every plan has something to warn of, which is not what is tested here.
# Nor is a stopping rule, for which these data have nothing to stop by, nor what else cannot be recorded.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*took part in.*:lightning_unlearn.exceptions.UnlearningWarning"),
    pytest.mark.filterwarnings("ignore:.*outside its optimizer steps.*:lightning_unlearn.exceptions.UnlearningWarning"),
    pytest.mark.filterwarnings("ignore:.*its fixed number of steps.*:lightning_unlearn.exceptions.UnlearningWarning"),
]

NAMES = sorted(METHODS)
# What a default instance needs beyond a store and data, such as checkpoints, is in its own tests.
AVAILABLE = set(Requirement) - {Requirement.CHECKPOINTS}
RUNNABLE = [name for name in NAMES if not METHODS[name]().missing(AVAILABLE)]
# Methods that forget in trainings of their own kind: below, such a training and an instance for a copy of it.
SPECIAL = ["Sisa"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return record(tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "original"
    data = DataLoader(datasets()[0], 8, shuffle=True)
    training = SisaTraining(
        folder, module_factory=XYClassifier, epochs=2, shards=2, slices=2, trainer={"accelerator": "cpu"}
    )
    return SimpleNamespace(model=training.fit(data), data=data, folder=folder)


@pytest.fixture
def case(request, tmp_path):
    """Of a method by name: the trained model, and a function that forgets in it and may be called again."""

    def make(name):
        if name not in SPECIAL:
            trained = request.getfixturevalue("trained")
            return trained.model, lambda: forget(trained, name)
        sharded = request.getfixturevalue("sharded")
        folders = iter(tmp_path / str(number) for number in range(9))

        def forget_in_copy():
            folder = shutil.copytree(sharded.folder, next(folders))
            method = METHODS[name](folder=folder, module_factory=XYClassifier)
            settings = {"data": sharded.data, "trainer": {"accelerator": "cpu"}, "seed": 1, "probe_samples": 0}
            return unlearn(sharded.model, [3], method=method, **settings)

        return sharded.model, forget_in_copy

    return make


def trainer_for(method):
    return {"max_epochs": 1, "accelerator": "cpu"} if isinstance(method, Procedure) else {"accelerator": "cpu"}


def forget(trained, name, **overrides):
    method = METHODS[name]()
    settings = {"data": loaders(), "store": trained.url, "trainer": trainer_for(method), "seed": 1, "force": True}
    if Requirement.VALIDATION_DATA in method.requires:
        settings["data"]["val"] = settings["data"]["test"]
    settings["probe_samples"] = 0  # a probe would warn: what is judged here is the contract, not the accuracy
    targets = settings["data"]["train"].dataset.tensors[1]
    ids = [3] if method.forgets == "samples" else torch.nonzero(targets == targets[3]).flatten().tolist()
    return unlearn(trained.model, ids, method=method, **{**settings, **overrides})


@pytest.mark.parametrize("name", [*RUNNABLE, *SPECIAL])
def test_the_user_gets_a_changed_module_of_the_same_kind_and_keeps_the_original(case, name):
    model, forget_once = case(name)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    result = forget_once()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the original changed"
    assert [module.training for module in model.modules()] == modes
    new = result.model
    assert type(new) is type(model)
    assert new is not model
    assert new.hparams == model.hparams
    assert list(new.state_dict()) == list(before)
    changed = False
    for (key, mine), (_, theirs) in zip(new.named_parameters(), model.named_parameters(), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.device == theirs.device
        assert mine.requires_grad == theirs.requires_grad
        assert mine.data_ptr() != theirs.data_ptr(), f"{key} is shared with the original"
        assert torch.isfinite(mine).all()
        changed |= not torch.equal(mine, theirs)
        if not theirs.requires_grad:
            assert torch.equal(mine, theirs), f"{key} is frozen and changed"
    assert changed
    assert not new._forward_hooks
    assert not new._forward_pre_hooks
    assert "_unlearning" not in new.__dict__
    assert result.method == name


@pytest.mark.parametrize("name", [*RUNNABLE, *SPECIAL])
def test_same_seed_same_result(case, name):
    forget_once = case(name)[1]
    first, second = (forget_once().model.state_dict() for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].requires & {Requirement.DELTAS}])
def test_missing_requirement_is_said_before_anything_changes(trained, name):
    before = copy.deepcopy(trained.model.state_dict())
    with pytest.raises(MissingRequirementError, match="store"):
        forget(trained, name, store=None)
    assert all(torch.equal(value, before[key]) for key, value in trained.model.state_dict().items())


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(RUNNABLE)))
def test_what_else_is_needed_is_said_before_anything_changes(trained, name):
    before = copy.deepcopy(trained.model.state_dict())
    with pytest.raises(MissingRequirementError, match=f"{name} needs"):
        forget(trained, name)
    assert all(torch.equal(value, before[key]) for key, value in trained.model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_declarations(name):
    cls = METHODS[name]
    assert get_method(name.lower()) is cls
    assert cls.guarantee in ("exact", "approximate", "heuristic")
    assert cls.cost in ("weights only", "some steps", "full training")
    assert cls.forgets in ("samples", "classes")
    assert cls.source
    assert inspect.getdoc(cls)
    for parameter in inspect.signature(cls).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty, "a default constructs every method"
    assert repr(cls()).startswith(name)


class _Doctored(WeightEdit):
    """A method of a test: returns whatever change it was built with."""

    guarantee, source = "heuristic", "test"

    def __init__(self, value=0.0, error=None):
        self.value, self.error = value, error

    def compute_edit(self, context):
        if self.error is not None:
            raise self.error
        return {
            name: torch.full_like(p, self.value) for name, p in context.module.named_parameters() if p.requires_grad
        }


def test_no_effect_is_announced(trained):
    with pytest.warns(NoEffectWarning, match="changed no weight"):
        unlearn(trained.model, [3], method=_Doctored(0.0), data=loaders(), batch_norm="keep")


def test_a_change_that_is_not_finite_is_refused(trained):
    before = copy.deepcopy(trained.model.state_dict())
    with pytest.raises(LightningUnlearnError, match="finite"):
        unlearn(trained.model, [3], method=_Doctored(float("nan")), data=loaders())
    assert all(torch.equal(value, before[key]) for key, value in trained.model.state_dict().items())


def test_weights_are_unchanged_when_a_method_raises(trained):
    before = copy.deepcopy(trained.model.state_dict())
    with pytest.raises(RuntimeError, match="broken"):
        unlearn(trained.model, [3], method=_Doctored(error=RuntimeError("broken")), data=loaders())
    assert all(torch.equal(value, before[key]) for key, value in trained.model.state_dict().items())


def test_registering():
    with pytest.raises(TypeError, match="concrete"):
        register(LossMethod)
    with pytest.raises(ValueError, match="unused"):
        register(METHODS["Amnesiac"])
    with pytest.raises(ValueError, match="one of Amnesiac"):
        get_method("amnesia")
    with pytest.raises(TypeError, match="an instance of the class"):
        get_method(METHODS["Amnesiac"])

    class Undeclared(UnlearningMethod):
        """Has no guarantee."""

    with pytest.raises(TypeError, match="guarantee"):
        register(Undeclared)
