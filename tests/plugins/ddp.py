"""The module of ``examples/own_torch_model.py`` under PyTorch's DistributedDataParallel over gloo, on the same batches.

    python ddp.py data.h5 losses.json STEPS RANKS RANK PORT SETTINGS

Rank 0 writes the losses of the steps and the seconds of each. The optimizer is plain gradient descent at one rate, so
that nothing but the gradients decides.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))
from examples.own_torch_model import FAMILY, build
from hiermpi import Config
from hiermpi.data.sequences import Sampler
from hiermpi.model.contract import make_model, specs_of
from hiermpi.model.parameters import ParameterBuffer, SymmetryTable, symmetry_groups
from hiermpi.storage.dataset import open_dataset


def main(data, out, steps, ranks, rank, port, settings):
    """Train and write the losses."""
    config, dataset = Config.of(settings), open_dataset(Path(data))
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    module = build(config.model)
    load_start(module, config)
    parallel = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=config.optimizer.learning_rate)
    sampler = Sampler(dataset.length("train"), config.model.context_length, config.train.seed)
    losses, seconds, size = [], [], config.train.batch_size
    for step in range(steps):
        begun = time.perf_counter()
        draw = sampler.draw(step * size, size)
        rows = dataset.read("train", draw.starts, config.model.context_length + 1)
        mine = torch.from_numpy(np.ascontiguousarray(rows[rank * size // ranks : (rank + 1) * size // ranks])).long()
        optimizer.zero_grad()
        logits = parallel(mine[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / ranks)
        seconds.append(time.perf_counter() - begun)
    if rank == 0:
        Path(out).write_text(json.dumps({"losses": losses, "seconds": seconds}))
    torch.distributed.destroy_process_group()


def load_start(module, config):
    """Give the module the values with which hiermpi begins."""
    shape = config.model
    table = SymmetryTable(symmetry_groups(None, shape.vocab_size, shape.symmetry_order), shape.symmetry_order)
    parameters = ParameterBuffer(specs_of(FAMILY, shape), symmetry=table)
    model = make_model(FAMILY, config.model, parameters, 1)
    FAMILY.initialize(model, config.train.seed)
    tensors = parameters.tensors_in_token_order(parameters.vector)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(tensors[name])))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7]), json.loads(sys.argv[7]))
