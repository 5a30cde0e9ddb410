"""``python -m hiermpi`` runs the ``hiermpi`` command."""

from hiermpi.cli import console

console()
