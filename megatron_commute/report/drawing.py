"""The house style of pictures: colours, sizes, one sample axis, and figures as SVG elements.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; markers and
dashes tell lines apart without colour.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import warnings

import numpy as np

from megatron_commute.report import series

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
GREY = "#6b7280"
MANY = 40  # more points than this are drawn small or without markers
WIDTH = 4.5  # inches; still readable when shrunk to the width of a phone
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_commute",
    "text.parse_math": False,
    "savefig.dpi": 160,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of the report."""

    name: str
    # file name and anchor
    title: str
    # above it
    caption: str
    # below it: units and error bars
    figure: object
    # of matplotlib

    def svg(self):
        """The figure as an <svg> element whose ids are its own, so that many fit into one page."""
        text = io.StringIO()
        with house_style():
            _lay_out(self.figure)
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure.savefig(text, format="svg", metadata=nothing)
        element = text.getvalue()
        element = element[element.index("<svg") :]
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", element)

    def png(self):
        """The figure as the bytes of a PNG file."""
        content = io.BytesIO()
        with house_style():
            _lay_out(self.figure)
            self.figure.savefig(content, format="png", metadata={"Software": None})
        return content.getvalue()


def _lay_out(figure):
    """Place the panels once; matplotlib would do it twice for every file it writes."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


@contextlib.contextmanager
def house_style():
    """STYLE, in force while figures are made and saved."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # scripts the font lacks are drawn by the browser's own fonts; only PNG shows boxes
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        yield


def canvas(run, rows, height=2.9, sharey=False, over_samples=True):
    """A figure of `rows` panels, `height` inches each, with samples along the lowest axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * rows + 0.5 * (rows > 1)), layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True, sharey=sharey, squeeze=False)[:, 0]
    figure.get_layout_engine().set(w_pad=0.07)
    if over_samples:
        factor, words = sample_unit(run)
        end = run.span / factor
        panels[-1].set_xlabel(words)
        panels[-1].set_xlim(-0.02 * end, 1.03 * end)
    return figure, panels


def sample_unit(run):
    """Divisor and label of the sample axis."""
    for factor, word in ((1_000_000, "millions"), (1_000, "thousands")):
        if run.span >= 2 * factor:
            return factor, f"samples ({word})"
    return 1, "samples"


def scale(panels, *values):
    """Factor and name of the power of ten to draw in, and a note if the axis becomes logarithmic.

    Brackets change by orders of magnitude over a run: then the axis is linear up to the power of
    ten of the median size, logarithmic beyond.
    """
    sizes = np.abs(np.concatenate([value[np.isfinite(value)] for value in values]))
    median = np.median(sizes) if len(sizes) else 0.0
    if not median or sizes.max() < 30 * median:
        return *series.power_of_ten(sizes), ""
    factor, power = series.power_of_ten(np.array([median]))
    decades = int(np.log10(sizes.max() / factor))
    apart = max(1, decades if decades < 4 else -(-decades // 2))  # at most two labels on either side of zero
    ticks = [10.0**n for n in range(apart, decades + 1, apart)]
    for axes in panels:
        axes.set_yscale("symlog", linthresh=1.0, linscale=1.0)
        axes.set_yticks([*(-t for t in reversed(ticks)), 0.0, *ticks])
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}".replace("-", "−"))
        axes.minorticks_off()
    return factor, power, " The axis is linear from −1 to 1 and logarithmic beyond."


def percent(value, _position):
    """Tick label of a fraction."""
    return f"{100 * value:g}%".replace("-", "−")


def line(k):
    """Colour and dashes of domain k."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)]}


def label(name, length=18):
    """A name for a picture: shortened, and not hidden by matplotlib before 3.10 for a leading
    underscore.
    """
    short = name if len(name) <= length else name[: length - 1] + "…"
    return " " + short if short.startswith("_") else short


def legend(figure, names, which=None):
    """Names above the panels, in as many columns as fit. which: their domains, default the first
    ones.
    """
    from matplotlib.lines import Line2D

    shorts = [label(name) for name in names]
    handles = [Line2D([], [], **line(k), linewidth=2) for k in which or range(len(names))]
    columns = max(1, min(len(names), 56 // (8 + max(map(len, shorts)))))
    figure.set_figheight(figure.get_figheight() + 0.19 * ((len(names) - 1) // columns))
    figure.legend(
        handles, shorts, loc="outside upper left", ncols=columns, handlelength=2.8, columnspacing=1.4
    )
