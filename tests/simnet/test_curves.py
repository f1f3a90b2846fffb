"""Pictures of how costs grow: the line through what was measured, and where the dots stand."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from mycel.simnet.curves import Series, draw, law, main, pictures

SVG = "{http://www.w3.org/2000/svg}"


def test_the_line_through_figures_that_grow_with_the_logarithm_is_found():
    base, slope = law([(2**n, 3.0 + 2.0 * n) for n in (5, 8, 10, 12)])
    assert (base, slope) == (pytest.approx(3.0), pytest.approx(2.0))


def test_every_size_has_its_dot_the_higher_the_more():
    tree = ElementTree.fromstring(draw("<hops>", [Series("mean", [(64, 1.0), (1024, 1.5), (4096, 2.0)])]))
    assert tree.get("aria-label") == "<hops>"
    dots = [(float(one.get("cx", "")), float(one.get("cy", ""))) for one in tree.iter(f"{SVG}circle")][1:]
    assert len(dots) == 3
    assert dots == sorted(dots)
    assert [y for _, y in dots] == sorted((y for _, y in dots), reverse=True)


def test_a_result_gives_three_pictures(tmp_path):
    columns = ["nodes", "hops_mean", "hops_p99", "questions_per_read", "bytes_per_read"]
    columns += ["questions_per_join", "bytes_per_join"]
    result = {
        "curves_of": columns,
        "curves": [[60, 1, 1, 11, 2e4, 60, 1e5], [1000, 1.5, 2, 14, 3e4, 120, 2e5]],
    }
    found = pictures(result)
    assert sorted(found) == ["scale-bytes.svg", "scale-hops.svg", "scale-messages.svg"]
    for picture in found.values():
        assert len(list(ElementTree.fromstring(picture).iter(f"{SVG}circle"))) == 6
    with pytest.raises(SystemExit, match="say which result"):
        main([str(tmp_path)])
