"""An optimizer rule of one's own: stochastic gradient descent with Nesterov's momentum (Sutskever et al. 2013).

mpirun -n 4 hiermpi train --data data.h5 --run runs/sgd --optimizer.rule examples.own_optimizer:RULE \
        --optimizer.options '{momentum = 0.95}' --optimizer.learning_rate 0.3 --optimizer.min_learning_rate 0.03
"""

import numpy as np


class Momentum:
    """Keeps one vector, the momentum, where AdamW keeps two."""

    state = ("momentum",)

    def update(self, new, old, gradients, hyper):
        friction = np.float32(hyper.options.get("momentum", 0.9))
        gradient = gradients * np.float32(hyper.scale)
        velocity = friction * old.state["momentum"] + gradient
        new.state["momentum"][:] = velocity
        decayed = old.parameters * np.float32(1.0 - hyper.learning_rate * hyper.weight_decay)
        new.parameters[:] = decayed - np.float32(hyper.learning_rate) * (gradient + friction * velocity)


RULE = Momentum()
