"""What is recorded where the user left it open."""

import pytest
from torch import nn

from lightning_unlearn.callbacks.recording_settings import RequestedSettings, keep_settings, trainable_share
from lightning_unlearn.types import RecordingSettings
from lightning_unlearn.utilities.parameters import gathered_weights


def requested(keep=None, value_dtype=None):
    return RequestedSettings.of(
        keep,
        value_dtype,
        scope="layer",
        criterion="magnitude",
        compression=None,
        watched=False,
        buffers="ignore",
    )


def test_patterns():
    assert keep_settings(1, "global") == (1.0, {})
    assert keep_settings({"a": 1.0}, "layer") == (0.1, {"a": 1.0})
    assert keep_settings({"a": 1.0, "*": 0.5}, "layer") == (0.5, {"a": 1.0})


@pytest.mark.parametrize(
    ("keep", "value_dtype", "share", "wanted"),
    [
        (None, None, 1.0, (0.1, "scaled_float16")),
        (None, None, 0.05, (0.1, "scaled_float16")),
        (None, None, 0.049, (1.0, "float32")),
        (0.3, None, 0.01, (0.3, "float32")),
        (None, "bfloat16", 0.01, (1.0, "bfloat16")),
        (0.2, "bfloat16", 0.01, (0.2, "bfloat16")),
    ],
)
def test_what_is_left_open_depends_on_the_trainable_share(keep, value_dtype, share, wanted):
    settings = requested(keep, value_dtype).resolve(share)
    assert (settings.keep, settings.value_dtype) == wanted


def test_what_is_left_open_is_taken_from_the_store_that_is_continued():
    recorded = RecordingSettings(keep=0.4, keep_overrides={"*.bias": 1.0}, value_dtype="bfloat16")
    settings = requested().resolve(0.001, recorded)
    assert (settings.keep, settings.keep_overrides, settings.value_dtype) == (0.4, {"*.bias": 1.0}, "bfloat16")
    # What the user said stays, and is compared with the store later.
    assert requested(0.2, "float32").resolve(0.001, recorded) == requested(0.2, "float32").base


def share_of(module):
    weights = gathered_weights(module)
    return trainable_share(weights.parameters, weights.trainable)


def test_the_share_counts_entries_and_tied_parameters_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False).requires_grad_(False), nn.Linear(4, 4, bias=False))
    assert share_of(net) == 0.5
    net[1].weight = net[0].weight
    assert share_of(net) == 0.0
    assert share_of(nn.ReLU()) == 1.0
