"""How many slots parameters and moments have."""

from hiermpi.config.schema import Config


def slots_of(config: Config) -> int:
    """Two where the death of a rank must not leave half-updated ones, as the others go on without it; else one."""
    return 2 if config.run.on_failure == "shrink" else 1
