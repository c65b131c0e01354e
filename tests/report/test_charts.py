import re
import xml.etree.ElementTree as ET

import pytest

from cvmatch.report.charts import Curve, draw_curves, draw_scatter, format_number
from tests.helpers.present import present

SVG = "{http://www.w3.org/2000/svg}"


def dots_of(svg):
    """The title and the centre of each dot, in the order in which they are drawn."""
    dots = []
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None:
            (dot,) = group.iter(f"{SVG}use")
            dots.append((title.text, (float(dot.attrib["x"]), float(dot.attrib["y"]))))
    return dots


def texts_of(svg):
    """The texts of a chart."""
    return [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_draw_curves_larger_values_are_higher_and_later_ones_further_right():
    curve = Curve(name="train", points=[(0, 1.0), (1, 3.0), (2, 2.0)])
    dots = dots_of(draw_curves([curve], "epoch", "loss"))
    assert [title for title, _ in dots] == ["train: 1 at 0", "train: 3 at 1", "train: 2 at 2"]
    (x0, y0), (x1, y1), (x2, y2) = (centre for _, centre in dots)
    assert x0 < x1 < x2
    assert y1 < y2 < y0  # SVG's y grows downwards
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_draw_curves_tick_labels_leave_room_for_the_name_of_their_axis():
    """At 8.5 px a digit takes 5.4 units: labels that end at x begin right of the axis' name."""
    for scale in (1.0, 1e-3, 12_345.0):
        curve = Curve(name="a", points=[(0, scale), (1, 2 * scale)])
        texts = list(ET.fromstring(draw_curves([curve], "x", "height")).iter(f"{SVG}text"))
        (name,) = [float(text.attrib["x"]) for text in texts if text.text == "height"]
        ticks = [text for text in texts if "text-anchor: end" in text.attrib["style"]]
        assert ticks
        assert all(float(tick.attrib["x"]) - 5.4 * len(present(tick.text)) > name for tick in ticks)


def test_draw_curves_points_that_are_not_finite_are_left_out():
    points = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]
    assert len(dots_of(draw_curves([Curve(name="a", points=points)], "epoch", "loss"))) == 2
    assert draw_curves([Curve(name="a", points=[(0, float("nan"))])], "epoch", "loss") == ""


def test_draw_curves_single_point_is_drawn():
    assert len(dots_of(draw_curves([Curve(name="a", points=[(0, 0.0)])], "epoch", "loss"))) == 1


def test_draw_curves_whole_numbers_have_whole_ticks():
    svg = draw_curves([Curve(name="a", points=[(0, 5.1), (1, 5.2), (2, 5.3)])], "epoch", "loss")
    assert [text for text in texts_of(svg) if text in ("0", "0.5", "1", "1.5", "2")] == list("012")


def test_charts_are_the_same_bytes_each_time_and_need_nothing():
    curve = Curve(name="a < $b$", points=[(0, 1.0), (1, 3.0)])
    svg = draw_curves([curve], "epoch", "loss & $x$")
    assert svg == draw_curves([curve], "epoch", "loss & $x$")
    assert "loss &amp; $x$" in svg
    assert not re.search(r"url\(|<style|<metadata|#0000", svg)
    assert "var(--s0)" in svg
    ids = re.findall(r' id="([^"]*)"', svg)
    assert all(f'"#{name}"' in svg for name in ids)  # no other that the next chart would repeat


def test_draw_scatter_wide_ranges_are_logarithmic():
    svg = draw_scatter([(1e-5, 1.0), (1e-4, 2.0), (1e-3, 3.0)], 2, "lr", "recall")
    places = sorted(centre[0] for _, centre in dots_of(svg))
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert "lr (log)" in texts_of(svg)


def test_draw_scatter_best_point_is_drawn_last():
    dots = dots_of(draw_scatter([(1.0, 3.0), (2.0, 1.0), (3.0, 2.0)], 0, "a", "b"))
    assert [title for title, _ in dots] == ["1 at 2", "2 at 3", "3 at 1, best"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.1, "0.1"),
        (0.12345, "0.123"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (0.0010, "0.001"),
        (3.84e-5, "3.8e-05"),
        (100, "100"),
        (-2.5, "-2.5"),
        (float("nan"), "-"),
    ],
)
def test_format_number_reads_like_a_person_writes(value, text):
    assert format_number(value) == text
