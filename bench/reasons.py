"""Why an aim is missed, where that is known: ``goal_page`` prints it below the table of a suite."""

from __future__ import annotations

REASONS: dict[str, tuple[str, ...]] = {
    "cross-entropy": (
        "(8192, 1000), default: torch's temporaries of 31 MiB are just below the size from which "
        "glibc always maps fresh pages. Whether it reuses them depends on what lies above them in "
        "the heap, and stays so for a process: torch then takes 12 ms instead of 30, and the ratio "
        "is that of recycled memory, 3.3 to 3.7, instead of 8.",
    ),
    "twin": (
        "V = 4096 is at the limit: 1.04 to 1.05 from run to run. A row has costs of its own (the "
        "queue of its loss, the block with the target), and each block of 1024 columns a "
        "reduction over its lanes, where the plain sum has one a row.",
    ),
    "integration": (
        "The kernels take the same time. The rest is what `torch.compile` adds to any operator: "
        "its own code before and after the kernel, in Python, run from caches that the kernel "
        "has emptied. Measured in the same rounds on an operator without mbkern that sums the "
        "same logits: three quarters of a millisecond. Nothing that takes 6 ms eagerly can be "
        "within 5 % of that.",
    ),
    "elements": (
        "In place, with exponentials: one pass over memory takes 0.29 ns an element (fp32, one "
        "thread), and the arithmetic alone, in cache, 0.7 ns (poisson_nll_loss, kl_div), 1.1 ns "
        "(binary_cross_entropy, with logits or without, soft_margin_loss, tweedie_nll_loss, "
        "log_cosh_loss), 1.5 ns (sigmoid_focal_loss). This processor starts two 512-bit "
        "operations a cycle, so that the 80 or so of binary_cross_entropy_with_logits for 16 "
        "elements take 40 cycles, 0.7 ns an element, however they are arranged.",
        "In place, in bf16: half of the bytes, the same arithmetic and two conversions: in cache "
        "0.37 ns an element for mse_loss; the pass takes 0.2 ns, and forms no sum.",
    ),
    "rows": (
        "nll_loss: both clear the gradient's memory, and write one number a row.",
        "(4096, 1000), default: blocks of 16 MB are below the size from which glibc maps fresh "
        "pages, so this is recycled memory, where the aim is 2.5.",
    ),
    "accumulate": (
        "400 fp32 tensors, one thread: both read and write the same bytes, at the bandwidth of "
        "the memory.",
        "400 small bf16 tensors: two thirds of our time is reading what torch knows of 800 "
        "tensors.",
    ),
}
