"""Side-by-side measurements: methods take turns within one run, and ratios of medians are what counts."""
