"""The papers' figures, loss curves, and accuracies against a setting, drawn from values alone:

    python -m report.figures lr rates.png runs/emoji-3d …          # or epochs, shots
    python -m report.figures strategies arrows.png runs/emoji-3d   # without → with synthesis
"""

import math
import statistics
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageOps

from core.artifacts import write_atomically
from core.config import Parser
from core.results import read_records
from core.utils import fail, warn
from report.tables import MEANS, groups, rival, row_of, rows_of, values_of, without_recipe

# Colours that the colour-blind can tell apart (Okabe and Ito).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#000000"]
SETTINGS = {"lr": "learning rate", "epochs": "epochs", "shots": "training images of each class"}


def save(figure, path, on_error=warn, **layout):
    """Write a figure as PNG."""
    figure.tight_layout(**layout)
    print(f"drawing {path}")
    write_atomically(
        Path(path), lambda part: figure.savefig(part, dpi=110, format="png"), on_error
    )


def colour(i):
    """Return the i-th colour; they repeat."""
    return COLOURS[i % len(COLOURS)]


# -------------------------------------------------------------------------------------------------
# Images


def draw_figure4(path, rows):
    """Draw LDFS's figure 4: source images, and the real ones nearest to synthesised features.

    rows: [(label, [(Location, whether the nearest image is of another class)])].
    """
    size, pitch, columns = 96, 110, len(rows[0][1])  # in pixels: an image, and one to the next
    # One sheet is pasted, because matplotlib takes seconds to draw an axes for each image.
    sheet = Image.new("RGB", (pitch * columns, pitch * len(rows)), "white")
    for y, (_, images) in enumerate(rows):
        for x, (location, lost) in enumerate(images):
            color, width = (COLOURS[1], 4) if lost else ("lightgrey", 1)
            image = ImageOps.expand(location.open().resize((size, size)), width, color)
            margin = (pitch - image.width) // 2
            sheet.paste(image, (pitch * x + margin, pitch * y + margin))
    figure = Figure(figsize=(columns + 1, 1.08 * len(rows)))
    axis = figure.subplots()
    axis.imshow(sheet)
    axis.set_yticks([pitch * (y + 0.5) for y in range(len(rows))], [name for name, _ in rows])
    axis.tick_params(length=0, labelsize=9)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.set_anchor("W")  # beside its labels, because the layout reserves their width there
    title = "Nearest real image of each synthesised feature (framed: of another class)"
    figure.suptitle(title, fontsize=10)
    save(figure, path, pad=0.3, rect=(0, 0, 1, 0.985))  # the title is above the images


def draw_styles(path, rows):
    """Draw LDFS's figure 5: source images, and what a network made of them for each target.

    rows: {label: images (B, 3, H, W) in [0, 1]}.
    """
    figure = Figure(figsize=(11, 1.05 * len(rows)))
    for axis, (name, images) in zip(figure.subplots(len(rows), 1), rows.items()):
        _, _, height, width = images.shape
        axis.imshow(images.permute(2, 0, 3, 1).reshape(height, -1, 3).numpy())  # side by side
        for i in range(1, len(images)):
            axis.axvline(width * i - 0.5, color="white", linewidth=2)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.spines[:].set_visible(False)
    save(figure, path, pad=0.3)


def draw_figure5(path, columns):
    """Draw ARF's figure 5: images with captions and, below each, the nearest retrieved pair.

    columns: [(Location, caption, (score, Location, text) or None)].
    """
    def draw(axis, location, text):
        axis.imshow(location.open().resize((96, 96)))
        # Captions may contain a "$", which would start a formula.
        text = textwrap.fill(text, 18, max_lines=5)
        axis.set_xlabel(text, fontsize=7, parse_math=False)

    figure = Figure(figsize=(1.5 * len(columns), 4.7))
    axes = figure.subplots(2, len(columns), squeeze=False)
    for (above, below), (location, caption, pair) in zip(axes.T, columns):
        draw(above, location, caption)
        if pair:
            score, nearest, text = pair
            draw(below, nearest, text)
            below.set_title(f"cosine {score:.2f}", fontsize=7, pad=2)
        below.set(box_aspect=1)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0][0].set_ylabel("image, its caption")
    axes[1][0].set_ylabel("nearest pair, its text")
    save(figure, path, pad=0.4)


