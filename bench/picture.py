"""The demo's picture: photos and captions, their similarity matrix, the times, and what they were measured on."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import StrMethodFormatter
from PIL import Image, ImageOps

from beit3_fast.demo import OURS, PARTS, REFERENCE, Result

from .report import count, milliseconds

INK, SOFT, FAINT = "#17202a", "#5f6b7a", "#dfe5ec"
OURS_COLOUR, REFERENCE_COLOUR = "#0f766e", "#a3aebd"
NOTICE_FILL, NOTICE_EDGE, NOTICE_INK = "#fff3cd", "#e0a800", "#6b4e00"
WRONG = "#b91c1c"
HEAT = LinearSegmentedColormap.from_list("heat", ["#f2f7f7", "#9fd3cb", "#0f766e", "#06403c"])

FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")
SHOWN = 12
"""Images and texts drawn at most; the terminal and the JSON have all of them."""


def check_format(path: str | os.PathLike[str], argument: str) -> Path:
    """Raises :class:`ValueError` if the file name's ending names no format that can be drawn."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{argument} must end in one of {', '.join(FORMATS)}, got {str(path)!r}")
    return path


def draw(result: Result, path: Path) -> None:
    """Draws ``result`` into the file ``path``."""
    compose(result).savefig(path, facecolor="white")


def compose(result: Result) -> Figure:
    """The picture as a figure."""
    figure = Figure(figsize=(15, 10), dpi=110, facecolor="white")
    banner = 1.35 if not result.trained else 0.85
    top, upper, lower = figure.subfigures(3, 1, squeeze=False, height_ratios=[banner, 5.2, 3.4]).flat
    _title(top, result)
    photos, scores = upper.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.12]).flat
    _photos(photos, result)
    _scores(scores, result)
    times, facts = lower.subfigures(1, 2, squeeze=False, width_ratios=[1.25, 1]).flat
    _times(times, result)
    _facts(facts, result)
    return figure


def _title(figure: SubFigure, result: Result) -> None:
    height = 0.74 if not result.trained else 0.6
    figure.text(0.035, height, "beit3_fast", fontsize=25, fontweight="bold", color=OURS_COLOUR, va="center")
    figure.text(
        0.175,
        height,
        "the drop-in BEiT-3 against reference PyTorch, same weights, same inputs",
        fontsize=15,
        color=SOFT,
        va="center",
    )
    if not result.trained:
        box = FancyBboxPatch(
            (0.036, 0.06),
            0.928,
            0.36,
            transform=figure.transSubfigure,
            boxstyle="round,pad=0,rounding_size=0.008",
            facecolor=NOTICE_FILL,
            edgecolor=NOTICE_EDGE,
            linewidth=1.5,
            mutation_aspect=8,
        )
        figure.add_artist(box)
        figure.text(
            0.5,
            0.24,
            f"RANDOM WEIGHTS ({result.weights.removeprefix('random, ')}): the scores mean nothing. "
            "Parity and times do not depend on them.",
            fontsize=14,
            fontweight="bold",
            color=NOTICE_INK,
            ha="center",
            va="center",
        )


def _heading(figure: SubFigure, text: str, x: float) -> None:
    figure.text(x, 0.965, text, fontsize=14, fontweight="bold", color=INK, va="top")


