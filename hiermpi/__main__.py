"""``python -m hiermpi`` is ``hiermpi``."""

from hiermpi.cli import console

console()