# -------------------------------------------------------------------------------------------------
# Training


def draw_losses(histories, path):
    """Draw the loss terms of each training over its epochs, a panel each; grey: learning rate.

    histories: {label: [{"L_cl": mean over the epoch, …, "lr": …}]}, an entry for each epoch.
    """
    columns = min(4, len(histories))
    rows = math.ceil(len(histories) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows))
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axis in axes[len(histories):]:
        axis.set_visible(False)
    for axis, (label, history) in zip(axes, histories.items()):
        epochs = range(1, len(history) + 1)
        marker = "." if len(history) == 1 else ""  # a line of one point is invisible
        names = [*dict.fromkeys(name for entry in history for name in entry if name != "lr")]
        for i, name in enumerate(names):
            values = [entry.get(name, math.nan) for entry in history]
            axis.plot(epochs, values, marker=marker, color=colour(i), label=name)
        if history and "lr" in history[0]:
            rate = axis.twinx()
            rate.plot(epochs, [entry["lr"] for entry in history], ":", color="grey", linewidth=1)
            rate.set(yticks=[], ylim=(0, None))
        axis.set_title(label, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        axis.set(zorder=1, facecolor="none")  # in front of the learning rate's axis
    figure.supxlabel("epoch, of a mapper round (dotted: learning rate)", fontsize=9)
    save(figure, path)


# -------------------------------------------------------------------------------------------------
# Accuracies


def mean_accuracies(records):
    """Return {Row: {mean: value over seeds}} for each of MEANS. Exit if there is not one table."""
    records = [r for r in records if r["kind"] == "accuracy"]
    if not records:
        fail("there are no accuracies yet. Run evaluate.py first.")
    if len(groups(records)) > 1:
        fail("one figure shows one data set, source and model. Name the runs of one.")
    points = {}
    for row, seeds in rows_of(records).items():
        values = {mean: values_of(seeds, mean) for mean in MEANS}
        points[row] = {mean: statistics.mean(v) for mean, v in values.items() if v}
    return points


def zero_shot(points):
    """Return the means of zero-shot CLIP."""
    start = [means for row, means in points.items() if row.method == "zero-shot"]
    return start[0] if start else fail("the results lack zero-shot. Run evaluate.py again.")


def draw_curve(records, path):
    """Draw ARF's figure 4: ID against OOD mean, and against unseen mean, along α."""
    if not any(r["kind"] == "accuracy" and r["alpha"] != 1 for r in records):
        return print("no curve: no weights in between were measured (--alphas 0.2 0.5 0.8)")
    points = mean_accuracies(records)
    start, curves = zero_shot(points), {}
    for row, means in points.items():
        curves.setdefault(row._replace(alpha=1.0), {})[row.alpha] = means
    curves = {row: curve for row, curve in curves.items() if len(curve) > 1}
    x_means = [mean for mean in MEANS[1:] if mean in start]
    if not x_means:
        return print("no curve: there is no other domain, nor a set of other classes")
    figure = Figure(figsize=(5.2 * len(x_means), 4.4))
    for axis, other in zip(figure.subplots(1, len(x_means), squeeze=False)[0], x_means):
        for i, (row, curve) in enumerate(curves.items()):
            curve = {alpha: m for alpha, m in sorted({0: start, **curve}.items()) if other in m}
            x, y = ([means[mean] for means in curve.values()] for mean in (other, "ID"))
            axis.plot(x, y, ".-", color=colour(i), markersize=4, label=row.label())
            for alpha, marker in ((0.5, "D"), (1, "o")):
                if alpha in curve:
                    at = curve[alpha]
                    axis.plot(at[other], at["ID"], marker, color=colour(i), markersize=7)
        axis.plot(start[other], start["ID"], "k*", markersize=14, label="zero-shot (α = 0)")
        axis.set(xlabel=f"{other}, accuracy in per cent", ylabel="ID, accuracy in per cent")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    seeds = len({r["seed"] for r in records if r["kind"] == "accuracy"})
    marks = f"diamond: α = 0.5, dot: α = 1; mean of {seeds} seed{'s' * (seeds > 1)}"
    figure.suptitle(f"From zero-shot to finetuned weights\n({marks})", fontsize=10)
    save(figure, path)


def draw_against(setting, records, path):
    """Draw ID, OOD mean and unseen mean of each method against one of SETTINGS.

    Solid: α = 1. Dashed: α = 0.5. Grey: zero-shot.
    """
    points = mean_accuracies(records)
    start, at = zero_shot(points), {}
    for r in records:
        if r["schedule"]:
            shots = r["options"].get("shots", math.inf)
            at[row_of(r)] = shots if setting == "shots" else r["schedule"][setting]
    positions = {value: i for i, value in enumerate(sorted({*at.values()}))}
    lines = {}  # {Row without the setting: {position: means}}
    for row, value in at.items():
        options = tuple(option for option in row.options if option[0] != setting)
        lines.setdefault(row._replace(options=options), {})[positions[value]] = points[row]
    methods = [*dict.fromkeys(line._replace(alpha=1.0) for line in lines)]
    means = [mean for mean in MEANS if mean in start]
    figure = Figure(figsize=(4 * len(means), 3.8))
    for axis, mean in zip(figure.subplots(1, len(means), squeeze=False)[0], means):
        axis.axhline(start[mean], color="grey", label="zero-shot")
        for line, of_positions in lines.items():
            if line.alpha in (0.5, 1):
                places = [i for i in sorted(of_positions) if mean in of_positions[i]]
                color = colour(methods.index(line._replace(alpha=1.0)))
                values = [of_positions[i][mean] for i in places]
                style = "o-" if line.alpha == 1 else "o--"
                axis.plot(places, values, style, color=color, label=line.label())
        axis.set_xticks(range(len(positions)), [f"{v:g}".replace("inf", "all") for v in positions])
        axis.set(xlabel=SETTINGS[setting], ylabel=f"{mean}, accuracy in per cent")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    save(figure, path, fail)


def draw_strategies(records, path):
    """Draw strategies by ID and OOD mean, and arrows to the same with synthesised features."""
    points = mean_accuracies(records)
    start = zero_shot(points)
    if "OOD mean" not in start:
        fail("there is no other domain to draw.")
    figure = Figure(figsize=(7, 5.5))
    axis = figure.subplots()
    axis.plot(start["ID"], start["OOD mean"], "k*", markersize=14, label="zero-shot")
    colours, lines = {}, {}
    for row, means in points.items():
        strategy = without_recipe(row.method)
        base = rival(row, strategy, points)
        if row.alpha != 1 or base is None:
            continue
        color = colours.setdefault(base.label(), colour(len(colours)))
        recipe = row.method.removeprefix(f"{strategy}+")
        style = lines.setdefault(recipe, ["-", "--", ":"][len(lines) % 3])
        tail, head = [(m["ID"], m["OOD mean"]) for m in (points[base], means)]
        axis.plot(*tail, "o", color=color)
        arrow = {"arrowstyle": "->", "color": color, "linestyle": style, "linewidth": 1.6}
        axis.annotate("", head, tail, arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
        axis.plot(*head, ".", color=color, markersize=3)
    for strategy, color in colours.items():
        axis.plot([], [], "o", color=color, label=strategy)
    for recipe, style in lines.items():
        axis.plot([], [], color="grey", linestyle=style, label=f"with {recipe}'s features")
    axis.set(xlabel="ID, accuracy in per cent", ylabel="OOD mean, accuracy in per cent")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path, fail)


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=[*SETTINGS, "strategies"])
    parser.add_argument("path", help="where to write the PNG")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders or .jsonl files")
    args = parser.parse_args()
    records = [record for run in args.runs for record in read_records(run)]
    if args.what == "strategies":
        draw_strategies(records, args.path)
    else:
        draw_against(args.what, records, args.path)


if __name__ == "__main__":
    main()
