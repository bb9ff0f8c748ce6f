"""How the benchmarks measure: timing, allocator states, machine, statistics, tables."""
