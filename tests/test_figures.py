"""What is gained is never rounded up, what it costs never down."""

import pytest
from firp.tools.figures import cut, raised


@pytest.mark.parametrize("value, places, less, more", [
    (1.999, 2, "1.99", "2.00"), (1.6948, 2, "1.69", "1.70"), (1.0, 2, "1.00", "1.00"), (3, 1, "3.0", "3.0"),
    (1.15, 2, "1.15", "1.15"), (2.3, 2, "2.30", "2.30"), (100 * 0.57, 1, "57.0", "57.0"),
    (-0.0151, 2, "-0.01", "-0.02"), (1e-9, 2, "0.00", "0.01"), (1e40, 0, "1" + 40 * "0", "1" + 40 * "0"),
    (float("inf"), 2, "inf", "inf"), (float("nan"), 2, "nan", "nan"),
])  # fmt: skip
def test_decimals(value, places, less, more):
    assert cut(value, places) == less and raised(value, places) == more
