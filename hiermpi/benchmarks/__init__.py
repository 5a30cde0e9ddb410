"""The benchmarks measure methods alternately within one run, and report the ratios of their medians."""
