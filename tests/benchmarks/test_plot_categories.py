"""The README's bar plot: drawn from the committed figures, byte for byte, and no number rounded up."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks.plot_categories import FIGURES, PICTURE, cut, draw, rows


@pytest.fixture
def document():
    return json.loads(FIGURES.read_text())


def test_the_committed_picture_is_that_of_the_committed_figures(document):
    assert draw(document) == PICTURE.read_text()


def test_every_category_is_drawn_with_its_own_figures(document):
    texts = [node.text for node in ElementTree.fromstring(draw(document)).iter("{http://www.w3.org/2000/svg}text")]
    for name, part in document["categories"].items():
        place = texts.index(name)
        firp = part["methods"]["firp"]
        assert texts[place + 1 : place + 3] == [cut(firp["tau"]), cut(firp["speedup_vs_ar"]["median"]) + "x"]
    assert [speedup["median"] for *_, speedup in rows(document)] == sorted(
        (s["median"] for *_, s in rows(document)), reverse=True
    )


def test_a_file_without_figures_of_firp_is_refused(document):
    with pytest.raises(ValueError, match="categories: got none"):
        draw({**document, "categories": {}})
    del document["categories"]["math"]["methods"]["firp"]
    with pytest.raises(ValueError, match="categories: got 'math' without method firp"):
        draw(document)
