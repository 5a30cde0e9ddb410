"""The package describes what was made and how a run went, for ``hiermpi inspect`` and ``hiermpi report``."""
