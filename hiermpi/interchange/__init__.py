"""Models to and from other programs: what ``hiermpi export`` and ``hiermpi import`` do."""
