"""The package turns text into a dataset, as ``hiermpi prepare`` does, in one process or on ranks."""
