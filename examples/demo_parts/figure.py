"""The picture: eight panels, in colours that colour-blind readers can tell apart (Okabe-Ito)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from demo_parts.config import CUTS
from demo_parts.model import LOSSES

Numbers = dict[str, Any]

COLOURS = {
    "torch": "#D55E00",
    "torch mean of means": "#D55E00",
    "torch sum / items": "#E69F00",
    "mbkern": "#0072B2",
    "mbkern in place": "#56B4E9",
}
HATCHES = {"torch sum / items": "//", "mbkern in place": ".."}
MARKERS = {"torch": "s", "mbkern": "o"}


def draw(numbers: Numbers, file: Path) -> None:
    """Write the PNG."""
    env, config = numbers["environment"], numbers["config"]
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold"})
    figure, axes = plt.subplots(2, 4, figsize=(20, 9.6), layout="constrained")
    panels = (
        (_curves, _step_time, _memory, _function_throughput),
        (_elements, _loss_bits, _model_error, _gradient_throughput),
    )
    for row, functions in zip(axes, panels, strict=True):
        for axis, panel in zip(row, functions, strict=True):
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_axisbelow(True)
            panel(axis, numbers)
    figure.suptitle(
        f"mbkern {env['mbkern']} ({env['mbkern_isa']}) beside torch {env['torch']}: "
        f"a language model of {config['layers']} layers, width {config['width']}, "
        f"{numbers['text']['vocabulary']:,} tokens, on the source of Python's library\n"
        f"{env['cpu']}, {_count(env['threads'], 'thread')}; {config['batch']} sequences of "
        f"{config['context']} tokens a step; bars and lines are medians, whiskers quartiles"
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _curves(axis: Axes, numbers: Numbers) -> None:
    training = numbers["training"]
    styles: dict[str, dict[str, Any]] = {
        "torch": {"linewidth": 7, "alpha": 0.45},
        "mbkern": {"linewidth": 3},
        "mbkern in place": {"linewidth": 1.5, "linestyle": (0, (2, 2))},
    }
    for name in LOSSES:
        curve = training[name]["curve"]
        steps = range(1, len(curve) + 1)
        axis.plot(steps, curve, label=name, color=COLOURS[name], **styles[name])
    worst = max(training[name]["largest_relative_difference_to_torch"] for name in LOSSES)
    axis.set(xlabel="optimisation step", ylabel="training loss (nats a token)")
    axis.set_title(f"Training loss: within {worst:.0e} of torch's")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)


def _step_time(axis: Axes, numbers: Numbers) -> None:
    training = numbers["training"]
    for place, name in enumerate(LOSSES):
        loss, step = (training[name][key] for key in ("loss_seconds", "step_seconds"))
        in_loss, in_step = 1e3 * loss["median"], 1e3 * step["median"]
        colour = COLOURS[name]
        axis.bar(place, in_loss, 0.5, color=colour, hatch=HATCHES.get(name))
        axis.bar(place, in_step - in_loss, 0.5, in_loss, color="#dddddd", edgecolor=colour)
        _whisker(axis, place - 0.1, loss, 1e3)
        _whisker(axis, place + 0.1, step, 1e3)
        for height, label, va in ((in_loss, "loss", "bottom"), (in_step, "step", "top")):
            text = f" {label}\n {height:.0f} ms"
            axis.text(place + 0.25, height, text, ha="left", va=va, fontsize=9)
    axis.set_xticks(range(len(LOSSES)), list(LOSSES))
    axis.set_xlim(-0.4, len(LOSSES) - 0.35)
    axis.set_ylabel("time of a step (ms)")
    cut = numbers["config"]["training_cut"]
    axis.set_title(f"Time of a step ({cut}): loss in colour, all else grey")


def _memory(axis: Axes, numbers: Numbers) -> None:
    memory, cuts = numbers["peak_memory_mib"], numbers["config"]["memory_cuts"]
    for place, name in enumerate(LOSSES):
        positions = [i + 0.27 * (place - 1) for i in range(len(cuts))]
        heights = [memory[name][cut] for cut in cuts]
        bars = axis.bar(
            positions, heights, 0.25, label=name, color=COLOURS[name], hatch=HATCHES.get(name)
        )
        axis.bar_label(bars, fmt="%.0f", fontsize=9)
    axis.set_xticks(range(len(cuts)), [_cut_name(cut) for cut in cuts])
    axis.set(xlabel="micro-batches x sequences", ylabel="memory above that before the step (MiB)")
    axis.set_title("Memory at the peak of a step")
    axis.legend(frameon=False)


def _grouped(axis: Axes, values: dict[str, list[float]], floor: float) -> None:
    """Bars by cut and method on a logarithmic axis; a zero is drawn at its foot, and written."""
    for place, (method, heights) in enumerate(values.items()):
        positions = [i + 0.27 * (place - 1) for i in range(len(CUTS))]
        shown = [max(height, floor) for height in heights]
        colour, hatch = COLOURS[method], HATCHES.get(method)
        axis.bar(positions, shown, 0.25, label=method, color=colour, hatch=hatch)
        for x, height in zip(positions, heights, strict=True):
            if height == 0:
                axis.text(x, floor * 1.15, "0", ha="center", va="bottom", color=colour)
    axis.set_xticks(range(len(CUTS)), [_cut_name(cut) for cut in CUTS])
    axis.set_xlabel("micro-batches x sequences")
    axis.legend(frameon=False, fontsize=9, loc="upper left")


def _cut_name(cut: str) -> str:
    return f"ragged\n({', '.join(map(str, CUTS[cut]))})" if cut == "ragged" else cut


def _model_error(axis: Axes, numbers: Numbers) -> None:
    errors = numbers["model_gradient_error"]
    values = {method: list(by_cut.values()) for method, by_cut in errors.items()}
    smallest = min(min(v) for v in values.values())
    _grouped(axis, values, smallest / 10)
    axis.set_yscale("log")
    axis.set_ylim(smallest / 10, 100 * max(max(v) for v in values.values()))
    axis.set_ylabel("relative error against the fp64 gradient")
    axis.set_title("Whole model: error of its gradient")


def _elements(axis: Axes, numbers: Numbers) -> None:
    same = numbers["same_logits"]
    total = same["gradient_elements"]
    values = {
        method: [by_cut[cut]["gradient_elements_different"] / total for cut in CUTS]
        for method, by_cut in same["methods"].items()
    }
    _grouped(axis, values, 0.0)
    axis.set_ylim(0, 1.35)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylabel("share whose bits differ from those of 1x50")
    axis.set_title(f"Same logits: {total / 1e6:.1f} million gradient values")


def _loss_bits(axis: Axes, numbers: Numbers) -> None:
    methods = numbers["same_logits"]["methods"]
    values = {
        method: [float(by_cut[cut]["loss_bits_different"]) for cut in CUTS]
        for method, by_cut in methods.items()
    }
    _grouped(axis, values, 0.0)
    axis.set_ylim(0, 1.35 * max(1.0, *(max(v) for v in values.values())))
    axis.set_ylabel("bits, of 32, that differ from those of 1x50")
    axis.set_title("Same logits: the loss of the 50 sequences")


def _function_throughput(axis: Axes, numbers: Numbers) -> None:
    _throughput(axis, numbers, "function", "Function: forward of the loss alone")


def _gradient_throughput(axis: Axes, numbers: Numbers) -> None:
    _throughput(axis, numbers, "gradient", "Gradient: forward + backward of the model")


def _throughput(axis: Axes, numbers: Numbers, kind: str, title: str) -> None:
    curves = numbers["throughput"][kind]
    for library, curve in curves.items():
        points = _points(curve)
        middle = [p["median"] for p in points.values()]
        low = [p["median"] - p["q1"] for p in points.values()]
        high = [p["q3"] - p["median"] for p in points.values()]
        colour, sizes = COLOURS[library], list(points)
        axis.errorbar(
            sizes, middle, (low, high), color=colour, marker=MARKERS[library], capsize=3,
            label=f"{library}: knee at {curve['knee']}",
        )  # fmt: skip
        knee = curve["knee"]
        axis.plot(knee, points[knee]["median"], "o", ms=17, mfc="none", mec=colour, mew=2)
        axis.vlines(knee, 0, points[knee]["median"], color=colour, linestyle=":", linewidth=1.5)
    share = numbers["config"]["knee"]
    axis.set_xscale("log", base=2)
    ticks = [size for size in sizes if size not in (4, 10, 50)] if len(sizes) > 6 else sizes
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(0, 1.4 * max(p["q3"] for c in curves.values() for p in _points(c).values()))
    axis.set(xlabel="micro-batch size (sequences)", ylabel="sequences a second", title=title)
    title = f"ring: the smallest size with {share:.0%} of the best"
    axis.legend(frameon=False, loc="upper left", title=title, alignment="left")
    axis.grid(alpha=0.3)


def _points(curve: Numbers) -> dict[int, dict[str, float]]:
    points: dict[int, dict[str, float]] = curve["sequences_per_second"]
    return points


def _whisker(axis: Axes, x: float, times: dict[str, float], unit: float) -> None:
    middle, low, high = (unit * times[key] for key in ("median", "q1", "q3"))
    axis.errorbar(x, middle, [[middle - low], [high - middle]], color="black", capsize=4)
