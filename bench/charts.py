"""The charts of the HTML report: bars as HTML, curves as inline SVG.

Positions are percentages of the chart's width and sizes of text are the page's own, so a chart fits a phone without its
text shrinking. To a screen reader every chart is one image with its content as a sentence. Colours are CSS classes,
which the page's style sheet gives a light and a dark value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree as ET

from markupsafe import Markup

MARKS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M-4-4h8v8h-8z",
    "triangle": "M0-5.2L5 4h-10z",
    "diamond": "M0-5.6L5.6 0L0 5.6L-5.6 0z",
    "down": "M0 5.2L5-4h-10z",
    "cross": "M-1.6-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "bar": "M-5-2.2h10v4.4h-10z",
}
"""Shapes around (0, 0), in pixels."""


@dataclass(frozen=True)
class Bar:
    """One bar from zero to ``value``, with the interval ``low`` to ``high`` on it if there is one.

    Attributes:
        colour: a class of the style sheet.
        text: what stands beside the bar.
    """

    name: str
    value: float
    text: str
    colour: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Part:
    """A stretch of a stacked bar."""

    name: str
    value: float
    text: str
    colour: str


@dataclass(frozen=True)
class Point:
    """A mark at (x, y), both above zero; ``title`` appears when one points at it."""

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points drawn alike; None among them is a gap in the line."""

    name: str
    points: Sequence[Point | None]
    colour: str
    mark: str = "circle"
    hollow: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Guide:
    """A thin line behind the series; its label stands at the first end or the last."""

    points: Sequence[tuple[float, float]]
    label: str = ""
    at_end: bool = False


class LogAxis:
    """Logarithmic positions in percent, from the smallest of ``values`` to the largest and ``margin`` times further.

    Raises:
        ValueError: no value is above zero.
    """

    def __init__(self, values: Iterable[float], margin: float = 1.25) -> None:
        kept = [value for value in values if value > 0 and math.isfinite(value)]
        if not kept:
            raise ValueError("values must hold one above zero, got none")
        self.low, self.high = min(kept) / margin, max(kept) * margin

    def at(self, value: float) -> float:
        """Percent of the axis' length, within it."""
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return round(100 * min(share, 1.0), 2)

    def ticks(self) -> list[float]:
        """Powers of ten; with 2 and 5 between them where these are few."""
        decades = math.log10(self.high / self.low)
        steps = (1, 2, 5) if decades < 2.6 else (1,)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def bars(rows: Sequence[Bar], label: str, *, mark: float | None = None) -> Markup:
    """Horizontal bars from zero.

    The longest value fills two thirds of the width or more: an interval that reaches further is cut off and drawn open,
    so that one noisy row does not flatten the others.

    Args:
        label: what the bars show, for those who cannot see them; the rows' names and texts are added.
        mark: where a vertical line crosses all bars.
    """
    longest = max((row.value for row in rows), default=0.0)
    ends = [row.high for row in rows if row.high is not None]
    full = min(max([longest, mark or 0.0, *ends]) * 1.01, 1.5 * max(longest, mark or 0.0)) or 1.0
    root = _image("div", "bars", label, rows)
    if mark is not None:
        root.set("style", f"--mark:{_percent(mark, full)}")
        root.set("class", "bars marked")
    for row in rows:
        line = _add(root, "div", {"class": f"bar {row.colour}"})
        _add(line, "span", {"class": "name"}, row.name)
        track = _add(line, "span", {"class": "track"})
        _add(track, "span", {"class": "fill", "style": f"width:{_percent(row.value, full)}"})
        if row.low is not None and row.high is not None:
            left, right = min(row.low, full), min(row.high, full)
            style = f"left:{_percent(left, full)};width:{_percent(right - left, full)}"
            _add(track, "span", {"class": "whisker" + (" open" if row.high > full else ""), "style": style})
        _add(line, "span", {"class": "value"}, row.text)
    return _html(root)


def stacked(rows: Sequence[tuple[str, str, Sequence[Part]]], label: str) -> Markup:
    """Stacked horizontal bars, all on one scale; a row is its name, its text and its parts."""
    longest = max((sum(part.value for part in parts) for _, _, parts in rows), default=0.0) or 1.0
    spoken = [
        Bar(f"{name}, {text}", 0, ", ".join(f"{p.name} {p.text}" for p in parts), "") for name, text, parts in rows
    ]
    root = _image("div", "bars stacked", label, spoken)
    for name, text, parts in rows:
        line = _add(root, "div", {"class": "bar"})
        _add(line, "span", {"class": "name"}, name)
        track = _add(line, "span", {"class": "track"})
        for part in parts:
            style = {"class": f"part {part.colour}", "style": f"width:{_percent(part.value, longest)}"}
            _add(track, "span", style | {"title": f"{part.name}: {part.text}"})
        _add(line, "span", {"class": "value"}, text)
    return _html(root)


