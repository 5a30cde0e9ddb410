"""This module implements GPT-2: pre-norm blocks, learned positions, GELU(tanh), tied or untied output.

The architecture is that of Radford et al. 2019. Forward and backward pass are written out. Batch and time are folded
into one product per layer; everything between the products is a kernel of :mod:`hiermpi.kernels`, and all of it works
in buffers of :mod:`hiermpi.model.workspace`. The forward pass is written once: training and decoding differ in the
attention alone.

Comments use these sizes: B sequences, T tokens of each, N = B T rows, C channels, H heads of D channels, V rows of the
table.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hiermpi.config.schema import ModelConfig
from hiermpi.kernels import Kernels, load_kernels
from hiermpi.kernels.layers import NO_KEYS, ReferenceKernels, sequence_keys, threshold_of
from hiermpi.kernels.memory import lazy_zeros
from hiermpi.model.contract import Batch, micro_batch_sequences
from hiermpi.model.parameters import ParameterBuffer, SymmetryTable, TensorSpec, symmetry_groups
from hiermpi.model.workspace import Workspace, activation_bytes

EMBEDDING_SITE = 0


def gpt2_specs(config: ModelConfig) -> list[TensorSpec]:
    """Return the specs of the tensors in the vector's order: the decayed matrices, then the rest. Raises ValueError."""
    width = config.n_embd
    if width % config.n_head:
        below = width - width % config.n_head
        choices = f"{below} or {below + config.n_head}" if below else f"{config.n_head}"
        raise ValueError(f"model.n_embd = {width} is not a multiple of model.n_head = {config.n_head}: use {choices}")
    table = (config.vocab_size, width)
    matrices = [
        TensorSpec("wte.weight", table, decay=True, symmetry_rows=True),
        TensorSpec("wpe.weight", (config.context_length, width), decay=True),
    ]
    vectors = []
    for layer in range(config.n_layer):
        for name, n_in, n_out in _linear_layers(width):
            matrices.append(TensorSpec(f"h.{layer}.{name}.weight", (n_in, n_out), decay=True))
            vectors.append(TensorSpec(f"h.{layer}.{name}.bias", (n_out,)))
        for name in ("ln_1", "ln_2"):
            vectors += [TensorSpec(f"h.{layer}.{name}.{part}", (width,)) for part in ("weight", "bias")]
    vectors += [TensorSpec(f"ln_f.{part}", (width,)) for part in ("weight", "bias")]
    if not config.tie_embeddings:
        matrices.append(TensorSpec("lm_head.weight", table, decay=True, symmetry_rows=True))
    return matrices + vectors


def _linear_layers(width: int) -> list[tuple[str, int, int]]:
    return [
        ("attn.c_attn", width, 3 * width),
        ("attn.c_proj", width, width),
        ("mlp.c_fc", width, 4 * width),
        ("mlp.c_proj", 4 * width, width),
    ]


def flops_per_token(config: ModelConfig) -> float:
    """Return the floating-point operations of both passes per token: 6 N + 12 L C T (Chowdhery et al. 2022).

    Here N is the number of weights in products, and L the number of layers.
    """
    matrices = sum(spec.size for spec in gpt2_specs(config) if spec.decay and spec.name != "wpe.weight")
    if not config.tie_embeddings:
        matrices -= config.vocab_size * config.n_embd
    return 6.0 * matrices + 12.0 * config.n_layer * config.n_embd * config.context_length


