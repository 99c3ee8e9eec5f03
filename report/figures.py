"""The papers' figures, loss curves, and accuracies against a setting, drawn from values alone:

    python -m report.figures lr rates.png runs/emoji-3d …          # or epochs, shots
    python -m report.figures curve curve.png runs/emoji-3d         # between the weights
    python -m report.figures strategies arrows.png runs/emoji-3d   # without → with synthesis
"""

import math
import re
import statistics
import textwrap
import zlib
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageOps

from core.artifacts import write_atomically
from core.config import Parser
from core.results import read_records
from core.utils import fail, warn
from report.tables import (
    MEANS,
    groups,
    labels_of,
    rival,
    row_of,
    rows_of,
    values_of,
    without_recipe,
)

# Colours that the colour-blind can tell apart (Okabe and Ito).
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, GREY, BLACK = "#56B4E9", "#E69F00", "#7F7F7F", "#000000"
COLOURS = [BLUE, RED, GREEN, PINK, SKY, ORANGE, GREY, BLACK]
MARKERS = "osD^vPX<>p"
STYLES = {  # a method's colour and marker, the same in all figures
    "zero-shot": (BLACK, "*"), "finetune": (GREY, "o"), "linear": (GREY, "s"),
    "lads": (ORANGE, "s"), "global": (PINK, "D"), "ldfs": (BLUE, "o"), "clipstyler": (BLACK, "X"),
    "flyp": (RED, "o"), "flyp+captions": (SKY, "^"), "flyp+retrieved": (ORANGE, "v"),
    "arf": (GREEN, "o"), "arf+ldfs": (BLUE, "D"), "arf+dive": (GREEN, "P"),
    "dive": (PINK, "P"), "snd": (BLACK, "v"),
    "coop": (SKY, "s"), "cocoop": (BLUE, "s"), "maple": (SKY, "P"),
    "full": (ORANGE, "o"), "lpft": (BLUE, "^"), "clipood": (BLACK, "D"), "towers": (RED, "s"),
}
INSIDE, OUTSIDE = {"loc": "best"}, {"loc": "upper left", "bbox_to_anchor": (1.02, 1)}  # legends
SETTINGS = {"lr": "learning rate", "epochs": "epochs", "shots": "training images of each class"}


def save(figure, path, on_error=warn, **layout):
    """Write a figure as PNG."""
    figure.tight_layout(**layout)
    print(f"drawing {path}")
    write_atomically(
        Path(path), lambda part: figure.savefig(part, dpi=110, format="png"), on_error
    )


def style(label):
    """Return (colour, marker) of a method, by a hash of its name if it is not in STYLES.

    label: of a row. What is not as usual ("ldfs:sigma=0", "arf k=3") only changes the marker.
    """
    method, options = re.fullmatch(r"([^: ]*)(.*)", label).groups()
    number = zlib.crc32(method.encode())
    color, marker = STYLES.get(
        method, (COLOURS[number % len(COLOURS)], MARKERS[number // 8 % len(MARKERS)])
    )
    return color, MARKERS[zlib.crc32(options.encode()) % len(MARKERS)] if options else marker


def panels(n, width, height):
    """Return a figure and its n axes, at most four in a row, of width × height inches each."""
    columns = min(4, n)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(width * columns, height * rows))
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)]


def decorate(axis, x, y, legend=None):
    """Name both directions, by words or by one of MEANS; add a grid and perhaps a legend."""
    unit = ", accuracy in per cent"
    axis.set(xlabel=x + unit * (x in MEANS), ylabel=y + unit * (y in MEANS))
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=8, **legend)


def hide_frame(axis):
    """Leave only what is drawn in the axes, and the labels beside it."""
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


# -------------------------------------------------------------------------------------------------
# Images


def draw_figure4(path, targets):
    """Draw LDFS's figure 4 into a file per target: figure4.png becomes figure4-sketch.png.

    targets: {domain: rows for draw_neighbours}.
    """
    for domain, rows in targets.items():
        name = f"{Path(path).stem}-{domain}.png".replace(" ", "_")
        title = f'The images of "{domain}" nearest to the features that each method synthesises'
        draw_neighbours(Path(path).with_name(name), rows, title)


