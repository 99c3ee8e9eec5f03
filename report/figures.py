"""The papers' figures, from what they are given; accuracies against a setting, one of NAMES; and
strategies as arrows, from without synthesised features to with:

    python -m report.figures lr assets/rates.png runs/emoji-3d …    # of runs that differ in it
    python -m report.figures strategies assets/arrows.png runs/emoji-3d
"""

import math
import sys
import textwrap
from pathlib import Path
from utils import fail, warn, write_atomically

import pandas
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from report.results import read
from report.tables import label, without

# colours that the colour-blind tell apart (Okabe and Ito)
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#000000"]
MEANS = ["ID", "OOD mean", "unseen mean"]
NAMES = {"lr": "learning rate", "epochs": "epochs", "shots": "training images of each class"}


def save(figure, path, otherwise=warn, **layout):
    figure.tight_layout(**layout)
    print(f"drawing {path}")
    write_atomically(path, lambda part: figure.savefig(part, dpi=110, format="png"), otherwise)


def show(axis, location):
    axis.imshow(location.open().resize((96, 96)))
    axis.set(xticks=[], yticks=[])


def draw_figure4(path, rows):
    """LDFS's figure 4: source images, and the real ones nearest to what is synthesised from them.

    rows: [(label, [(Location, whether the class is lost)])].
    """
    size, pitch, columns = 96, 110, len(rows[0][1])  # pixels, of an image and from one to the next
    # one sheet, for an axes for each image takes seconds
    sheet = Image.new("RGB", (pitch * columns, pitch * len(rows)), "white")
    for y, (_, images) in enumerate(rows):
        for x, (location, lost) in enumerate(images):
            color, width = (COLOURS[1], 4) if lost else ("lightgrey", 1)
            image = ImageOps.expand(location.open().resize((size, size)), width, color)
            free = pitch - image.width
            sheet.paste(image, (pitch * x + free // 2, pitch * y + free // 2))
    figure = Figure(figsize=(columns + 1, 1.08 * len(rows)))
    axis = figure.subplots()
    axis.imshow(sheet)
    middles = [pitch * (y + 0.5) for y in range(len(rows))]
    axis.set_yticks(middles, [name for name, _ in rows], fontsize=9)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_anchor("W")  # beside its names, whose width the layout takes from there
    title = "Nearest real image of each synthesised feature (framed: of another class)"
    figure.suptitle(title, fontsize=10)
    save(figure, path, pad=0.3, rect=(0, 0, 1, 0.985))  # the title above the images


def draw_styles(path, rows):
    """LDFS's figure 5: source images, and below them what a network made of them for each target.

    rows: {name: images (B, 3, H, W) in [0, 1]}.
    """
    from torchvision.utils import make_grid  # here, for it takes seconds

    figure = Figure(figsize=(11, 1.05 * len(rows)))
    for axis, (name, images) in zip(figure.subplots(len(rows), 1), rows.items()):
        grid = make_grid(images, nrow=len(images), pad_value=1)
        axis.imshow(grid.permute(1, 2, 0).numpy())
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.spines[:].set_visible(False)
    save(figure, path, pad=0.3)


def draw_figure5(path, columns):
    """ARF's figure 5: images with captions and, below each, the retrieved pair nearest to it.

    columns: [(Location, caption, (score, Location, text) or None)].
    """
    figure = Figure(figsize=(1.5 * len(columns), 4.7))
    axes = figure.subplots(2, len(columns), squeeze=False)
    for (above, below), (location, caption, pair) in zip(axes.T, columns):
        show(above, location)
        above.set_xlabel(textwrap.fill(caption, 18, max_lines=5), fontsize=7)
        below.set(xticks=[], yticks=[], box_aspect=1)
        if pair:
            show(below, pair[1])
            below.set_xlabel(textwrap.fill(pair[2], 18, max_lines=5), fontsize=7)
            below.set_title(f"cosine {pair[0]:.2f}", fontsize=7, pad=2)
    axes[0][0].set_ylabel("image, its caption")
    axes[1][0].set_ylabel("nearest pair, its text")
    save(figure, path, pad=0.4)


def means_of(rows, setting="lr"):
    """A line for each (method, α, value of the setting), a column for each of MEANS, over seeds."""
    points = []
    for row in rows:
        if (row["measure"], row["split"]) == ("accuracy", "test"):
            domain, settings = row["domain"], row["settings"]
            settings = {**settings, **settings["schedules"]["towers"]}  # lr, epochs
            mean = "ID" if domain == settings["source"] else domain
            at = settings.get(setting) or math.inf  # no limit
            points.append((label({**row, "alpha": 1}), row["alpha"], at, mean, row["value"]))
    if not points:
        fail("no accuracies are there yet: run evaluate.py first.")
    frame = pandas.DataFrame(points, columns=["method", "alpha", setting, "mean", "value"])
    frame = frame[frame["mean"].isin(MEANS)].dropna()
    return frame.pivot_table("value", ["method", "alpha", setting], "mean", sort=False)


def draw_curve(rows, path):
    """ARF's figure 4: ID against OOD mean, and against unseen mean, of every method along α.

    Of several ways of training it is the one in which weights in between were measured last.
    """
    between = [row for row in rows if row["measure"] == "accuracy" and row["alpha"] != 1]
    if not between:
        return print("no curve: no weights in between were measured (--alphas 0.2 0.5 0.8)")
    block = max(between, key=lambda row: row["line"])["block"]
    rows = [row for row in rows if row["block"] == block]
    points, seeds = means_of(rows).droplevel("lr"), len({row["seed"] for row in rows})
    start, others = points.loc["zero-shot"].iloc[0], [mean for mean in MEANS[1:] if mean in points]
    if not others:
        return print("no curve: there is no other domain, nor a set of other classes")
    figure = Figure(figsize=(5.2 * len(others), 4.4))
    for axis, other in zip(figure.subplots(1, len(others), squeeze=False)[0], others):
        for method, color in zip(points.index.unique("method").drop("zero-shot"), 2 * COLOURS):
            line = pandas.concat([start.to_frame(0).T, points.loc[method]]).sort_index()  # α: 0 … 1
            line = line.dropna(subset=[other, "ID"])
            axis.plot(line[other], line["ID"], ".-", color=color, markersize=4, label=method)
            for alpha, marker in ((0.5, "D"), (1, "o")):
                there = line[line.index == alpha]
                axis.plot(there[other], there["ID"], marker, color=color, markersize=7)
        axis.plot(start[other], start["ID"], "k*", markersize=14, label="zero-shot (α = 0)")
        axis.set(xlabel=f"{other}, accuracy in per cent", ylabel="ID, accuracy in per cent")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    marks = f"diamond: α = 0.5, dot: α = 1; mean of {seeds} seed{'s'[:seeds - 1]}"
    figure.suptitle(f"From zero-shot to finetuned weights\n({marks})", fontsize=10)
    save(figure, path)


def draw_against(setting, rows, path):
    """ID, OOD mean and unseen mean of each method against one of NAMES (of the towers).

    rows: of several runs, which differ in it. Dashed: α = 0.5. Grey: zero-shot.
    """
    points = means_of(rows, setting)
    means = [mean for mean in MEANS if mean in points]
    values = sorted(points.index.unique(setting))
    figure = Figure(figsize=(4 * len(means), 3.8))
    for axis, mean in zip(figure.subplots(1, len(means), squeeze=False)[0], means):
        axis.axhline(points.loc["zero-shot", mean].mean(), color="grey", label="zero-shot")
        methods = points.index.unique("method").drop("zero-shot")
        for method, color in zip(methods, 2 * COLOURS):
            for alpha, line, name in ((1, "o-", method), (0.5, "o--", f"{method} α=0.5")):
                if (method, alpha) in points.index.droplevel(setting):
                    found = points.loc[(method, alpha), mean].sort_index()
                    places = [values.index(value) for value in found.index]
                    axis.plot(places, found, line, color=color, label=name)
        axis.set_xticks(range(len(values)), ["all" if v == math.inf else f"{v:g}" for v in values])
        axis.set(xlabel=NAMES[setting], ylabel=f"{mean}, accuracy in per cent")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    save(figure, path, fail)


def draw_strategies(rows, path):
    """Strategies in the plane of ID and OOD mean, and arrows to where synthesised features bring
    them.
    """
    if len({row["block"] for row in rows if row["measure"] == "accuracy"}) > 1:
        fail("strategies are drawn of runs with the same flags: name one of them.")
    points = means_of(rows).droplevel("lr").xs(1, level="alpha")
    if not {"ID", "OOD mean"} <= {*points.columns}:
        fail("there is no other domain to draw.")
    figure = Figure(figsize=(7, 5.5))
    axis = figure.subplots()
    start = points.loc["zero-shot"]
    axis.plot(start["ID"], start["OOD mean"], "k*", markersize=14, label="zero-shot")
    colours, lines = {}, {}
    for method in points.index:
        strategy = without(method)
        if strategy not in points.index:
            continue
        color = colours.setdefault(strategy, COLOURS[len(colours) % len(COLOURS)])
        recipe = method.removeprefix(f"{strategy}+")
        style = lines.setdefault(recipe, ["-", "--", ":"][len(lines) % 3])
        ends = [(points.loc[m, "ID"], points.loc[m, "OOD mean"]) for m in (strategy, method)]
        axis.plot(*ends[0], "o", color=color)
        arrow = {"arrowstyle": "->", "color": color, "linestyle": style, "linewidth": 1.6}
        axis.annotate("", ends[1], ends[0], arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
        axis.plot(*ends[1], ".", color=color, markersize=3)
    for strategy, color in colours.items():
        axis.plot([], [], "o", color=color, label=strategy)
    for recipe, style in lines.items():
        axis.plot([], [], color="grey", linestyle=style, label=f"with {recipe}'s features")
    axis.set(xlabel="ID, accuracy in per cent", ylabel="OOD mean, accuracy in per cent")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path, fail)


if __name__ == "__main__":
    what, *places = sys.argv[1:] or [""]
    if what not in [*NAMES, "strategies"] or len(places) < 2:
        fail("say what, where to, of which runs: python -m report.figures lr a.png runs/…")
    rows, path = [row for run in places[1:] for row in read(run)], Path(places[0])
    if what == "strategies":
        draw_strategies(rows, path)
    else:
        draw_against(what, rows, path)