def interval_track(axis: LogAxis, median: float, low: float, high: float) -> Markup:
    """A ratio with its interval on ``axis``, a line at 1: decoration of a number that stands beside it."""
    root = ET.Element("span", {"class": "mini", "aria-hidden": "true"})
    _add(root, "span", {"class": "one", "style": f"left:{axis.at(1)}%"})
    left, right = axis.at(low), axis.at(high)
    _add(root, "span", {"class": "range", "style": f"left:{left}%;width:{right - left:.2f}%"})
    _add(root, "span", {"class": "dot", "style": f"left:{axis.at(median)}%"})
    return _html(root)


def log_log(
    series: Sequence[Series],
    guides: Sequence[Guide] = (),
    *,
    label: str,
    x_ticks: Sequence[float] | None = None,
) -> Markup:
    """Series over logarithmic axes, as SVG.

    Args:
        label: what is to be seen, for those who cannot see it.
        x_ticks: by default round numbers.

    Raises:
        ValueError: no series has a point.
    """
    points = [point for one in series for point in one.points if point is not None]
    corners = [corner for guide in guides for corner in guide.points]
    x = LogAxis([*(point.x for point in points), *(corner[0] for corner in corners)], 1.15)
    highs = [point.high or point.y for point in points]
    lows = [point.low or point.y for point in points]
    y = LogAxis([*highs, *lows, *(corner[1] for corner in corners)])
    root = ET.Element("svg", {"class": "plot", "role": "img", "aria-label": label})
    # The browser's own attributes: a percentage is of the plot's area, text beside it overflows into the padding.
    for tick in y.ticks():
        height = f"{100 - y.at(tick):.2f}%"
        _add(root, "line", {"class": "grid", "x1": "0", "x2": "100%", "y1": height, "y2": height})
        _add(root, "text", {"class": "y", "x": "-8", "y": height, "dy": "0.35em"}, f"{tick:,g}")
    taken = -math.inf
    for tick in x.ticks() if x_ticks is None else sorted(x_ticks):
        if x.at(tick) - taken < 9:  # labels would touch on a phone
            continue
        taken = x.at(tick)
        left = f"{taken}%"
        _add(root, "line", {"class": "grid", "x1": left, "x2": left, "y1": "0", "y2": "100%"})
        _add(root, "text", {"class": "x", "x": left, "y": "100%", "dy": "1.5em"}, f"{tick:,g}")
    for guide in guides:
        _segments(root, x, y, guide.points, "guide")
        if guide.label:
            corner = guide.points[-1 if guide.at_end else 0]
            # below the start of a rising line, above a level one: beside it either way
            side, down = ("at-end", "-0.5em") if guide.at_end else ("at-start", "1.5em")
            place = {"x": f"{x.at(corner[0])}%", "y": f"{100 - y.at(corner[1]):.2f}%", "dy": down}
            _add(root, "text", {"class": f"guide-label {side}", **place}, guide.label)
    for one in series:
        group = _add(root, "g", {"class": f"series {one.colour}" + (" hollow" if one.hollow else "")})
        if one.joined:
            for before, after in pairwise(one.points):
                if before is not None and after is not None:
                    _segments(group, x, y, [(before.x, before.y), (after.x, after.y)], "curve")
        for point in filter(None, one.points):
            if point.low is not None and point.high is not None:
                _segments(group, x, y, [(point.x, point.low), (point.x, point.high)], "error")
            place = {"x": f"{x.at(point.x)}%", "y": f"{100 - y.at(point.y):.2f}%"}
            mark = _add(group, "svg", {"class": "mark", **place})
            shape = _add(mark, "path", {"d": MARKS[one.mark]})
            _add(shape, "title", {}, point.title)
    return _html(root)


def swatch(colour: str, mark: str = "square", *, hollow: bool = False) -> Markup:
    """A legend's sign."""
    root = ET.Element("svg", {"class": f"swatch {colour}" + (" hollow" if hollow else ""), "aria-hidden": "true"})
    _add(_add(root, "svg", {"class": "mark", "x": "50%", "y": "50%"}), "path", {"d": MARKS[mark]})
    return _html(root)


def _image(tag: str, style: str, label: str, rows: Iterable[Bar]) -> ET.Element:
    content = "; ".join(f"{row.name}: {row.text}" for row in rows)
    return ET.Element(tag, {"class": style, "role": "img", "aria-label": f"{label}. {content}."})


def _segments(parent: ET.Element, x: LogAxis, y: LogAxis, points: Sequence[tuple[float, float]], style: str) -> None:
    for (x1, y1), (x2, y2) in pairwise(points):
        ends = {"x1": f"{x.at(x1)}%", "x2": f"{x.at(x2)}%"}
        ends |= {"y1": f"{100 - y.at(y1):.2f}%", "y2": f"{100 - y.at(y2):.2f}%"}
        _add(parent, "line", {"class": style, **ends})


def _add(parent: ET.Element, tag: str, attributes: dict[str, str], text: str | None = None) -> ET.Element:
    child = ET.SubElement(parent, tag, attributes)
    child.text = text
    return child


def _percent(value: float, full: float) -> str:
    return f"{100 * value / full:.2f}%"


def _html(root: ET.Element) -> Markup:
    # ElementTree escapes text and attributes, so the result may stand in a page as it is.
    return Markup(ET.tostring(root, encoding="unicode", short_empty_elements=False))
