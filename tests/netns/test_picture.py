"""The table of kinds as a picture."""

from __future__ import annotations

from itertools import combinations_with_replacement
from xml.etree import ElementTree

from netlab.picture import COLOURS, Cell, draw

NAMES = ("open", "port & more", "symmetric")
SVG = "{http://www.w3.org/2000/svg}"


def test_every_pair_has_its_cell_whichever_way_round_it_came() -> None:
    cells = {
        (two, one): Cell(fate, f"{one}-{two}")
        for (one, two), fate in zip(
            combinations_with_replacement(NAMES, 2), ["direct", "relayed"] * 3, strict=True
        )
    }
    root = ElementTree.fromstring(draw(NAMES, cells, "a <caption>\nof two lines"))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    for one, two in combinations_with_replacement(NAMES, 2):
        assert texts.count(f"{one}-{two}") == 1
    assert {"a <caption>", "of two lines"} <= set(texts)
    fills = [rect.get("fill") for rect in root.iter(f"{SVG}rect")]
    assert (fills.count(COLOURS["direct"]), fills.count(COLOURS["relayed"])) == (3 + 1, 3 + 1)  # and the key


def test_a_pair_that_was_not_measured_has_no_cell() -> None:
    root = ElementTree.fromstring(draw(NAMES, {}, "nothing"))
    fills = [rect.get("fill") for rect in root.iter(f"{SVG}rect")]
    assert [fills.count(colour) for colour in COLOURS.values()] == [1, 1, 1]
