"""Bad input: one clear, typed error each, before anything is trained or written."""

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from torch.utils.data import DataLoader, IterableDataset

from lightning_unlearn.callbacks.delta_recorder import DeltaRecorder
from lightning_unlearn.callbacks.recording_checks import check_strategy
from lightning_unlearn.exceptions import DeletionRequestError, MissingRequirementError, UnsupportedStrategyError
from tests.helpers.models import BoringClassifier, IdDataset, loader, quiet_trainer


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        *[({"keep": keep}, "keep") for keep in (0, -0.1, 1.1, float("nan"), "0.1", True, {}, {"*": 0}, {3: 0.1})],
        ({"keep": {"*": 0.1, "a": 0.2}}, "'\\*' last"),
        ({"keep": {"a": 0.1}, "scope": "global"}, "scope='global'"),
        ({"criterion": "largest"}, "'magnitude', 'random'"),
        ({"scope": "model"}, "scope"),
        ({"value_dtype": "int4"}, "value_dtype"),
        ({"compression": "zip"}, "compression"),
        ({"buffers": True}, "buffers"),
        ({"watch": []}, "watch"),
        ({"watch": "user"}, "watch"),
        ({"size_budget": 0}, "size_budget"),
        ({"seed": -1}, "seed"),
        ({"kind": "train"}, "kind"),
        ({"sample_id": 3}, "sample_id"),
        ({"sample_id": "id", "sample_keys": ["a"]}, "sample_keys"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(tmp_path, kwargs, match):
    with pytest.raises(ValueError, match=match):
        DeltaRecorder(tmp_path / "store", **kwargs)
    assert not (tmp_path / "store").exists()


def test_strategies():
    check_strategy(SingleDeviceStrategy(torch.device("cpu")))
    check_strategy(DDPStrategy())
    check_strategy(FSDPStrategy())
    check_strategy(ModelParallelStrategy())
    with pytest.raises(UnsupportedStrategyError, match="model_averaging_period"):
        check_strategy(DDPStrategy(model_averaging_period=2))
    with pytest.raises(UnsupportedStrategyError, match="DeepSpeedStrategy"):
        check_strategy(DeepSpeedStrategy.__new__(DeepSpeedStrategy))


class UsersDeepSpeed(DeepSpeedStrategy):
    """What a user derives; it cannot be made without the package."""

    def __init__(self):
        self._root_device = torch.device("cpu")


def test_deep_speed_is_refused_before_training_whoever_derives_from_it(tmp_path, monkeypatch):
    trainer, recorder, model = quiet_trainer(), DeltaRecorder(tmp_path / "store"), BoringClassifier()
    monkeypatch.setattr(type(trainer), "strategy", UsersDeepSpeed())
    with pytest.raises(UnsupportedStrategyError, match=r"a single device, DDP, FSDP.*'UsersDeepSpeed'.*'ddp'"):
        recorder.setup(trainer, model, "fit")
    assert not (tmp_path / "store").exists()


class SingleHPUStrategy(SingleDeviceStrategy):
    """As in the package for these devices."""


class HPUDDPStrategy(DDPStrategy):
    """As in the package for these devices."""


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: XLAStrategy.__new__(XLAStrategy),
        lambda: SingleDeviceXLAStrategy.__new__(SingleDeviceXLAStrategy),
        lambda: SingleHPUStrategy(torch.device("hpu", 0)),
        lambda: HPUDDPStrategy(parallel_devices=[torch.device("hpu", 0)]),
    ],
    ids=["XLAStrategy", "SingleDeviceXLAStrategy", "SingleHPUStrategy", "HPUDDPStrategy"],
)
def test_devices_that_compute_later_are_refused_by_name(strategy):
    made = strategy()
    with pytest.raises(UnsupportedStrategyError, match=rf"CPU, CUDA or MPS, but got '{type(made).__name__} on"):
        check_strategy(made)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([IdDataset()[index] for index in range(8)])


class NoHooks:
    """Steps like an optimizer and tells nobody."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]
        self.defaults, self.state = {}, {}

    def step(self, closure=None):
        raise AssertionError("must not be reached")

    def zero_grad(self, set_to_none=True):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Complex(BoringClassifier):
    def __init__(self):
        super().__init__()
        self.phase = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("kwargs", "module", "data", "error", "match"),
    [
        ({"watch": [3, 99]}, BoringClassifier, loader, DeletionRequestError, "also 99"),
        (
            {"watch": ["b"], "sample_keys": ["a"] * 40},
            BoringClassifier,
            loader,
            DeletionRequestError,
            "also 'b'",
        ),
        ({"sample_keys": ["a"]}, BoringClassifier, loader, DeletionRequestError, "each of the 40 samples"),
        ({}, BoringClassifier, lambda: DataLoader(Stream(), batch_size=4), UnsupportedStrategyError, "iterable Stream"),
        ({}, Complex, loader, UnsupportedStrategyError, "real floating-point"),
        ({}, lambda: BoringClassifier(NoHooks), loader, UnsupportedStrategyError, "got 'NoHooks'"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_training(tmp_path, kwargs, module, data, error, match):
    model = module()
    with pytest.raises(error, match=match):
        quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "store", **kwargs)]).fit(model, data())
    assert not model.seen
    assert not (tmp_path / "store").exists()


def test_a_batch_without_ids(tmp_path):
    model = BoringClassifier()
    with pytest.raises(MissingRequirementError, match="'user'"):
        quiet_trainer(callbacks=[DeltaRecorder(tmp_path / "store", sample_id="user")]).fit(model, loader())
    assert not model.seen
