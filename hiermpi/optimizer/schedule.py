"""The learning rate as a function of the step alone, so that a resume needs no scheduler state."""

from math import cos, pi


def warmup_cosine(
    step: int, *, learning_rate: float, min_learning_rate: float, warmup_steps: int, decay_steps: int
) -> float:
    """Linear warm-up, then a half cosine down to the minimum (Loshchilov, Hutter 2017; nanoGPT's form).

    Args:
        step: steps finished before; step 0 already has a rate above zero.
        learning_rate: peak.
        min_learning_rate: from ``decay_steps`` on.
        warmup_steps: steps of warm-up.
        decay_steps: step at which the decay ends, warm-up included.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    if step >= decay_steps:
        return min_learning_rate
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    return min_learning_rate + 0.5 * (1.0 + cos(pi * progress)) * (learning_rate - min_learning_rate)