def draw_neighbours(path, rows, title):
    """Draw source images and, below them, the real ones nearest to synthesised features.

    rows: [(label, [(Location, whether the nearest image is of another class)])].
    """
    size, pitch, columns = 96, 110, len(rows[0][1])  # in pixels: an image, and one to the next
    # One sheet is pasted, because matplotlib takes seconds to draw an axes for each image.
    sheet = Image.new("RGB", (pitch * columns, pitch * len(rows)), "white")
    for y, (_, images) in enumerate(rows):
        for x, (location, lost) in enumerate(images):
            color, width = (RED, 4) if lost else ("lightgrey", 1)
            image = ImageOps.expand(location.open().resize((size, size)), width, color)
            margin = (pitch - image.width) // 2
            sheet.paste(image, (pitch * x + margin, pitch * y + margin))
    figure, [axis] = panels(1, columns + 1, 1.08 * len(rows) + 0.35)
    axis.imshow(sheet)
    hide_frame(axis)
    axis.set_yticks([pitch * (y + 0.5) for y in range(len(rows))], [name for name, _ in rows])
    axis.tick_params(length=0, labelsize=9)
    axis.set_anchor("W")  # beside its labels, because the layout reserves their width there
    axis.set_title(f"{title} (red frame: of another class)", fontsize=10)
    save(figure, path, pad=0.3)


def draw_styles(path, rows):
    """Draw LDFS's figure 5: source images, and what a network made of them for each target.

    rows: {label: images (B, 3, H, W) in [0, 1]}.
    """
    figure = Figure(figsize=(11, 1.05 * len(rows) + 0.3))
    for axis, (name, images) in zip(figure.subplots(len(rows), 1), rows.items()):
        _, _, height, width = images.shape
        axis.imshow(images.permute(2, 0, 3, 1).reshape(height, -1, 3).numpy())  # side by side
        for i in range(1, len(images)):
            axis.axvline(width * i - 0.5, color="white", linewidth=2)
        hide_frame(axis)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("Test images, and what CLIPstyler's networks make of them", fontsize=10)
    save(figure, path, pad=0.3, rect=(0.06, 0, 1, 1))  # tight_layout cuts the names off


def draw_figure5(path, columns):
    """Draw ARF's figure 5: images with captions and, below each, the nearest retrieved pair.

    columns: [(Location, caption, (score, Location, text) or None)].
    """
    def draw(axis, location, text):
        axis.imshow(location.open().resize((96, 96)))
        # Captions may contain a "$", which would start a formula.
        axis.set_xlabel(textwrap.fill(text, 18, max_lines=5), fontsize=7, parse_math=False)

    figure = Figure(figsize=(1.5 * len(columns), 4.5))
    axes = figure.subplots(2, len(columns), squeeze=False)
    for (above, below), (location, caption, pair) in zip(axes.T, columns):
        draw(above, location, caption)
        if pair:
            draw(below, *pair[1:])
            below.set_title(f"cosine {pair[0]:.2f}", fontsize=7, pad=2)
        above.set(xticks=[], yticks=[], box_aspect=1, anchor="N")
        below.set(xticks=[], yticks=[], box_aspect=1, anchor="N")
    axes[0][0].set_ylabel("image, its caption")
    axes[1][0].set_ylabel("nearest pair, its text")
    figure.suptitle("Training images with captions, and the nearest retrieved pairs", fontsize=10)
    save(figure, path, pad=0.4)


# -------------------------------------------------------------------------------------------------
# Training


