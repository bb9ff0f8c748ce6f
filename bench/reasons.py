"""Why an aim is missed, where that is known: ``goal_page`` prints it below the table of a suite."""

from __future__ import annotations

REASONS: dict[str, tuple[str, ...]] = {
    "cross-entropy": (
        "(8192, 1000), default: torch's temporaries of 31 MiB are just below the size from which "
        "glibc always maps fresh pages. Whether it reuses them depends on what lies above them in "
        "the heap, and stays so for a process: the ratio is then that of recycled memory, where "
        "the aim is 3. Between processes it is 3.9 to 4.2.",
        "torch.compile, default: its fresh pages cost from 25 to 100 % of its time; by the minima "
        "the ratio is 2.9 to 3.9. On two threads, over six processes, it was 2.4 to 4.0 (median "
        "2.8) at (512, 32000), and 2.7 to 3.7 (3.4) at (128, 128256): mbkern takes 5.5 ms in a "
        "process of its own and 7 to 8 after torch's steps, with the same faults (30 huge pages, "
        "640 small ones), as much time of its own, and 2.5 ms more of the system's.",
    ),
    "tiers": (
        "On a processor whose units are as wide as AVX-512's vectors, twice as much is computed "
        "by as many instructions: 14 an exponential with AVX2, 13 with AVX-512; both take 6 to 7 "
        "cycles. The ratio is then 2, less what both wait for memory: 1.45 to 1.75 from run to "
        "run on one machine, 1.13 to 1.54 on another. It was 1.28 to 1.38 on one with units half "
        "as wide.",
    ),
    "twin": (
        "V = 4096 with AVX-512 is at the limit: 1.04 to 1.06 from run to run (14 processes, median "
        "1.049). A row costs some 40 cycles (the copy of the group with the target, the exact sum "
        "of its blocks), and each block of 1024 columns some 24 (a reduction over its lanes, where "
        "the plain sum has one a row).",
    ),
    "integration": (
        "The kernels take the same time. The rest is what `torch.compile` adds to any operator: "
        "its own code before and after the kernel, in Python, run from caches that the kernel "
        "has emptied. Measured in the same rounds on an operator without mbkern that sums the "
        "same logits. Nothing that takes 6 ms eagerly can be within 5 % of that.",
        "Recycled: between the steps its code allocates, so that glibc gives the gradient one of "
        "seven places in turn, not one of two as in eager steps, and less of it is in a cache "
        "((512, 8000), 16 MB: 220 us more a step, of which 100 are its code).",
    ),
    "elements": (
        "In place, against a bare pass: with exponentials or logarithms the arithmetic takes "
        "longer than memory: in cache (`mbkern.loss_and_grad` with `grad_out` on 2^20 elements, "
        "one thread, the least of 200 times), ns an element in fp32: poisson_nll_loss 0.22, kl_div "
        "0.26, soft_margin_loss 0.33, binary_cross_entropy_with_logits 0.35, gaussian_nll_loss "
        "0.36, log_cosh_loss 0.42, tweedie_nll_loss 0.43, binary_cross_entropy and "
        "sigmoid_focal_loss 0.45. An exponential is 9 multiply-adds, log(1 + e) of it 12, and two "
        "start a cycle. binary_cross_entropy reads its input once more, before anything is "
        "overwritten: a number outside [0, 1] is an error.",
        "In place, in bf16: half of the bytes, the same arithmetic and conversions, and a sum that "
        "the pass does not form: in cache, likewise, 0.15 ns an element for mse_loss, 0.18 for "
        "huber_loss, 0.20 for hinge_embedding_loss. Of the 8 cycles for 16 elements of mse_loss "
        "the exact sum takes 4: range, two conversions to fp64, two additions.",
        "half_squared_error: torch's chain and this are both at the bandwidth of the memory.",
    ),
    "rows": (
        "nll_loss: both clear the gradient's memory, and write one number a row. (512, 32000): "
        "65 MB past the caches take 0.7 ms, more than a third of torch's time. Default, 2 threads: "
        "where both get fresh pages the ratio is 2.8 to 2.9; in one run torch met a free block of "
        "an earlier case (no page fault), and mbkern fresh pages (675): 0.36.",
        "dice_loss: two sums must be known before the gradient, so rows are read twice.",
        "(4096, 1000), default: blocks of 16 MB are below the size from which glibc maps fresh "
        "pages, so this is recycled memory, where the aim is 2.5.",
    ),
    "host-family": (
        "mse_loss, huber_loss, smooth_l1_loss: torch's nodes of these are compiled, forward and "
        "backward take 17.0 to 17.7 us. An autograd.Function in Python that computes nothing, with "
        "the same two allocations and saved tensors, takes 14.9 (beside them in one process, the "
        "least of nine times 2000 calls); the checks, the call and the kernel would have 2 us "
        "left, and took 5. (32, 10) cross_entropy: 3.2. Since then two plain tensors without "
        "options take a way of their own, all of it but the node in one call of the compiled "
        "module. Measured so far on another machine only (2 CPUs of an AMD EPYC without AVX-512, "
        "this suite, default, commit 75069cb): 0.89, 0.91, 0.89, where an earlier state, already "
        "a twentieth faster than that of the table, had 1.05, 1.10, 1.07 beside it.",
    ),
    "head": (
        "Split-invariant on AVX2 against fast mode, which takes AVX-512 here: with half of the "
        "lanes, at nine tenths of what AVX2's units can do (131 GFLOP/s a core), where the product "
        "on AVX-512 is at 82 %.",
    ),
    "accumulate": (
        "400 fp32 tensors, one thread: both read and write the same 101 MB, at the bandwidth of "
        "the memory (that of `x *= c`).",
        "400 small bf16 tensors: 3.4 to 4.7 in three further runs, one below 4. Of 160 us 95 are "
        "not the sum: 800 tensors are read through torch's exchange table (some 50 ns each), each "
        "is asked whether it is lazily negated (some 25 ns, for giving up the GIL and taking it "
        "again), and 400 versions are counted up.",
        "Norm and finiteness: not the arithmetic (half of the time that memory takes). Sums kept "
        "apart until a block's end change nothing. Fetching ahead by 1024 elements brings bf16 to "
        "1.02 to 1.06, but by 256 to 768 it makes it 1.07 to 1.3, and fp32 slower by any; squares "
        "in a second pass over 512 elements at a time, in the first cache: 1.05 to 1.09: not done.",
    ),
}
