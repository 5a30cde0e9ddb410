"""The package converts models to and from other programs, as ``hiermpi export`` and ``hiermpi import`` do."""