class GPT2:
    """A GPT-2 that satisfies :class:`hiermpi.model.contract.Model` and all of its optional parts.

    Args:
        config: The settings, with the vocabulary size resolved.
        parameters: The buffer of the parameters; a float64 one, for gradient checks, uses the kernels in numpy.
        sequences: The most sequences that are computed at once.
        kernels: The kernels that compute; by default those of the environment.
    """

    def __init__(
        self, config: ModelConfig, parameters: ParameterBuffer, sequences: int, kernels: Kernels | None = None
    ) -> None:
        self.config = config
        self.symmetry_order = config.symmetry_order
        self.parameters = parameters
        products = self.parameters.runs(self._is_product)
        self._sums = [(start, stop) for start, stop, is_product in products if not is_product]
        """The ranges of the vector with gradients that are only ever added to."""
        self._viewed: tuple[NDArray | None, dict[str, NDArray]] = (None, {})
        self.micro_batch = sequences
        self.kernels = (kernels or load_kernels()) if self.parameters.dtype == np.float32 else ReferenceKernels()
        self.threshold = threshold_of(config.dropout)
        slots = self.parameters.tensors_of
        self._blocks = [[_block(tensors, layer) for layer in range(config.n_layer)] for tensors in slots]
        self._workspaces = [Workspace(config, self.parameters.dtype)]
        self._workspace = self._workspaces[0]

    # These methods are called by the trainer.

    def loss(self, batch: Batch) -> tuple[float, int]:
        """Return the sum of the losses over the batch's targets, in nats, and their number; nothing is dropped."""
        total = 0.0
        for part in self._micro_batches(batch):
            self._forward(part, threshold=0)
            total += self._head(part, None)
        return total, int((batch.targets >= 0).sum())

    def loss_and_gradients(self, batch: Batch, gradients: NDArray) -> tuple[float, int]:
        """Add the batch's gradient SUM to ``gradients``; return (loss_sum, n_tokens)."""
        return self._passes(batch, self._views(gradients), fresh=False)

    def write_gradients(self, batch: Batch, gradients: NDArray) -> tuple[float, int]:
        """Overwrite ``gradients`` with the batch's gradient SUM; return (loss_sum, n_tokens).

        The first product of each matrix is written instead of added; the other gradients are zeroed before.
        """
        for start, stop in self._sums:
            gradients[start:stop] = 0
        return self._passes(batch, self._views(gradients), fresh=True)

    def _views(self, gradients: NDArray) -> dict[str, NDArray]:
        """Return named views into ``gradients``; they are kept for a vector that comes step after step."""
        if self._viewed[0] is not gradients:
            self._viewed = gradients, self.parameters.views(gradients)
        return self._viewed[1]

    def _is_product(self, spec: TensorSpec) -> bool:
        """Tell whether a tensor's gradient begins with a matrix product."""
        if spec.symmetry_rows:
            return spec.name == self._head_name
        return len(spec.shape) == 2 and spec.name != "wpe.weight"

    def _passes(self, batch: Batch, grads: dict[str, NDArray], fresh: bool) -> tuple[float, int]:
        total = 0.0
        for part in self._micro_batches(batch):
            keys = self._forward(part, self.threshold)
            total += self._head(part, Gradients(grads, fresh))
            self._backward(part, Gradients(grads, fresh), keys)
            fresh = False
        return total, int((batch.targets >= 0).sum())

    def logits(self, batch: Batch) -> NDArray:
        """Return the (B, T, V) logits, over rows of the table, of the token that follows each input."""
        parts = []
        for part in self._micro_batches(batch):
            self._forward(part, threshold=0)
            rows = self._workspace.buffers["norm1"][self.config.n_layer]
            out = rows[: part.inputs.size] @ self.output_weight().T
            parts.append(out.reshape(*part.inputs.shape, -1))
        return np.concatenate(parts)

    def output_weight(self) -> NDArray:
        """Return the (V, C) weight of the output layer, in the order of the rows."""
        return self.parameters[self._head_name]

    def decoder(self) -> "GPT2Decoder":
        """Return a decoder whose sequence is empty."""
        return GPT2Decoder(self)

    # These methods choose the memory in which the model computes.

    def workspace_elements(self) -> int:
        """Return how many elements of memory a workspace for micro-batches needs."""
        return Workspace.elements(self.config, self.micro_batch)

    def share_workspaces(self, memories: Sequence[NDArray]) -> None:
        """Use these zeroed memories, of :meth:`workspace_elements` each, which others may use at other times."""
        dtype, size = self.parameters.dtype, self.micro_batch
        self._workspaces = [Workspace(self.config, dtype, memory, size) for memory in memories]
        self._workspace = self._workspaces[0]

    def work_in(self, slot: int) -> None:
        """Use the shared workspace with the number ``slot`` from now on."""
        self._workspace = self._workspaces[slot]

    # These methods are the passes.

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        size = self.micro_batch
        return [
            Batch(
                np.ascontiguousarray(batch.inputs[first : first + size], np.int32),
                np.ascontiguousarray(batch.targets[first : first + size], np.int32),
                batch.sequence_ids[first : first + size],
                batch.seed,
                batch.step,
            )
            for first in range(0, len(batch.inputs), size)
        ]

    def _forward(self, batch: Batch, threshold: int) -> "Keys":
        """Compute everything up to the last norm into the buffers; return the dropout keys of the batch."""
        buffers = self._workspace.reserve(*batch.inputs.shape)
        kernels, keys, shape = self.kernels, Keys(batch, threshold), self._shape(batch)
        blocks = self._blocks[self.parameters.slot]

        def attend(i: int) -> None:
            arrays = (buffers["heads"][i], buffers["p"][i], buffers["qkv"][i], blocks[i]["attn.c_attn.bias"])
            kernels.attention_forward(*arrays, shape, keys.at(1 + 3 * i), threshold)

        self.layers_forward(kernels, buffers, batch.inputs, 0, keys, attend)
        return keys

    def layers_forward(
        self,
        kernels: Kernels,
        buffers: Mapping[str, NDArray],
        inputs: NDArray[np.int32],
        start: int,
        keys: "Keys",
        attend: Callable[[int], None],
    ) -> None:
        """Compute everything up to the last norm.

        Args:
            kernels: The kernels that compute it.
            buffers: The buffers that are filled, reserved for ``inputs``.
            inputs: (B, T) The rows of the token table.
            start: The position of the first of the T tokens.
            keys: The dropout keys of the batch.
            attend: The attention: it is called with a layer's number when its ``qkv`` is complete, and fills its
                ``heads``.
        """
        kernels.scratch = buffers["scratch"]
        tensors, layers, blocks = self.parameters.tensors, self.config.n_layer, self._blocks[self.parameters.slot]
        x, middle, norm1, norm2 = buffers["x"], buffers["middle"], buffers["norm1"], buffers["norm2"]
        mean, rstd, branch = buffers["mean"], buffers["rstd"], buffers["branch"]
        kernels.embed_forward(x[0], inputs, tensors["wte.weight"], tensors["wpe.weight"][start:])
        keys.drop(kernels, x[0], EMBEDDING_SITE)
        first = _norm(tensors, "h.0.ln_1")
        kernels.norm_forward(norm1[0], mean[0], rstd[0], x[0], *first)
        for i in range(layers):
            p = blocks[i]
            kernels.product(buffers["qkv"][i], norm1[i], p["attn.c_attn.weight"])
            attend(i)
            site = 1 + 3 * i
            kernels.product(branch, buffers["heads"][i], p["attn.c_proj.weight"])
            after = (norm2[i], mean[2 * i + 1], rstd[2 * i + 1])
            bias = keys.drop_branch(kernels, branch, p["attn.c_proj.bias"], site + 1)
            kernels.residual_norm_forward(middle[i], *after, x[i], branch, bias, p["ln_2.weight"], p["ln_2.bias"])
            up = (p["mlp.c_fc.weight"], p["mlp.c_fc.bias"])
            kernels.product_gelu(buffers["active"][i], buffers["slope"][i], norm2[i], *up)
            kernels.product(branch, buffers["active"][i], p["mlp.c_proj.weight"])
            after = (norm1[i + 1], mean[2 * i + 2], rstd[2 * i + 2])
            bias = keys.drop_branch(kernels, branch, p["mlp.c_proj.bias"], site + 2)
            following = _norm(tensors, f"h.{i + 1}.ln_1" if i + 1 < layers else "ln_f")
            kernels.residual_norm_forward(x[i + 1], *after, middle[i], branch, bias, *following)

    def _head(self, batch: Batch, gradients: "Gradients | None") -> float:
        """Return the loss sum; with ``gradients``, write that of the last norm's output to the buffer ``branch``."""
        buffers, kernels = self._workspace.buffers, self.kernels
        weight = self.output_weight()
        normed, targets = buffers["norm1"][self.config.n_layer], batch.targets.reshape(-1)
        loss, step = 0.0, len(buffers["logits"])
        for first in range(0, len(targets), step):
            rows = slice(first, min(first + step, len(targets)))
            logits = buffers["logits"][: rows.stop - rows.start]
            kernels.product(logits, normed[rows], weight.T)
            loss += kernels.cross_entropy(logits, targets[rows], gradients is not None)
            if gradients is not None:
                kernels.product(buffers["branch"][rows], logits, weight)
                gradients.add_product(kernels, self._head_name, logits.T, normed[rows], first == 0)
        return loss

    def _backward(self, batch: Batch, gradients: "Gradients", keys: "Keys") -> None:
        buffers, kernels = self._workspace.buffers, self.kernels
        tensors, grads = self.parameters.tensors, gradients.tensors
        layers, shape, blocks = self.config.n_layer, self._shape(batch), self._blocks[self.parameters.slot]
        x, middle, norm1, norm2 = buffers["x"], buffers["middle"], buffers["norm1"], buffers["norm2"]
        mean, rstd = buffers["mean"], buffers["rstd"]
        dx, branch, wide = buffers["dx"], buffers["branch"], buffers["wide"]
        dqkv = buffers["dqkv"]
        fused = not keys.threshold  # then the norm's backward sums the bias gradient of the branch below

        def norm_backward(name: str, place: int, below: str | None, source: NDArray, fresh: bool) -> None:
            dbranch = grads[f"{below}.bias"] if below and fused else None
            dweight, dbias = grads[f"{name}.weight"], grads[f"{name}.bias"]
            kept = (mean[place], rstd[place], tensors[f"{name}.weight"])
            kernels.norm_backward(dx, dweight, dbias, dbranch, branch, source, *kept, fresh)

        norm_backward("ln_f", 2 * layers, f"h.{layers - 1}.mlp.c_proj", x[layers], True)
        for i in reversed(range(layers)):
            p, block = blocks[i], f"h.{i}."
            site = 1 + 3 * i
            dy = keys.drop_gradient(kernels, dx, buffers["dropped"], grads[block + "mlp.c_proj.bias"], site + 2)
            gradients.add_product(kernels, block + "mlp.c_proj.weight", buffers["active"][i].T, dy)
            down = p["mlp.c_proj.weight"]
            kernels.product_slope(wide, grads[block + "mlp.c_fc.bias"], dy, down, buffers["slope"][i])
            gradients.add_product(kernels, block + "mlp.c_fc.weight", norm2[i].T, wide)
            kernels.product(branch, wide, p["mlp.c_fc.weight"].T)
            norm_backward(block + "ln_2", 2 * i + 1, block + "attn.c_proj", middle[i], False)
            dy = keys.drop_gradient(kernels, dx, buffers["dropped"], grads[block + "attn.c_proj.bias"], site + 1)
            gradients.add_product(kernels, block + "attn.c_proj.weight", buffers["heads"][i].T, dy)
            kernels.product(branch, dy, p["attn.c_proj.weight"].T)
            kernels.attention_backward(
                dqkv,
                grads[block + "attn.c_attn.bias"],
                branch,
                buffers["p"][i],
                buffers["qkv"][i],
                p["attn.c_attn.bias"],
                shape,
                keys.at(site),
                keys.threshold,
            )
            gradients.add_product(kernels, block + "attn.c_attn.weight", norm1[i].T, dqkv)
            kernels.product(branch, dqkv, p["attn.c_attn.weight"].T)
            norm_backward(block + "ln_1", 2 * i, f"h.{i - 1}.mlp.c_proj" if i else None, x[i], False)
        keys.drop(kernels, dx, EMBEDDING_SITE)
        kernels.embed_backward(grads["wte.weight"], grads["wpe.weight"], dx, batch.inputs)

    # These are small helpers.

    @property
    def _head_name(self) -> str:
        return "wte.weight" if self.config.tie_embeddings else "lm_head.weight"

    def _shape(self, batch: Batch) -> tuple[int, int, int, int]:
        heads = self.config.n_head
        return (*batch.inputs.shape, heads, self.config.n_embd // heads)


class Gradients:
    """The gradient tensors of a batch, with a flag that tells whether they are still to be written first."""

    def __init__(self, tensors: Mapping[str, NDArray], fresh: bool) -> None:
        self.tensors = tensors
        self.fresh = fresh

    def add_product(self, kernels: Kernels, name: str, a: NDArray, b: NDArray, first: bool = True) -> None:
        """Add a @ b to the gradient tensor called ``name``, or write it where nothing has been written yet.

        Args:
            kernels: The kernels that compute it.
            name: The name of the tensor, (n, m).
            a: (n, k) The left factor.
            b: (k, m) The right factor.
            first: Whether it is the micro-batch's first product for this tensor.
        """
        kernels.product(self.tensors[name], a, b, add=not (self.fresh and first))


class Keys:
    """The dropout keys of a batch's sequences; nothing is dropped where the threshold is 0."""

    def __init__(self, batch: Batch, threshold: int) -> None:
        self.batch = batch
        self.threshold = threshold

    def at(self, site: int) -> NDArray[np.uint64]:
        """Return the (B,) keys of the sequences at a dropout site, or no keys where nothing is dropped."""
        if not self.threshold:
            return NO_KEYS
        return sequence_keys(self.batch.seed, self.batch.step, self.batch.sequence_ids, site)

    def drop(self, kernels: Kernels, x: NDArray, site: int) -> None:
        """Drop elements of ``x`` (N, C) in place.

        Args:
            kernels: The kernels that compute it.
            x: (N, C) The activations or gradients.
            site: The number of the dropout site.
        """
        if self.threshold:
            kernels.dropout(x, self.at(site), self.threshold)

    def drop_branch(self, kernels: Kernels, branch: NDArray, bias: NDArray, site: int) -> NDArray:
        """Drop elements of ``branch`` + ``bias`` in place; return the bias that is still to be added.

        Args:
            kernels: The kernels that compute it.
            branch: (N, C) The output of a branch's last product; where nothing is dropped it stays as it is.
            bias: (C,) The bias of that product.
            site: The number of the dropout site.
        """
        if not self.threshold:
            return bias
        branch += bias
        self.drop(kernels, branch, site)
        return np.zeros_like(bias)

    def drop_gradient(self, kernels: Kernels, dx: NDArray, scratch: NDArray, dbias: NDArray, site: int) -> NDArray:
        """Return the gradient of a branch's product: ``dx`` itself, or a copy with the same elements dropped.

        Where there is dropout, the norm's backward pass cannot sum the bias gradient, so it is added here.

        Args:
            kernels: The kernels that compute it.
            dx: (N, C) The gradient of the residual stream.
            scratch: (N, C) Memory for the copy.
            dbias: (C,) The gradient of the bias, added to.
            site: The number of the dropout site.
        """
        if not self.threshold:
            return dx
        scratch[...] = dx
        self.drop(kernels, scratch, site)
        kernels.column_sums(dbias, scratch)
        return scratch


def _norm(tensors: Mapping[str, NDArray], name: str) -> tuple[NDArray, NDArray]:
    return tensors[f"{name}.weight"], tensors[f"{name}.bias"]


def _block(tensors: Mapping[str, NDArray], layer: int) -> dict[str, NDArray]:
    prefix = f"h.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class GPT2Decoder:
    """A decoder with cached keys and values, which computes the new tokens alone.

    Positions are absolute. Once the sequence is longer than the context, the cache does not fit the moved window any
    more and is rebuilt: the logits are always those of a forward pass over the last ``context_length`` tokens.

    Args:
        model: The model with its parameters.
    """

    def __init__(self, model: GPT2) -> None:
        config, dtype = model.config, model.parameters.dtype
        self.model = model
        self.window: list[int] = []
        """The rows from which the next one is predicted."""
        shape = (config.n_layer, 2, config.n_head, config.context_length, config.n_embd // config.n_head)
        self._cache = np.zeros(shape, dtype)
        self._kernels = ReferenceKernels()  # for a row the BLAS reads the weights once, packing reads them twice
        # The system never provides the pages that one sequence does not touch, such as those of the training attention.
        self._workspace = Workspace(config, dtype, lazy_zeros(Workspace.elements(config, 1), dtype), 1)

    def extend(self, rows: Sequence[int]) -> NDArray[np.floating]:
        """Append rows of the table to the sequence; return the (V,) logits, over rows, of the next one."""
        context = self.model.config.context_length
        start = len(self.window)
        self.window = [*self.window, *map(int, rows)]
        if len(self.window) > context:
            self.window = self.window[-context:]
            start = 0
        inputs = np.array([self.window[start:]], np.int32)
        buffers = self._workspace.reserve(*inputs.shape)
        keys = Keys(Batch(inputs, inputs, np.zeros(1, np.int64), 0, 0), 0)
        self.model.layers_forward(
            self._kernels, buffers, inputs, start, keys, lambda layer: self._attend(buffers, layer, start)
        )
        return self.model.output_weight() @ buffers["norm1"][self.model.config.n_layer][-1]

    def _attend(self, buffers: Mapping[str, NDArray], layer: int, start: int) -> None:
        """Attend from the new positions, which begin at ``start``, to all positions up to each of them.

        Args:
            buffers: The buffers of the new positions.
            layer: The number of the layer.
            start: The first new position.
        """
        heads, width = self._cache.shape[2], self._cache.shape[4]
        out = buffers["heads"][layer]
        stop = start + len(out)
        qkv = buffers["qkv"][layer] + self.model.parameters[f"h.{layer}.attn.c_attn.bias"]
        q, k, v = qkv.reshape(len(out), 3, heads, width).transpose(1, 2, 0, 3)  # (H, new, D) each
        self._cache[layer, 0, :, start:stop], self._cache[layer, 1, :, start:stop] = k, v
        keys, values = self._cache[layer, :, :, :stop]
        scores = np.matmul(q, keys.swapaxes(1, 2)) / np.sqrt(width).astype(out.dtype)
        future = np.arange(stop) > np.arange(start, stop)[:, None]
        scores[:, future] = -np.inf
        scores = np.exp(scores - scores.max(axis=2, keepdims=True))
        scores /= scores.sum(axis=2, keepdims=True)
        out[...] = np.matmul(scores, values).swapaxes(0, 1).reshape(len(out), -1)


class GPT2Family:
    """The family of GPT-2 models."""

    def specs(self, config: ModelConfig) -> list[TensorSpec]:
        return gpt2_specs(config)

    def make(self, config: ModelConfig, parameters: ParameterBuffer, sequences: int) -> GPT2:
        return GPT2(config, parameters, sequences)

    def initialize(self, model: GPT2, seed: int) -> None:
        """Draw GPT-2's initialisation in token order, so that it is the same for every symmetry table."""
        scale, parameters = 0.02, model.parameters
        for index, spec in enumerate(parameters.specs):
            tensor = parameters[spec.name]
            if spec.name.endswith("bias"):
                tensor[...] = 0.0
            elif len(spec.shape) == 1:
                tensor[...] = 1.0
            else:
                drawn = np.random.default_rng([seed, index]).standard_normal(spec.shape, np.float32)
                residual = spec.name.endswith("c_proj.weight")
                drawn *= scale / np.sqrt(2 * model.config.n_layer) if residual else scale
                tensor[...] = drawn[parameters.symmetry.token_of_row] if spec.symmetry_rows else drawn

    def flops_per_token(self, config: ModelConfig) -> float:
        return flops_per_token(config)

    def workspace_bytes(self, config: ModelConfig, sequences: int) -> int:
        return activation_bytes(config, sequences)


FAMILY = GPT2Family()


def make_gpt2(
    config: ModelConfig,
    symmetry_group: NDArray[np.uint8] | None = None,
    dtype: DTypeLike = np.float32,
    storage: Sequence[NDArray] = (),
    micro_batch_size: int = 0,
    kernels: Kernels | None = None,
) -> GPT2:
    """Make a GPT-2 outside of a run; its parameters are not initialised.

    Args:
        config: The settings, with the vocabulary size resolved.
        symmetry_group: (<= V,) The symmetry class of each token id; further ids go by id modulo the order.
        dtype: The element type: float32, or float64 for gradient checks.
        storage: The memory for the slots of the parameters; by default it is allocated.
        micro_batch_size: The most sequences that are computed at once; 0 means the automatic choice.
        kernels: The kernels that compute; by default those of the environment.
    """
    groups = symmetry_groups(symmetry_group, config.vocab_size, config.symmetry_order)
    table = SymmetryTable(groups, config.symmetry_order)
    parameters = ParameterBuffer(gpt2_specs(config), dtype, storage, table)
    return GPT2(config, parameters, micro_batch_sequences(config, micro_batch_size), kernels)