def _photos(figure: SubFigure, result: Result) -> None:
    pairing = result.pairing
    images = pairing.images[:SHOWN]
    heading = "Photos and captions" if pairing.captioned else "Images"
    _heading(figure, heading + _part("images", len(images), len(pairing.images)), 0.075)
    columns = 2 if len(images) <= 2 else 3 if len(images) <= 6 else 4
    rows = -(-len(images) // columns)
    grid = figure.add_gridspec(rows, columns, left=0.075, right=0.97, top=0.89, bottom=0.04, wspace=0.12, hspace=0.1)
    for index, image in enumerate(images):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        axes.imshow(_thumbnail(image, 480))
        axes.set_anchor("N")
        _bare(axes)
        axes.text(
            0.045,
            0.93,
            str(index + 1),
            transform=axes.transAxes,
            fontsize=11,
            fontweight="bold",
            color="white",
            ha="left",
            va="top",
            bbox={"boxstyle": "round,pad=0.25", "facecolor": INK, "edgecolor": "none", "alpha": 0.85},
        )
        caption = pairing.texts[index] if pairing.captioned else pairing.names[index]
        width = {2: 46, 3: 33, 4: 22}[columns]
        axes.text(
            0.5,
            -0.06,
            _wrap(caption, width, 4 if rows <= 2 else 2),
            transform=axes.transAxes,
            fontsize=8.8,
            color=INK,
            ha="center",
            va="top",
        )


def _scores(figure: SubFigure, result: Result) -> None:
    pairing = result.pairing
    cosine = result.cosine[:SHOWN, :SHOWN]
    texts, images = cosine.shape
    _heading(figure, "Cosine similarity" + _part("texts", texts, len(pairing.texts)), 0.03)
    axes = figure.add_axes((0.34, 0.1, 0.6, 0.71))
    low, high = cosine.min().item(), cosine.max().item()
    shades = Normalize(low, high if high > low else low + 1)
    axes.imshow(cosine.numpy(), cmap=HEAT, norm=shades, aspect="auto")
    size = 11.5 if max(texts, images) <= 6 else 9 if max(texts, images) <= 9 else 7
    best = result.cosine.argmax(dim=0).tolist()
    for row in range(texts):
        for column in range(images):
            value = cosine[row, column].item()
            axes.text(
                column,
                row,
                f"{value:.3f}" if images <= 9 else f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=size,
                color="white" if shades(value) > 0.5 else INK,
                fontweight="bold" if result.trained and best[column] == row else "normal",
            )
    if result.trained:
        for column, row in enumerate(best[:images]):
            if row < texts:
                frame = Rectangle(
                    (column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor="#f59e0b", linewidth=2.5
                )
                axes.add_patch(frame)
    axes.set_xticks(range(images), [str(i + 1) for i in range(images)], fontsize=11, fontweight="bold")
    lines = 3 if texts <= 7 else 2 if texts <= 10 else 1
    labels = [_wrap(text, 30 if texts <= 8 else 38, lines) for text in pairing.texts[:texts]]
    axes.set_yticks(range(texts), labels, fontsize=9.5 if texts <= 8 else 8)
    axes.tick_params(length=0, colors=INK)
    for column in range(1, images):
        axes.axvline(column - 0.5, color="white", linewidth=1.5)
    for row in range(1, texts):
        axes.axhline(row - 0.5, color="white", linewidth=1.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for column in range(images):
        thumbnail = axes.inset_axes(((column + 0.1) / images, 1.015, 0.8 / images, 0.11))
        thumbnail.imshow(_thumbnail(pairing.images[column], 200))
        thumbnail.set_anchor("S")
        _bare(thumbnail)
    note = "framed: the best text of each image" if result.trained else "random weights: no pattern is to be expected"
    figure.text(0.64, 0.025, note, fontsize=9.5, color=SOFT, ha="center", va="center")


def _times(figure: SubFigure, result: Result) -> None:
    _heading(figure, f"Time of one forward, {result.dtype}", 0.064)
    if result.timing is None:
        figure.text(0.064, 0.79, "none: a wrong result has no speed", fontsize=10.5, color=WRONG)
        return
    axes = figure.add_axes((0.2, 0.13, 0.765, 0.66))
    longest = 0.0
    for place, part in enumerate(PARTS):
        for provider, offset, colour in ((REFERENCE, -0.19, REFERENCE_COLOUR), (OURS, 0.19, OURS_COLOUR)):
            time = result.time(provider, part)
            median, low, high = (value / 1e6 for value in (time.median, time.low, time.high))
            axes.barh(
                place + offset,
                median,
                height=0.34,
                color=colour,
                xerr=[[median - low], [high - median]],
                error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 3},
            )
            longest = max(longest, high)
    for place, part in enumerate(PARTS):
        for provider, offset in ((REFERENCE, -0.19), (OURS, 0.19)):
            time = result.time(provider, part)
            label = f"{milliseconds(time.median)} ms"
            axes.text(time.high / 1e6 + longest * 0.015, place + offset, label, va="center", fontsize=10, color=INK)
        speedup = result.speedup(part)
        axes.text(
            longest * 1.42,
            place - 0.08,
            f"{speedup.median:.2f}x",
            fontsize=19,
            fontweight="bold",
            color=OURS_COLOUR if speedup.low > 1 else INK,
            ha="right",
            va="center",
        )
        axes.text(
            longest * 1.42,
            place + 0.28,
            f"95 %: {speedup.low:.2f} to {speedup.high:.2f}",
            fontsize=8.5,
            color=SOFT,
            ha="right",
            va="center",
        )
    axes.set_xlim(0, longest * 1.43)
    axes.set_ylim(len(PARTS) - 0.5, -0.5)
    axes.set_yticks(range(len(PARTS)), PARTS, fontsize=11.5)
    axes.set_xlabel("milliseconds, shorter is better", fontsize=9.5, color=SOFT, loc="left")
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= longest * 1.02])
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.tick_params(axis="y", length=0, colors=INK)
    axes.tick_params(axis="x", labelsize=9, colors=SOFT)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    for x, colour, name in ((0.62, REFERENCE_COLOUR, "reference PyTorch"), (0.85, OURS_COLOUR, "beit3_fast")):
        figure.add_artist(
            Rectangle((x, 0.885), 0.018, 0.055, transform=figure.transSubfigure, facecolor=colour, edgecolor="none")
        )
        figure.text(x + 0.026, 0.91, name, fontsize=10.5, color=INK, va="center")


