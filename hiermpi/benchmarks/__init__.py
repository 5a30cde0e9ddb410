"""The benchmarks measure methods in turns within one run, and report the ratios of their medians."""
