"""The computed step times: their arithmetic against numbers counted by hand, and the page that shows them."""

from pathlib import Path

import pytest
from test_capturable import LAUNCHES

from benchmarks.gpu import roofline
from benchmarks.gpu.roofline import FIRP, GPUS, LAUNCH, RAMP, Gpu
from benchmarks.shapes import PLAIN, SHAPES, Shape, Tree

PAGE = Path(__file__).parents[2] / "docs/roofline.md"
# A byte a nanosecond, and a thousand operations.
ROUND = Gpu("round", 1e9, 1e12)
SMALL = Shape("small", 3, 8, 4, 2, 4, 16, 100)


def test_weights_of_a_layer():
    """Llama-2-7B: four squares of 4096, three maps of 4096 by 11008. Llama-3-8B: keys and values are a quarter."""
    assert roofline.layer_weights(SHAPES["llama2-7b"]) == 67_108_864 + 135_266_304
    assert roofline.layer_weights(SHAPES["llama3-8b"]) == 33_554_432 + 8_388_608 + 176_160_768


def test_a_product_is_bound_by_bytes_or_by_operations():
    assert roofline.product_seconds(ROUND, 500, 1) == pytest.approx(1e-6 + RAMP)
    assert roofline.product_seconds(ROUND, 500, 1000, 4) == pytest.approx(1e-6 + 4 * RAMP)
    assert roofline.product_seconds(ROUND, 500, 4000) == pytest.approx(4e-6 + RAMP)


def test_attention_reads_keys_and_values_once():
    """100 slots and 5 rows; keys and values of 2 heads of 4 numbers of 2 bytes."""
    assert roofline.attention_seconds(ROUND, SMALL, 100, 5) == pytest.approx(105 * 32e-9 + LAUNCH)
    assert roofline.attention_seconds(ROUND, SMALL, 0, 1000) == pytest.approx(4 * 1000 * 1000 * 16e-12 + LAUNCH)


def test_the_parts_of_a_small_step():
    """A layer has 8 x 4 x 2 x 6 + 3 x 8 x 16 = 768 numbers, the head 800, the predictor 2 x 64."""
    parts = roofline.step_parts(ROUND, SMALL, Tree(2, 1, 2), 100)
    assert parts.weights == pytest.approx(3 * (1536e-9 + 4 * RAMP))
    assert parts.attention == pytest.approx((102 + 102 + 104) * 32e-9 + 3 * LAUNCH)
    assert parts.head == pytest.approx(1600e-9 + RAMP)
    assert parts.projection == pytest.approx(256e-9 + RAMP)
    assert parts.glue == pytest.approx((3 * 4 + 12) * LAUNCH) and not parts.second_pass
    assert parts.total == pytest.approx(sum((parts.weights, parts.attention, parts.head, parts.projection, parts.glue)))
    assert roofline.step_parts(ROUND, SMALL, PLAIN, 100).projection == 0


def test_many_rows_pass_the_head_twice():
    wide = roofline.step_parts(ROUND, SMALL, Tree(64, 64, 3), 100)
    assert wide.second_pass == pytest.approx(1600e-9 + RAMP) and wide.glue == pytest.approx((3 * 4 + 16) * LAUNCH)


def test_kernels_beside_the_layers_are_those_that_are_counted():
    """Without the products of the head, once or twice, and of the predictor."""
    products = {"plain": 1, "one pass": 2, "two passes": 3}
    assert tuple(LAUNCHES[case] - own for case, own in products.items()) == roofline.BESIDE


def test_bytes_are_those_that_the_bench_counts():
    """It counts the norms too: 65 of 4096 numbers."""
    document = roofline.measured()
    assert document["settings"]["insertion_layer"] == roofline.insertion_layer(SHAPES["llama3-8b"])
    for entry, tree in zip(document["steps"][:2], (PLAIN, Tree(4, 2, 3)), strict=True):
        assert roofline.least_bytes(SHAPES["llama3-8b"], tree, entry["context"]) == entry["bytes"] - 65 * 4096 * 2


def test_no_measured_step_is_faster_than_its_bound():
    document = roofline.measured()
    for entry in document["steps"]:
        assert roofline.computed(document, entry).total < entry["step_ms"]["median"] / 1e3
    assert roofline.computed(document | {"environment": {"device": "cpu"}}, document["steps"][0]) is None


def test_the_page_shows_what_is_computed():
    text = PAGE.read_text()
    for gpu in GPUS:
        assert roofline.table(gpu) in text
    assert roofline.comparison(roofline.measured()) in text and "not measured" in text
    assert (FIRP.num_nodes, FIRP.num_lookahead, FIRP.num_offsets) == (16, 16, 3)