def draw_losses(histories, path):
    """Draw the loss terms of each training over its epochs, a panel each; dotted: learning rate.

    histories: {label: [{"L_cl": mean over the epoch, …, "lr": …}]}, an entry for each epoch.
    """
    figure, axes = panels(len(histories), 3.4, 2.5)
    for axis, (label, history) in zip(axes, histories.items()):
        epochs = range(1, len(history) + 1)
        marker = "." if len(history) == 1 else ""  # a line of one point is invisible
        names = dict.fromkeys(name for entry in history for name in entry if name != "lr")
        for i, name in enumerate(names):
            values = [entry.get(name, math.nan) for entry in history]
            color = COLOURS[i % len(COLOURS)]
            axis.plot(epochs, values, marker=marker, color=color, label=name)
        if history and "lr" in history[0]:
            rate = axis.twinx()
            rate.plot(epochs, [entry["lr"] for entry in history], ":", color="grey", linewidth=1)
            rate.set(yticks=[], ylim=(0, None))
        decorate(axis, "", "", INSIDE)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(label, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set(zorder=1, facecolor="none")  # in front of the learning rate's axis
    figure.supxlabel("epoch, of a mapper round (dotted: learning rate)", fontsize=9)
    figure.suptitle("Loss terms of each training, averaged over an epoch; seed 0", fontsize=10)
    save(figure, path)


# -------------------------------------------------------------------------------------------------
# Accuracies


def mean_accuracies(records):
    """Return {Row: {mean: (value, deviation) over seeds}} for each of MEANS, and those of zero-shot
    CLIP. Exit with status 2 if there is not one table, or no zero-shot accuracy in it.
    """
    records = [r for r in records if r["kind"] == "accuracy"]
    if not records:
        fail("there are no accuracies yet. Run evaluate.py first.")
    if len(groups(records)) > 1:
        fail("one figure shows one data set, source and model. Name the runs of one.")
    points = {}
    for row, seeds in rows_of(records).items():
        values = {mean: values_of(seeds, mean) for mean in MEANS}
        points[row] = {mean: mean_and_stdev(v) for mean, v in values.items() if v}
    start = [means for row, means in points.items() if row.method == "zero-shot"]
    return points, start[0] if start else fail("the results lack zero-shot. Run evaluate.py again.")


def mean_and_stdev(values):
    """Return (mean, standard deviation) of values; the deviation of one value is 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0


def error_bars(axis, x, y, color):
    """Draw the deviations of a point: x and y are (mean, deviation) each, x may be a number."""
    (x, x_deviation), (y, y_deviation) = x if isinstance(x, tuple) else (x, 0), y
    axis.errorbar(
        x, y, y_deviation or None, x_deviation or None, fmt="none", ecolor=color, elinewidth=0.8,
        alpha=0.6,
    )


def figure_title(subject, records):
    """Return a figure's title: what it compares, on which data, over how many seeds."""
    seeds = len({r["seed"] for r in records})
    bars = f"mean and deviation of {seeds} seeds" if seeds > 1 else "1 seed"
    return "{}\n{dataset}, trained on {source}; {}".format(subject, bars, **records[0])


def draw_curve(records, path):
    """Draw ARF's figure 4: ID against OOD mean, and against unseen mean, along α."""
    records = [r for r in records if r["kind"] == "accuracy"]
    if all(r["alpha"] == 1 for r in records):
        return print("no curve: no weights in between were measured (--alphas 0.2 0.5 0.8)")
    points, start = mean_accuracies(records)
    other_means = [mean for mean in MEANS[1:] if {mean, "ID"} <= start.keys()]
    if not other_means:
        return print("no curve: there is no other domain, nor a set of other classes")
    curves = {}  # {Row at α = 1: {α: means}}
    for row, means in points.items():
        curves.setdefault(row._replace(alpha=1.0), {0: start})[row.alpha] = means
    curves = {row: sorted(curve.items()) for row, curve in curves.items() if len(curve) > 2}
    figure, axes = panels(len(other_means), 5.7, 4.6)
    for axis, other in zip(axes, other_means):
        for curve, label in zip(curves.values(), labels_of(curves)):
            color, marker = style(label)
            at = {alpha: (means[other], means["ID"]) for alpha, means in curve if other in means}
            line = [(x, y) for (x, _), (y, _) in at.values()]
            axis.plot(*zip(*line), ".-", color=color, markersize=4)
            for alpha, inside in ((0.5, "white"), (1, color)):
                if alpha in at:
                    (x, _), (y, _) = at[alpha]
                    name = label if alpha == 1 else None
                    axis.plot(x, y, marker, color=color, markerfacecolor=inside, label=name)
                    error_bars(axis, *at[alpha], color)
        axis.plot(start[other][0], start["ID"][0], "k*", markersize=14, label="zero-shot (α = 0)")
        decorate(axis, other, "ID", legend=axis is axes[-1] and OUTSIDE)
    subject = "Between zero-shot (α = 0) and finetuned weights (open: α = 0.5, filled: α = 1)"
    figure.suptitle(figure_title(subject, records), fontsize=10)
    save(figure, path)


def draw_against(setting, records, path):
    """Draw ID, OOD mean and unseen mean of each method against one of SETTINGS.

    Solid: α = 1. Dashed: α = 0.5. Black: zero-shot.
    """
    points, start = mean_accuracies(records)
    lines = {}  # {Row without the setting: {value of the setting: means}}
    for r in records:
        if r["kind"] == "accuracy" and r["schedule"] and r["alpha"] in (0.5, 1):
            shots = r["options"].get("shots", math.inf)
            value = shots if setting == "shots" else r["schedule"][setting]
            row = row_of(r)
            options = tuple(option for option in row.options if option[0] != setting)
            lines.setdefault(row._replace(options=options), {})[value] = points[row]
    values = sorted({value for line in lines.values() for value in line})
    means = [mean for mean in MEANS if mean in start]
    figure, axes = panels(len(means), 4.2, 3.9)
    for axis, mean in zip(axes, means):
        axis.axhline(start[mean][0], color=BLACK, linestyle=":", label="zero-shot")
        for number, ((row, line), label) in enumerate(zip(lines.items(), labels_of(lines))):
            shift = 0.06 * (number - (len(lines) - 1) / 2)  # so that error bars do not overlap
            color, marker = style(label.removesuffix(f" α={row.alpha:g}"))
            x = [i + shift for i, value in enumerate(values) if mean in line.get(value, {})]
            y = [line[value][mean] for value in values if mean in line.get(value, {})]
            dashes = "-" if row.alpha == 1 else "--"
            height = [value for value, _ in y]
            axis.plot(x, height, marker=marker, linestyle=dashes, color=color, label=label)
            for at in zip(x, y):
                error_bars(axis, *at, color)
        axis.set_xticks(range(len(values)), [f"{v:g}".replace("inf", "all") for v in values])
        decorate(axis, SETTINGS[setting], mean, legend=axis is axes[-1] and OUTSIDE)
    subject = f"Accuracy by {SETTINGS[setting]}"
    figure.suptitle(figure_title(subject, records), fontsize=10)
    save(figure, path, fail)


def draw_strategies(records, path):
    """Draw strategies by ID and OOD mean, and arrows to the same with synthesised features."""
    points, start = mean_accuracies(records)
    if "OOD mean" not in start:
        fail("there is no other domain to draw.")
    figure, [axis] = panels(1, 8.5, 5.5)
    axis.plot(start["ID"][0], start["OOD mean"][0], "k*", markersize=14, label="zero-shot")
    bases, dashes = {}, {}
    for row, means in points.items():
        strategy = without_recipe(row.method)
        base = rival(row, strategy, points)
        if row.alpha != 1 or base is None:
            continue
        color, marker = bases.setdefault(base.label(), style(base.method))
        recipe = row.method.removeprefix(f"{strategy}+")
        dash = dashes.setdefault(recipe, ["-", "--", ":"][len(dashes) % 3])
        for r in (base, row):
            error_bars(axis, points[r]["ID"], points[r]["OOD mean"], color)
        tail, head = [(m["ID"][0], m["OOD mean"][0]) for m in (points[base], means)]
        arrow = {"arrowstyle": "->", "color": color, "linestyle": dash, "linewidth": 1.6}
        axis.annotate("", head, tail, arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
        axis.plot(*tail, marker, color=color)
        axis.plot(*head, ".", color=color, markersize=3)
    for strategy, (color, marker) in bases.items():
        axis.plot([], [], marker, color=color, label=strategy)
    for recipe, dash in dashes.items():
        axis.plot([], [], color="grey", linestyle=dash, label=f"with {recipe}'s features")
    decorate(axis, "ID", "OOD mean", OUTSIDE)
    subject = "Strategies without → with synthesised features"
    figure.suptitle(figure_title(subject, records), fontsize=10)
    save(figure, path, fail)


OF_RECORDS = {name: partial(draw_against, name) for name in SETTINGS}
OF_RECORDS |= {"curve": draw_curve, "strategies": draw_strategies}


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=OF_RECORDS)
    parser.add_argument("path", help="where to write the PNG")
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="folders: runs/emoji-3d, docs/results/emoji-3d")
    args = parser.parse_args()
    records = [record for run in args.runs for record in read_records(run)]
    OF_RECORDS[args.what](records, args.path)


if __name__ == "__main__":
    main()
