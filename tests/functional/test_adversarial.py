"""The fast gradient sign step against a loop over entries."""

import pytest
import torch

from lightning_unlearn.functional.adversarial import gradient_sign_step


def test_entry_by_entry():
    generator = torch.Generator().manual_seed(0)
    inputs, gradient = torch.rand(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    gradient[1, 1] = 0.0
    settings = {"epsilon": 0.3, "value_range": (0.0, 1.0), "levels": 255}
    moved = gradient_sign_step(inputs, gradient, **settings)
    for value, slope, got in zip(inputs.flatten(), gradient.flatten(), moved.flatten(), strict=True):
        sign = (float(slope) > 0) - (float(slope) < 0)
        wanted = round(min(max(float(value) + 0.3 * sign, 0.0), 1.0) * 255) / 255
        assert float(got) == pytest.approx(wanted, abs=1e-6)
    assert float(moved.min()) == 0.0
    assert float(moved.max()) == 1.0
    free = gradient_sign_step(inputs, gradient, epsilon=0.3)
    torch.testing.assert_close((free - inputs).abs()[gradient != 0], torch.full((11,), 0.3))
    assert not free.requires_grad


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": 0.1, "value_range": (1, 0)}, "value_range"),
        ({"epsilon": 0.1, "levels": 0}, "levels"),
        ({"epsilon": 0.1, "gradient": torch.zeros(3)}, "gradient"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        gradient_sign_step(torch.zeros(2), **{"gradient": torch.zeros(2), **settings})
