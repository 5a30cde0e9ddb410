"""What was made and how it went, told: ``hiermpi inspect`` and ``hiermpi report``."""
