"""The printed summary: Markdown tables, to be quoted as they are."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from demo_parts.config import CUTS
from demo_parts.cuts import METHODS
from demo_parts.model import LOSSES

Numbers = dict[str, Any]


def show(numbers: Numbers, console: Console) -> None:
    """Print what was measured, and nothing else."""
    env, config = numbers["environment"], numbers["config"]
    console.print(
        f"\nmbkern {env['mbkern']} ({env['mbkern_isa']}), torch {env['torch']}, "
        f"{env['cpu']}, threads: {env['threads']}, "
        f"load before the run: {env['load_average_before']:.1f}\n"
        f"Model: {config['layers']} layers of width {config['width']}, "
        f"{numbers['text']['vocabulary']} tokens, context {config['context']}; "
        f"{config['batch']} sequences a step. Times: median [quartiles].\n",
        markup=False,
    )
    tables = (
        _digits(numbers), _training(numbers), _cuts(numbers), _throughput(numbers),
    )  # fmt: skip
    for table in tables:
        console.print(table)
        console.print()


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _digits(numbers: Numbers) -> Table:
    digits = numbers["digits"]
    table = _table("digits", "torch", "mbkern")
    accuracy = digits["test_accuracy"]
    table.add_row(
        f"correct, of {digits['test_images']} test images",
        *(f"{100 * accuracy[name]:.1f} %" for name in ("torch", "mbkern")),
    )
    for label, key in (("gradient", "gradient_bits_different"), ("loss", "loss_bits_different")):
        methods = digits["same_logits"]["methods"]
        counts = [
            sum(methods[m][cut][key] for cut in CUTS) for m in ("torch mean of means", "mbkern")
        ]
        table.add_row(f"{label} bits that differ, all cuts", *(f"{n:,}" for n in counts))
    return table


def _training(numbers: Numbers) -> Table:
    config, training, memory = numbers["config"], numbers["training"], numbers["peak_memory_mib"]
    table = _table("language model", *LOSSES)
    baseline = training["torch"]
    cut = config["training_cut"]
    for label, key in (("loss, forward + backward", "loss_seconds"), ("step", "step_seconds")):
        cells = [_milliseconds(training[name][key]) for name in LOSSES]
        table.add_row(f"{label}, ms ({cut})", *cells)
        speeds = (baseline[key]["median"] / training[name][key]["median"] for name in LOSSES)
        table.add_row("... times torch's speed", *(f"{speed:.2f}" for speed in speeds))
    for cut in config["memory_cuts"]:
        cells = [f"{memory[name][cut]:.0f}" for name in LOSSES]
        table.add_row(f"memory at its peak, MiB ({cut})", *cells)
    final = [f"{training[name]['curve'][-1]:.4f}" for name in LOSSES]
    table.add_row(f"loss at step {config['steps']}", *final)
    key = "largest_relative_difference_to_torch"
    table.add_row(
        "largest relative difference of the curve",
        *("" if name == "torch" else f"{training[name][key]:.1e}" for name in LOSSES),
    )
    return table


def _milliseconds(times: dict[str, float]) -> str:
    low, middle, high = (1e3 * times[key] for key in ("q1", "median", "q3"))
    return f"{middle:.0f} [{low:.0f}, {high:.0f}]"


def _cuts(numbers: Numbers) -> Table:
    table = _table("cuts of one batch", *CUTS)
    same = numbers["same_logits"]
    for method in METHODS:
        cells = [f"{same['methods'][method][c]['gradient_bits_different']:,}" for c in CUTS]
        table.add_row(f"same logits, gradient bits that differ: {method}", *cells)
    for method in METHODS:
        cells = [f"{same['methods'][method][c]['loss_bits_different']}" for c in CUTS]
        table.add_row(f"same logits, loss bits that differ: {method}", *cells)
    for method in METHODS:
        cells = [f"{numbers['model_gradient_error'][method][c]:.1e}" for c in CUTS]
        table.add_row(f"whole model, relative gradient error: {method}", *cells)
    batch = numbers["uneven_batch"]
    table.caption = (
        f"Uneven sequences: {batch['items']} of {batch['positions']} positions count. "
        f"ragged: {', '.join(map(str, CUTS['ragged']))} sequences.\n"
        f"Same logits: {same['gradient_elements']:,} gradient values, compared with the same "
        "method's 1x50. Whole model: compared with fp64, uncut."
    )
    table.caption_justify = "left"
    return table


def _throughput(numbers: Numbers) -> Table:
    sizes = numbers["config"]["micro_batches"]
    table = _table("sequences/s, by micro-batch", *map(str, sizes))
    labels = {"function": "loss forward", "gradient": "model forward + backward"}
    for kind, label in labels.items():
        for library, curve in numbers["throughput"][kind].items():
            points = curve["sequences_per_second"]
            marks = {curve["knee"]: "*"}
            cells = [f"{points[size]['median']:.0f}{marks.get(size, '')}" for size in sizes]
            table.add_row(f"{label}: {library}", *cells)
    share = numbers["config"]["knee"]
    table.caption = f"* the knee: the smallest micro-batch with {share:.0%} of the best median"
    table.caption_justify = "left"
    return table
