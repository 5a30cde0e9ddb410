"""Any ``torch.nn.Module`` with a loss, trained by hiermpi: PyTorch computes, hiermpi does the rest.

The module's parameters and their gradients are views of hiermpi's flat vectors, so nothing is copied in a step. For a
module of your own, write a function like :func:`build` and put ``FAMILY = TorchFamily(build)`` into your file.

    mpirun -n 2 hiermpi train --data data.h5 --run runs/torch --model.family examples.own_torch_model:FAMILY
"""

import torch
from torch import nn

from hiermpi import TensorSpec


class Recurrent(nn.Module):
    """A gated recurrent network (Cho et al. 2014) over token embeddings."""

    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.n_embd)
        self.cell = nn.GRU(config.n_embd, config.n_embd, config.n_layer, batch_first=True)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, inputs):
        """Return the (B, T, V) logits of (B, T) inputs."""
        return self.head(self.cell(self.table(inputs))[0])


def build(config):
    """Make the module; `config` is the model section of the configuration."""
    return Recurrent(config)


class TorchModel:
    """A module whose parameters live in hiermpi's vector."""

    def __init__(self, module, config, parameters):
        self.module = module
        self.parameters = parameters
        self.symmetry_order = config.symmetry_order
        self._gradients = None
        self._slot = None

    def loss(self, batch):
        with torch.no_grad():
            loss, count = self._loss(batch)
        return float(loss), count

    def loss_and_gradients(self, batch, gradients):
        self._use_slot()
        if gradients is not self._gradients:  # hiermpi gives the same vector step after step
            views = self.parameters.views(gradients)
            for name, parameter in self.module.named_parameters():
                parameter.grad = torch.from_numpy(views[name])
            self._gradients = gradients
        loss, count = self._loss(batch)
        loss.backward()  # adds into the views
        return float(loss.detach()), count

    def logits(self, batch):
        self._use_slot()
        with torch.no_grad():
            return self.module(torch.from_numpy(batch.inputs).long()).numpy()

    def _loss(self, batch):
        self._use_slot()
        logits = self.module(torch.from_numpy(batch.inputs).long())
        targets = torch.from_numpy(batch.targets).long().reshape(-1)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1, reduction="sum")
        return loss, int((batch.targets >= 0).sum())

    def _use_slot(self):
        """Let the module's parameters be views of the slot in use; a step may have left them in another one."""
        if self._slot != self.parameters.slot:
            tensors = self.parameters.tensors
            for name, parameter in self.module.named_parameters():
                parameter.data = torch.from_numpy(tensors[name])
            self._slot = self.parameters.slot


class TorchFamily:
    """The family of the modules that ``build(config)`` makes."""

    def __init__(self, build):
        self.build = build

    def specs(self, config):
        with torch.device("meta"):  # shapes alone, no memory
            module = self.build(config)
        return [
            TensorSpec(
                name,
                tuple(parameter.shape),
                decay=parameter.dim() > 1,
                symmetry_rows=parameter.shape[0] == config.vocab_size,
            )
            for name, parameter in module.named_parameters()
        ]

    def make(self, config, parameters, sequences):
        torch.set_num_threads(1)  # ranks are the parallelism
        return TorchModel(self.build(config), config, parameters)

    def initialize(self, model, seed):
        torch.manual_seed(seed)
        for module in model.module.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        symmetry = model.parameters.symmetry
        drawn = {name: parameter.detach().numpy() for name, parameter in model.module.named_parameters()}
        for spec in model.parameters.specs:
            rows = drawn[spec.name][symmetry.token_of_row] if spec.symmetry_rows else drawn[spec.name]
            model.parameters[spec.name][...] = rows


FAMILY = TorchFamily(build)
