"""GPT-2's architecture: pre-norm blocks, learned positions, GELU(tanh), tied or untied output (Radford et al. 2019).

Forward and backward are written out. Batch and time are folded into one product per layer; everything between the
products is a kernel of :mod:`hiermpi.kernels`; it works in buffers of :mod:`hiermpi.model.workspace`. The model
works on row ids, which are class-major (:mod:`hiermpi.model.symmetry`); checkpoints and logits are in token order.

Sizes in comments: B sequences, T tokens of each, N = B T rows, C channels, H heads of D channels, V rows of the table.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hiermpi.config.schema import ModelConfig
from hiermpi.kernels import Kernels, load_kernels
from hiermpi.kernels.dropout import sequence_keys, threshold_of
from hiermpi.kernels.layers import NO_KEYS, ReferenceKernels
from hiermpi.model.contract import Batch
from hiermpi.model.parameters import ParameterBuffer, TensorSpec
from hiermpi.model.symmetry import SymmetryTable, symmetry_groups
from hiermpi.model.workspace import Workspace, micro_batch_sequences

EMBEDDING_SITE = 0


def transformer_specs(config: ModelConfig) -> list[TensorSpec]:
    """The tensors of the model, in their order within the vector: the decayed matrices, then the rest."""
    width = config.n_embd
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
    """Floating-point operations of forward and backward per token: 6 N + 12 L C T (Chowdhery et al. 2022)."""
    matrices = sum(spec.size for spec in transformer_specs(config) if spec.decay and spec.name != "wpe.weight")
    if not config.tie_embeddings:
        matrices -= config.vocab_size * config.n_embd
    return 6.0 * matrices + 12.0 * config.n_layer * config.n_embd * config.context_length


class Transformer:
    """A GPT-2 that satisfies :class:`hiermpi.model.contract.Model`.

    Args:
        config: with the vocabulary size resolved.
        symmetry_group: (<= V,) symmetry class of each token id; others go by id modulo the order.
        dtype: float32, or float64 for gradient checks (then the kernels are the numpy reference).
        storage: memory for the parameters' slots, see :class:`ParameterBuffer`.
        micro_batch_size: most sequences computed at once; 0 chooses.
        kernels: by default the environment's.
    """

    def __init__(
        self,
        config: ModelConfig,
        symmetry_group: NDArray[np.uint8] | None = None,
        dtype: DTypeLike = np.float32,
        storage: Sequence[NDArray] = (),
        micro_batch_size: int = 0,
        kernels: Kernels | None = None,
    ) -> None:
        self.config = config
        self.symmetry_order = config.symmetry_order
        groups = symmetry_groups(symmetry_group, config.vocab_size, config.symmetry_order)
        self.symmetry = SymmetryTable(groups, config.symmetry_order)
        self.parameters = ParameterBuffer(transformer_specs(config), dtype, storage)
        products = self.parameters.runs(self._is_product)
        self._sums = [(start, stop) for start, stop, is_product in products if not is_product]
        """Ranges of the vector with the gradients that are only added to."""
        self._viewed: tuple[NDArray | None, dict[str, NDArray]] = (None, {})
        self.micro_batch = micro_batch_sequences(config, micro_batch_size)
        self.kernels = (kernels or load_kernels()) if self.parameters.dtype == np.float32 else ReferenceKernels()
        self.threshold = threshold_of(config.dropout)
        slots = self.parameters.tensors_of
        self._blocks = [[_block(tensors, layer) for layer in range(config.n_layer)] for tensors in slots]
        self._workspaces = [Workspace(config, self.parameters.dtype)]
        self._workspace = self._workspaces[0]

    # What the trainer calls.

    def loss(self, batch: Batch) -> tuple[float, int]:
        """The sum of the losses over the batch's targets, in nats, and their number. Without dropout."""
        total = 0.0
        for part in self._micro_batches(batch):
            self._forward(part, threshold=0)
            total += self._head(part, None)
        return total, int((batch.targets >= 0).sum())

    def loss_and_gradients(self, batch: Batch, gradients: NDArray) -> tuple[float, int]:
        """Add the batch's gradient SUM into ``gradients``; return (loss_sum, n_tokens)."""
        return self._passes(batch, self._views(gradients), fresh=False)

    def write_gradients(self, batch: Batch, gradients: NDArray) -> tuple[float, int]:
        """The same in place of what ``gradients`` hold: first products are written, the rest is zeroed before."""
        for start, stop in self._sums:
            gradients[start:stop] = 0
        return self._passes(batch, self._views(gradients), fresh=True)

    def _views(self, gradients: NDArray) -> dict[str, NDArray]:
        """Named views into ``gradients``, made once for a vector that comes step after step."""
        if self._viewed[0] is not gradients:
            self._viewed = gradients, self.parameters.views(gradients)
        return self._viewed[1]

    def _is_product(self, spec: TensorSpec) -> bool:
        """Whether a tensor's gradient begins with a matrix product."""
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

    def logits(self, inputs: NDArray[np.int32]) -> NDArray:
        """(B, T, V) logits in token order of inputs (B, T) given as rows of the table."""
        parts = []
        for first in range(0, len(inputs), self.micro_batch):
            part = np.ascontiguousarray(inputs[first : first + self.micro_batch], np.int32)
            self._forward(Batch(part, part, np.zeros(len(part), np.int64), 0, 0), threshold=0)
            rows = self._workspace.buffers["norm1"][self.config.n_layer]
            out = rows[: part.size] @ self._head_weight(self.parameters.tensors).T
            parts.append(out[:, self.symmetry.row_of_token].reshape(*part.shape, -1))
        return np.concatenate(parts)

    def output_weight(self) -> NDArray:
        """(V, C) weight of the output layer, in the order of the rows."""
        return self._head_weight(self.parameters.tensors)

    # Where it works.

    def workspace_elements(self) -> int:
        """Elements of memory that a workspace for micro-batches needs."""
        return Workspace.elements(self.config, self.micro_batch)

    def share_workspaces(self, memories: Sequence[NDArray]) -> None:
        """Work in memory that others use at other times: zeroed, of :meth:`workspace_elements` each."""
        dtype, size = self.parameters.dtype, self.micro_batch
        self._workspaces = [Workspace(self.config, dtype, memory, size) for memory in memories]
        self._workspace = self._workspaces[0]

    def work_in(self, place: int) -> None:
        """Use the shared workspace of this number from now on."""
        self._workspace = self._workspaces[place]

    # Parameters from and to the outside.

    def initialize(self, seed: int) -> None:
        """GPT-2's initialisation, the same for every symmetry table: drawn tensor by tensor in token order."""
        scale = 0.02
        for index, spec in enumerate(self.parameters.specs):
            tensor = self.parameters[spec.name]
            if spec.name.endswith("bias"):
                tensor[...] = 0.0
            elif len(spec.shape) == 1:
                tensor[...] = 1.0
            else:
                drawn = np.random.default_rng([seed, index]).standard_normal(spec.shape, np.float32)
                residual = spec.name.endswith("c_proj.weight")
                drawn *= scale / np.sqrt(2 * self.config.n_layer) if residual else scale
                tensor[...] = drawn[self.symmetry.token_of_row] if spec.symmetry_rows else drawn

    def tensors_in_token_order(self, vector: NDArray) -> dict[str, NDArray]:
        """Copies of the tensors in a vector of the parameters' layout, table rows in token order."""
        views = self.parameters.views(vector)
        rows = self.symmetry.row_of_token
        return {
            spec.name: views[spec.name][rows] if spec.symmetry_rows else views[spec.name].copy()
            for spec in self.parameters.specs
        }

    def load_token_order(self, tensors: Mapping[str, NDArray], vector: NDArray) -> None:
        """Fill a vector of the parameters' layout from tensors in token order. Raises KeyError, ValueError."""
        views = self.parameters.views(vector)
        for spec in self.parameters.specs:
            source = tensors[spec.name]
            if source.shape != spec.shape:
                raise ValueError(f"{spec.name} has shape {source.shape}, expected {spec.shape}")
            views[spec.name][...] = source[self.symmetry.token_of_row] if spec.symmetry_rows else source

    # The passes.

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
        """Everything up to the last norm, kept in the buffers."""
        sequences, length = batch.inputs.shape
        buffers = self._workspace.reserve(sequences, length)
        self.kernels.scratch = buffers["scratch"]
        kernels, tensors = self.kernels, self.parameters.tensors
        layers, shape, blocks = self.config.n_layer, self._shape(batch), self._blocks[self.parameters.slot]
        x, middle, norm1, norm2 = buffers["x"], buffers["middle"], buffers["norm1"], buffers["norm2"]
        mean, rstd, branch = buffers["mean"], buffers["rstd"], buffers["branch"]
        keys = Keys(batch, threshold)
        kernels.embed_forward(x[0], batch.inputs, tensors["wte.weight"], tensors["wpe.weight"])
        keys.drop(kernels, x[0], EMBEDDING_SITE)
        first = _norm(tensors, "h.0.ln_1")
        kernels.norm_forward(norm1[0], mean[0], rstd[0], x[0], *first)
        for i in range(layers):
            p = blocks[i]
            kernels.product(buffers["qkv"][i], norm1[i], p["attn.c_attn.weight"])
            site = 1 + 3 * i
            kernels.attention_forward(
                buffers["heads"][i],
                buffers["p"][i],
                buffers["qkv"][i],
                p["attn.c_attn.bias"],
                shape,
                keys.at(site),
                threshold,
            )
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
        return keys

    def _head(self, batch: Batch, gradients: "Gradients | None") -> float:
        """The loss sum; with ``gradients`` also the gradient of the last norm's output, into the buffer branch."""
        buffers, kernels = self._workspace.buffers, self.kernels
        weight = self._head_weight(self.parameters.tensors)
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

    # Small things.

    @property
    def _head_name(self) -> str:
        return "wte.weight" if self.config.tie_embeddings else "lm_head.weight"

    def _head_weight(self, tensors: Mapping[str, NDArray]) -> NDArray:
        return tensors[self._head_name]

    def _shape(self, batch: Batch) -> tuple[int, int, int, int]:
        heads = self.config.n_head
        return (*batch.inputs.shape, heads, self.config.n_embd // heads)


class Gradients:
    """The gradient tensors of a batch, and whether they are still zero."""

    def __init__(self, tensors: Mapping[str, NDArray], fresh: bool) -> None:
        self.tensors = tensors
        self.fresh = fresh

    def add_product(self, kernels: Kernels, name: str, a: NDArray, b: NDArray, first: bool = True) -> None:
        """Add a @ b to the tensor called ``name``; ``first``: it is this micro-batch's first product for it."""
        kernels.product(self.tensors[name], a, b, add=not (self.fresh and first))


class Keys:
    """The dropout keys of a batch's sequences; with a threshold of 0 nothing is dropped."""

    def __init__(self, batch: Batch, threshold: int) -> None:
        self.batch = batch
        self.threshold = threshold

    def at(self, site: int) -> NDArray[np.uint64]:
        """(B,) keys at a site."""
        if not self.threshold:
            return NO_KEYS
        return sequence_keys(self.batch.seed, self.batch.step, self.batch.sequence_ids, site)

    def drop(self, kernels: Kernels, x: NDArray, site: int) -> None:
        """Drop elements of x (N, C) in place."""
        if self.threshold:
            kernels.dropout(x, self.at(site), self.threshold)

    def drop_branch(self, kernels: Kernels, branch: NDArray, bias: NDArray, site: int) -> NDArray:
        """Drop elements of branch + bias in place; return the bias that is still to be added."""
        if not self.threshold:
            return bias
        branch += bias
        self.drop(kernels, branch, site)
        return np.zeros_like(bias)

    def drop_gradient(self, kernels: Kernels, dx: NDArray, scratch: NDArray, dbias: NDArray, site: int) -> NDArray:
        """The gradient of the branch's product: dx itself, or a copy with the same elements dropped.

        Adds the bias gradient where dropout kept the norm's backward from summing it.
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