def _facts(figure: SubFigure, result: Result) -> None:
    about = result.machine
    worst = max(error.maximum for error in result.parity.error.values())
    revision = f" ({about['git_revision']})" if about["git_revision"] else ""
    facts = [
        ("Parity", f"{'passed' if result.parity.ok else 'FAILED'}: {result.parity.summary}"),
        ("Largest error", f"{worst:.1e} of the output's size"),
        ("Model", f"{result.model}, {result.parameters / 1e6:.0f} M parameters"),
        ("Weights", result.weights),
        ("Texts", f"{result.valid_tokens:.1f} valid tokens on average, padded to {result.padded_tokens}"),
        ("Machine", f"{about['gpu'] or about['cpu']}, {count(about['threads'], 'thread')}, {about['isa']}"),
        ("Software", f"beit3_fast {about['beit3_fast']}{revision}, torch {about['torch']}"),
    ]
    if result.timing is not None:
        facts.append(("Method", f"medians of {result.settings['rounds']} interleaved rounds, 95 % intervals"))
    _heading(figure, "Facts", 0.03)
    y = 0.79
    for name, value in facts:
        lines = _wrap(value, 56 if name == "Parity" else 62, 2)
        colour = INK
        if name == "Parity":
            colour = OURS_COLOUR if result.parity.ok else WRONG
        figure.text(0.03, y, name, fontsize=10.5, color=SOFT, va="baseline")
        weight = "bold" if name == "Parity" else "normal"
        for line in lines.split("\n"):
            figure.text(0.2, y, line, fontsize=10.5, color=colour, va="baseline", fontweight=weight)
            y -= 0.068
        y -= 0.02


def _thumbnail(image: Image.Image, width: int) -> Image.Image:
    # A little above the middle: that is where faces are.
    return ImageOps.fit(image, (width, width * 3 // 4), centering=(0.5, 0.3))


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _wrap(text: str, width: int, lines: int) -> str:
    # A dollar would start a formula.
    text = " ".join(text.split()).replace("$", r"\$")
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


def _part(what: str, drawn: int, total: int) -> str:
    return "" if drawn == total else f" (first {drawn} of {total} {what})"
