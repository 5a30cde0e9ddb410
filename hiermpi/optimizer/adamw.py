"""AdamW (Loshchilov, Hutter 2019), in one pass of a kernel over each piece."""

from math import sqrt

from hiermpi.kernels import Kernels, load_kernels
from hiermpi.optimizer.rules import Hyper, Values, Vector

EPSILON = 1e-8


class AdamW:
    """The rule.

    Args:
        kernels: What computes it; by default those of the environment at the time of the update.
    """

    state = ("m", "v")

    def __init__(self, kernels: Kernels | None = None) -> None:
        self.kernels = kernels

    def with_kernels(self, kernels: Kernels) -> "AdamW":
        """Return the same rule, computed by these kernels."""
        return AdamW(kernels)

    def update(self, new: Values, old: Values, gradients: Vector, hyper: Hyper) -> None:
        kernels = self.kernels or load_kernels()
        written = (new.parameters, new.state["m"], new.state["v"])
        kernels.adamw(
            (*written, old.parameters, gradients, old.state["m"], old.state["v"]),
            hyper.scale,
            hyper.beta1,
            hyper.beta2,
            hyper.learning_rate / (1.0 - hyper.beta1**hyper.count),
            1.0 / sqrt(1.0 - hyper.beta2**hyper.count),
            EPSILON,
            1.0 - hyper.learning_rate * hyper.weight_decay,
        )


RULE = AdamW()
