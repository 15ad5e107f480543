"""Figures: what is drawn, and that a page can hold several of them in light and dark."""

import math
import re
from xml.etree import ElementTree

from lightning_unlearn.report import Panel, bar_figure, dot_figure

VALUES = {"original": [0.8, 0.9], "a & b <$1>": [0.1, 0.2, 0.3], "broken": [math.nan]}
SVG = "{http://www.w3.org/2000/svg}"


def figures():
    panels = [Panel("Forget, %", VALUES, 0.0, (0, 1)), Panel("Test, %", VALUES)]
    return [dot_figure("First figure", panels, muted=["original"]), bar_figure("Second figure", panels[0])]


def texts(figure):
    # Figures are made here, from numbers; nothing untrusted is parsed.
    return [element.text for element in ElementTree.fromstring(figure.svg).iter(f"{SVG}text")]  # noqa: S314


def test_labels_are_text_and_are_escaped():
    for figure in figures():
        assert {"original", "a & b <$1>", "broken", "Forget, %"} <= set(texts(figure))


def test_colours_follow_the_page():
    for figure in figures():
        assert "currentColor" in figure.svg
        assert "#010203" not in figure.svg
        assert "#040506" not in figure.svg
        opening = figure.svg.split(">")[0]
        assert "viewBox" in opening
        assert not re.search(r"\b(width|height)=", opening)


def test_two_figures_share_no_id_and_every_reference_resolves():
    seen = set()
    for figure in figures():
        ids = set(re.findall(r'\bid="([^"]+)"', figure.svg))
        references = set(re.findall(r'(?:url\(|href=")#([^")]+)', figure.svg))
        assert ids
        assert references <= ids
        assert not ids & seen
        seen |= ids


def test_bars_say_their_value_and_drawing_is_reproducible():
    first, second = figures()[1], figures()[1]
    assert {"0.85", "0.2"} <= set(texts(first))
    assert first.svg == second.svg


def test_description_holds_the_means_and_the_target():
    assert figures()[0].description == (
        "Forget, % (target 0): original 0.85, a & b <$1> 0.2. Test, %: original 0.85, a & b <$1> 0.2."
    )


def test_every_repetition_and_every_mean_is_a_dot():
    one = dot_figure("One", [Panel("x", {"a": [1.0, 2.0, 4.0], "b": [3.0]})])
    drawn = re.findall(r'<g id="one-PathCollection_\d+">(.*?)</g>\s*</g>', one.svg, flags=re.DOTALL)
    assert sum(part.count("<use") for part in drawn) == 3 + 1 + 1 + 1
