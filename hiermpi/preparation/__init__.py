"""Text to dataset: what ``hiermpi prepare`` does, alone or on ranks."""
