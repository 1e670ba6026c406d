"""The chart of attention NMI per layer, drawn with matplotlib."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, told apart by the colour-blind too; markers besides, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS, GRAY = "osD^vPX", "#666666"


def draw_curves(curves, file):
    """Writes layer against NMI as PNG: runs as solid lines, random encoders dashed.

    Of a curve: label, layers {name: NMI}, random, checkpoint, examples, split.
    """
    figure = Figure(figsize=(6, 3.4 + 0.2 * len(curves)), dpi=150, layout="constrained")  # the legend lies below
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    style, alone = {}, sum(curve["random"] for curve in curves) == 1
    for i, curve in enumerate(curves):
        values = [*curve["layers"].values()]
        if curve["random"]:
            colour = GRAY if alone else style[curve["checkpoint"]]
            axes.plot(values, "--", color=colour, linewidth=1.2, label=curve["label"])
        else:
            colour = style[curve["checkpoint"]] = COLOURS[i % len(COLOURS)]
            axes.plot(values, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=4, label=curve["label"])
    shown = {(curve["examples"], curve["split"]) for curve in curves}
    where = "".join(f", {n} images of '{split}'" for n, split in shown) if len(shown) == 1 else ""
    axes.set_title(f"Attention of each layer, mean over heads{where}", fontsize=9)
    axes.set_xlabel("layer")
    axes.set_ylabel("normalised mutual information\nof query and key")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    figure.savefig(file, format="png")
