"""A language model of one's own, in numpy: the next token from the last two, through one hidden layer.

It is the smallest form of the model of Bengio et al., A neural probabilistic language model (2003). It has tensors of
its own, no attention and no heads; the width of its hidden layer is an option:

    mpirun -n 4 hiermpi train --data data.h5 --run runs/mlp --model.family examples.own_model:FAMILY \
        --model.options '{hidden = 96}'
"""

import numpy as np

from hiermpi import TensorSpec


class TwoTokenModel:
    """Predicts a token from the two before it."""

    def __init__(self, config, parameters):
        self.parameters = parameters
        self.symmetry_order = config.symmetry_order

    def loss(self, batch):
        return self._pass(batch, None)

    def loss_and_gradients(self, batch, gradients):
        return self._pass(batch, self.parameters.views(gradients))

    def logits(self, batch):
        _, hidden = self._hidden(batch)
        return (hidden @ self.parameters["output"].T).reshape(*batch.inputs.shape, -1)

    def _hidden(self, batch):
        """Return the (N, 2C) features of all positions, and the (N, H) hidden layer."""
        table = self.parameters["table"]
        before = np.concatenate([batch.inputs[:, :1], batch.inputs[:, :-1]], axis=1)
        features = np.concatenate([table[batch.inputs], table[before]], axis=2).reshape(batch.inputs.size, -1)
        return features, np.tanh(features @ self.parameters["hidden"] + self.parameters["bias"])

    def _pass(self, batch, gradients):
        features, hidden = self._hidden(batch)
        output = self.parameters["output"]
        scores = hidden @ output.T
        scores -= scores.max(axis=1, keepdims=True)
        targets = batch.targets.reshape(-1)
        known = np.flatnonzero(targets >= 0)
        normalizer = np.exp(scores).sum(axis=1)
        loss = (np.log(normalizer[known], dtype=np.float64) - scores[known, targets[known]]).sum()
        if gradients is not None:
            errors = np.exp(scores) / normalizer[:, None]
            errors[known, targets[known]] -= 1.0
            errors[targets < 0] = 0.0
            inner = (errors @ output) * (1.0 - hidden * hidden)
            gradients["output"] += errors.T @ hidden
            gradients["hidden"] += features.T @ inner
            gradients["bias"] += inner.sum(axis=0)
            outer = (inner @ self.parameters["hidden"].T).reshape(*batch.inputs.shape, 2, -1)
            np.add.at(gradients["table"], batch.inputs, outer[:, :, 0])
            before = np.concatenate([batch.inputs[:, :1], batch.inputs[:, :-1]], axis=1)
            np.add.at(gradients["table"], before, outer[:, :, 1])
        return float(loss), len(known)


class TwoTokenFamily:
    """The family: which tensors there are, how a model is made of them, and how they begin."""

    def specs(self, config):
        width, hidden = config.n_embd, config.options.get("hidden", 64)
        return [
            TensorSpec("table", (config.vocab_size, width), decay=True, symmetry_rows=True),
            TensorSpec("hidden", (2 * width, hidden), decay=True),
            TensorSpec("output", (config.vocab_size, hidden), decay=True, symmetry_rows=True),
            TensorSpec("bias", (hidden,)),
        ]

    def make(self, config, parameters, sequences):
        return TwoTokenModel(config, parameters)

    def initialize(self, model, seed):
        generator = np.random.default_rng(seed)
        for spec in model.parameters.specs:
            drawn = generator.standard_normal(spec.shape, np.float32) * np.float32(0.05)
            if spec.symmetry_rows:  # drawn in the order of the tokens, so that no symmetry table changes the start
                drawn = drawn[model.parameters.symmetry.token_of_row]
            model.parameters[spec.name][...] = drawn if len(spec.shape) > 1 else 0.0


FAMILY = TwoTokenFamily()
