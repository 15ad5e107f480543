"""Numbers that settings may have, at the edges of their ranges."""

import math

import numpy as np
import pytest

from lightning_unlearn.utilities.checks import check_fraction, check_positive, check_positive_int

NO_NUMBERS = [True, "1", None, math.nan]


@pytest.mark.parametrize("value", [1e-300, 1, 2.5, np.float32(0.5), 1e300])
def test_positive_numbers(value):
    assert type(check_positive("alpha", value)) is float
    assert check_positive("alpha", value) == check_positive("alpha", value, zero=True) == value


@pytest.mark.parametrize("value", [*NO_NUMBERS, -1e-300, math.inf, -math.inf])
@pytest.mark.parametrize("zero", [False, True])
def test_what_is_no_finite_positive_number(value, zero):
    with pytest.raises(ValueError, match="Expected `alpha` to be a finite number"):
        check_positive("alpha", value, zero=zero)


def test_zero_only_where_it_is_allowed():
    checks = (check_positive, check_fraction, check_positive_int)
    for check in checks:
        assert check("n", 0, zero=True) == 0
        with pytest.raises(ValueError, match="Expected `n`"):
            check("n", 0)


@pytest.mark.parametrize("value", [*NO_NUMBERS, -0.1, 1.0000001, math.inf])
def test_what_is_no_fraction(value):
    with pytest.raises(ValueError, match="Expected `keep` to be a fraction"):
        check_fraction("keep", value)
    assert check_fraction("keep", 1) == 1.0


@pytest.mark.parametrize("value", [*NO_NUMBERS, -1, 1.0, 2.5])
def test_what_is_no_positive_int(value):
    with pytest.raises(ValueError, match="Expected `n`"):
        check_positive_int("n", value)
    assert check_positive_int("n", np.int64(3)) == 3
