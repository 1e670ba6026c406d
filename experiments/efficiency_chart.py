"""The chart and the table of experiments/efficiency.py: a panel and a column for each way to tell cost."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mim_jax.figures.curves import COLOURS, MARKERS

UNITS = {"flops": "GFLOP, counted", "cpu": "ms, measured on this CPU"}


def unit(measure: str) -> str:
    return UNITS.get(measure, f"ms, estimate for {measure}")


def draw(comparison, costs: dict, file):
    """Writes a PNG. costs: {measure: {config: cost of an image}}; what a measure lacks is left out of its panel."""
    chart = Figure(figsize=(3.2 * len(costs), 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(chart)
    cases = [case for group in comparison.groups.values() for case in group]
    lines = list(dict.fromkeys(case.line for case in cases))
    for axes, (measure, found) in zip(chart.subplots(1, len(costs), squeeze=False)[0], costs.items()):
        for i, line in enumerate(lines):
            points = [(case.place, found[case.config]) for case in cases if case.line == line and case.config in found]
            if not points:
                continue
            if comparison.axis:
                points = sorted((int(place), value) for place, value in points)
                if len(points) == 1:  # what has no place on this axis
                    axes.axhline(points[0][1], color=COLOURS[i], linestyle="--", linewidth=1, label=line)
                    continue
                axes.plot(*zip(*points), color=COLOURS[i], marker=MARKERS[i], markersize=4, label=line)
            else:
                axes.barh([f"{place}, {line}" for place, _ in points], [value for _, value in points], color=COLOURS[i])
        if comparison.axis:
            axes.set_xlabel(comparison.axis, fontsize=8)
            axes.set_xticks(sorted({int(case.place) for case in cases}))
            axes.set_ylim(bottom=0)
        else:
            axes.invert_yaxis()
        axes.set_title(unit(measure), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    chart.suptitle(comparison.title, fontsize=9)
    if comparison.axis and len(lines) > 1:
        handles, labels = chart.axes[0].get_legend_handles_labels()
        chart.legend(handles, labels, loc="outside lower center", ncols=len(lines), fontsize=8, frameon=False)
    chart.savefig(file, format="png")


def rows(comparison, costs: dict) -> tuple[list[str], list[list[str]]]:
    """-> head and rows: every case's cost, and how many times that of its group's first, beside the paper's number."""
    head = ["config", *(f"{unit(measure)} (ratio)" for measure in costs), "the paper's ratio"]
    found = []
    for cases in comparison.groups.values():
        for case in cases:
            cells = [cell(values.get(case.config), values.get(cases[0].config)) for values in costs.values()]
            name = case.config.removeprefix("configs/")
            found.append([f"`{name}`", *cells, f"{case.paper:.2g}" if case.paper else "–"])
    return head, found


def cell(value: float | None, first: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g} ({value / first:.2f})"
