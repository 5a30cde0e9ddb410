"""The whole model: against a naive one, against central differences, and against itself cut in other ways."""

import itertools
import tracemalloc
from math import erf, exp, log, pi, sqrt, tanh

import numpy as np
import pytest

from hiermpi.config.schema import ModelConfig
from hiermpi.errors import DamagedFile, UsageError
from hiermpi.kernels import load_kernels
from hiermpi.model import workspace
from hiermpi.model.contract import IGNORED_TARGET, Batch, micro_batch_sequences, specs_of
from hiermpi.model.generation import token_logits
from hiermpi.model.gpt2 import FAMILY, flops_per_token, gpt2_specs, make_gpt2
from hiermpi.model.parameters import ParameterLayout
from hiermpi.model.workspace import activation_bytes

V, CONTEXT, ORDER = 13, 7, 5
TABLE = np.array([4, 0, 0, 3, 1, 4, 2], np.uint8)  # the ids beyond it go by modulo
TIED = pytest.mark.parametrize("tied", [True, False])


def make_config(**changes):
    shape = {"vocab_size": V, "context_length": CONTEXT, "n_layer": 2, "n_head": 3, "n_embd": 6}
    return ModelConfig(**(shape | {"symmetry_order": ORDER} | changes))


def make_model(symmetry_group=TABLE, dtype=np.float64, micro_batch_size=0, kernels=None, **changes):
    """A model whose parameters are all far from zero, so that every gradient is."""
    model = make_gpt2(make_config(**changes), symmetry_group, dtype, (), micro_batch_size, kernels)
    FAMILY.initialize(model, 1)
    rng = np.random.default_rng(2)
    tensors = model.parameters.tensors_in_token_order(model.parameters.vector)
    for name in tensors:
        tensors[name] += 0.3 * rng.standard_normal(tensors[name].shape)
    model.parameters.load_token_order(tensors, model.parameters.vector)
    return model


def make_batch(model, sequences=3, length=CONTEXT, seed=3):
    """The same tokens whatever the model's table; some targets are ignored."""
    tokens = np.random.default_rng(seed).integers(0, V, (sequences, length + 1))
    rows = model.parameters.symmetry.row_of_token[tokens].astype(np.int32)
    targets = rows[:, 1:].copy()
    targets[0, ::3] = IGNORED_TARGET
    return Batch(rows[:, :-1], targets, 10 * np.arange(sequences) + 5, 42, 6)


def some_of(batch, *indices):
    """A batch of these sequences of another."""
    chosen = list(indices)
    inputs, targets, ids = batch.inputs[chosen], batch.targets[chosen], batch.sequence_ids[chosen]
    return Batch(inputs, targets, ids, batch.seed, batch.step)


def gradients_of(model, batch):
    """(loss sum, number of tokens, gradient sums)."""
    gradients = model.parameters.new_vector()
    return *model.loss_and_gradients(batch, gradients), gradients


def close(actual, expected, rtol=1e-10, atol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


# An independent model, by loops.


def naive_norm(x, weight, bias):
    centred = x - sum(x) / len(x)
    return centred / sqrt(sum(centred**2) / len(x) + 1e-5) * weight + bias


def logits_of(model, batch):
    """Logits in token order."""
    return token_logits(model, model.parameters.symmetry.token_of_row[batch.inputs])


def naive_logits(tensors, tokens, config):
    """(T, V) logits of one sequence of tokens, from tensors in token order."""
    t = tensors
    x = [t["wte.weight"][token] + t["wpe.weight"][place] for place, token in enumerate(tokens)]
    for layer in range(config.n_layer):
        block = {name.removeprefix(f"h.{layer}."): tensor for name, tensor in t.items()}
        out_weight, out_bias = block["mlp.c_proj.weight"], block["mlp.c_proj.bias"]
        normed = [naive_norm(row, block["ln_1.weight"], block["ln_1.bias"]) for row in x]
        mixed = naive_attention(normed, block, config)
        x = [row + other for row, other in zip(x, mixed, strict=True)]
        for place, row in enumerate(x):
            normed = naive_norm(row, block["ln_2.weight"], block["ln_2.bias"])
            hidden = np.einsum("i,io->o", normed, block["mlp.c_fc.weight"]) + block["mlp.c_fc.bias"]
            active = np.array([0.5 * h * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 * h**3))) for h in hidden])
            x[place] = row + np.einsum("i,io->o", active, out_weight) + out_bias
    head = t["wte.weight" if config.tie_embeddings else "lm_head.weight"]
    return np.array([head @ naive_norm(row, t["ln_f.weight"], t["ln_f.bias"]) for row in x])


def naive_attention(normed, block, config):
    width = config.n_embd // config.n_head
    weight, bias = block["attn.c_attn.weight"], block["attn.c_attn.bias"]
    qkv = [np.einsum("i,io->o", row, weight) + bias for row in normed]
    mixed = []
    for place in range(len(normed)):
        heads = []
        for head in range(config.n_head):
            q, k, v = (slice(part * config.n_embd + head * width, None) for part in range(3))
            scores = [
                exp(qkv[place][q][:width] @ qkv[past][k][:width] / sqrt(width)) for past in range(place + 1)
            ]
            values = [score * qkv[past][v][:width] for past, score in enumerate(scores)]
            heads.append(sum(values) / sum(scores))
        mixed.append(np.concatenate(heads) @ block["attn.c_proj.weight"] + block["attn.c_proj.bias"])
    return mixed


def naive_of(model, batch):
    """Logits (B, T, V) in token order, loss sum and number of targets."""
    tensors = model.parameters.tensors_in_token_order(model.parameters.vector)
    tokens = model.parameters.symmetry.token_of_row
    logits = np.array([naive_logits(tensors, tokens[row], model.config) for row in batch.inputs])
    loss, n_tokens = 0.0, 0
    for b, t in np.ndindex(batch.targets.shape):
        if batch.targets[b, t] != IGNORED_TARGET:
            loss += log(sum(np.exp(logits[b, t]))) - logits[b, t, tokens[batch.targets[b, t]]]
            n_tokens += 1
    return logits, loss, n_tokens


@TIED
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("length", [1, 4, CONTEXT])
def test_forward_matches_the_naive_model(tied, sequences, length):
    model = make_model(tie_embeddings=tied)
    batch = make_batch(model, sequences, length)
    logits, loss, n_tokens = naive_of(model, batch)
    close(logits_of(model, batch), logits)
    assert model.loss(batch) == (pytest.approx(loss, rel=1e-12), n_tokens)
    assert gradients_of(model, batch)[:2] == (pytest.approx(loss, rel=1e-12), n_tokens)


@pytest.mark.parametrize(("n_head", "n_embd"), [(1, 1), (1, 5), (5, 5), (2, 14)])
def test_any_head_size(n_head, n_embd):
    model = make_model(n_head=n_head, n_embd=n_embd)
    batch = make_batch(model)
    close(logits_of(model, batch), naive_of(model, batch)[0])


# Gradients.


@TIED
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_central_differences(tied, dropout):
    """A few elements of every tensor, and the whole vector along random directions."""
    model = make_model(tie_embeddings=tied, dropout=dropout)
    batch, vector, unused = make_batch(model), model.parameters.vector, model.parameters.new_vector()
    gradients = gradients_of(model, batch)[2]
    start, rng = vector.copy(), np.random.default_rng(4)

    def slope(direction, step=1e-5):
        values = []
        for sign in (1, -1):
            vector[:] = start + sign * step * direction
            values.append(model.loss_and_gradients(batch, unused)[0])
        return (values[0] - values[1]) / (2 * step)

    for spec in model.parameters.specs:
        offset = model.parameters.offsets[spec.name]
        for element in rng.choice(spec.size, min(spec.size, 8), replace=False):
            direction = np.zeros_like(start)
            direction[offset + element] = 1.0
            expected = pytest.approx(slope(direction), rel=1e-6, abs=1e-7)
            assert gradients[offset + element] == expected, spec.name
    for _ in range(3):
        direction = rng.standard_normal(len(start))
        direction /= np.linalg.norm(direction)
        assert gradients @ direction == pytest.approx(slope(direction), rel=1e-6, abs=1e-7)


def test_no_tensor_is_without_gradient_but_the_key_bias():
    model = make_model()
    gradients = model.parameters.views(gradients_of(model, make_batch(model))[2])
    for name, gradient in gradients.items():
        if name.endswith("c_attn.bias"):
            query, key, value = np.split(gradient, 3)
            assert query.all()
            assert value.all()
            np.testing.assert_array_equal(key, 0.0)
        else:
            assert gradient.any(), name


@TIED
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_added(tied, dropout):
    model = make_model(tie_embeddings=tied, dropout=dropout)
    batch = make_batch(model)
    gradients = np.random.default_rng(5).standard_normal(model.parameters.size)
    before = gradients.copy()
    model.loss_and_gradients(batch, gradients)
    close(gradients - before, gradients_of(model, batch)[2], rtol=1e-9, atol=1e-10)


def test_padding_gets_no_gradient():
    model = make_model()
    gradients = gradients_of(model, make_batch(model))[2]
    for view in model.parameters.views(gradients).values():
        view[...] = 0.0
    assert not gradients.any()


def test_ignored_targets_count_for_nothing():
    model = make_model()
    batch = make_batch(model)
    nothing = batch._replace(targets=np.full_like(batch.targets, IGNORED_TARGET))
    assert model.loss(nothing) == (0.0, 0)
    loss, n_tokens, gradients = gradients_of(model, nothing)
    assert (loss, n_tokens) == (0.0, 0)
    assert not gradients.any()


def test_a_batch_without_sequences_has_zero_weight():
    model = make_model()
    batch = some_of(make_batch(model))
    assert model.loss(batch) == (0.0, 0)
    loss, n_tokens, gradients = gradients_of(model, batch)
    assert (loss, n_tokens) == (0.0, 0)
    assert not gradients.any()


# Cut in other ways.


@TIED
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_head_in_chunks_equals_the_whole(monkeypatch, tied, rows):
    whole = make_model(tie_embeddings=tied)
    batch = make_batch(whole)
    loss, n_tokens, gradients = gradients_of(whole, batch)
    monkeypatch.setattr(workspace, "LOGITS_BUFFER_ELEMENTS", rows * V)
    chunked = make_model(tie_embeddings=tied)
    chunked_loss, chunked_tokens, chunked_gradients = gradients_of(chunked, batch)
    assert chunked._workspace.buffers["logits"].shape == (rows, V)
    assert (chunked_loss, chunked_tokens) == (pytest.approx(loss, rel=1e-12), n_tokens)
    assert chunked.loss(batch)[0] == pytest.approx(loss, rel=1e-12)
    close(chunked_gradients, gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_micro_batches_do_not_matter(size, dropout):
    whole, cut = make_model(dropout=dropout), make_model(dropout=dropout, micro_batch_size=size)
    batch = make_batch(whole, 5)
    loss, n_tokens, gradients = gradients_of(whole, batch)
    cut_loss, cut_tokens, cut_gradients = gradients_of(cut, batch)
    assert (cut_loss, cut_tokens) == (pytest.approx(loss, rel=1e-12), n_tokens)
    assert cut.loss(batch) == (pytest.approx(whole.loss(batch)[0], rel=1e-12), n_tokens)
    close(cut_gradients, gradients)
    close(logits_of(cut, batch), logits_of(whole, batch))


def test_the_workspace_may_be_used_in_any_order_of_shapes():
    model = make_model(dropout=0.3)
    for sequences, length in [(1, 3), (4, CONTEXT), (4, 2), (4, CONTEXT), (2, 1), (1, CONTEXT)]:
        batch = make_batch(model, sequences, length)
        loss, n_tokens, gradients = gradients_of(model, batch)
        fresh_loss, fresh_tokens, fresh_gradients = gradients_of(make_model(dropout=0.3), batch)
        assert (loss, n_tokens) == (fresh_loss, fresh_tokens)
        np.testing.assert_array_equal(gradients, fresh_gradients)


@pytest.mark.parametrize("parts", [[[0, 1], [2]], [[2], [0], [1]], [[1, 2, 0]]])
def test_dropout_does_not_depend_on_the_batch(parts):
    model = make_model(dropout=0.3)
    batch = make_batch(model)
    loss, n_tokens, gradients = gradients_of(model, batch)
    results = [gradients_of(model, some_of(batch, *part)) for part in parts]
    assert sum(result[0] for result in results) == pytest.approx(loss, rel=1e-12)
    assert sum(result[1] for result in results) == n_tokens
    close(sum(result[2] for result in results), gradients)


@pytest.mark.parametrize("change", [{"sequence_ids": np.arange(3)}, {"seed": 43}, {"step": 7}])
def test_dropout_depends_on_seed_step_and_sequence(change):
    model = make_model(dropout=0.3)
    batch = make_batch(model)
    other = batch._replace(**change)
    assert gradients_of(model, batch)[0] != gradients_of(model, other)[0]
    assert model.loss(batch) == model.loss(other)  # evaluation drops nothing


def test_is_bitwise_deterministic():
    results = [gradients_of(model, make_batch(model)) for model in (make_model(), make_model())]
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][2], results[1][2])


# float32.


@pytest.mark.parametrize("name", sorted({load_kernels("numpy").name, load_kernels("auto").name}))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_float32_agrees_with_float64(name, dropout):
    double = make_model(dropout=dropout)
    single = make_model(dtype=np.float32, kernels=load_kernels(name), dropout=dropout)
    batch = make_batch(double)
    expected_loss, _, expected = gradients_of(double, batch)
    loss, _, gradients = gradients_of(single, batch)
    assert gradients.dtype == np.float32
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(gradients, expected, rtol=1e-3, atol=1e-4)


# The symmetry table.


@TIED
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_symmetry_table_changes_nothing(tied, dropout):
    """Rows are permuted, the model is the same: loss, gradients and logits by token."""
    plain = make_model(np.zeros(V, np.uint8), tie_embeddings=tied, dropout=dropout)
    np.testing.assert_array_equal(plain.parameters.symmetry.row_of_token, np.arange(V))
    loss, n_tokens, gradients = gradients_of(plain, make_batch(plain))
    logits = logits_of(plain, make_batch(plain))
    for table in (None, TABLE, np.arange(V, dtype=np.uint8)[::-1] % ORDER):
        model = make_model(table, tie_embeddings=tied, dropout=dropout)
        batch = make_batch(model)
        result = gradients_of(model, batch)
        assert result[:2] == (pytest.approx(loss, rel=1e-12), n_tokens)
        expected = plain.parameters.tensors_in_token_order(gradients)
        actual = model.parameters.tensors_in_token_order(result[2])
        for name in expected:
            close(actual[name], expected[name])
        close(logits_of(model, batch), logits)


@TIED
def test_token_order_round_trip(tied):
    model = make_model(tie_embeddings=tied)
    tensors = model.parameters.tensors_in_token_order(model.parameters.vector)
    assert list(tensors) == [spec.name for spec in model.parameters.specs]
    rows = model.parameters.symmetry.row_of_token
    assert (rows != np.arange(V)).any()
    for spec in model.parameters.specs:
        expected = model.parameters[spec.name]
        np.testing.assert_array_equal(tensors[spec.name], expected[rows] if spec.symmetry_rows else expected)
        assert not np.shares_memory(tensors[spec.name], model.parameters.vector)
    loaded = model.parameters.new_vector()
    model.parameters.load_token_order(tensors, loaded)
    np.testing.assert_array_equal(loaded, model.parameters.vector)


def test_tensors_that_do_not_fit_are_refused():
    model = make_model()
    tensors = model.parameters.tensors_in_token_order(model.parameters.vector)
    wrong = tensors | {"wpe.weight": np.zeros((CONTEXT + 1, 6))}
    with pytest.raises(DamagedFile, match=r"tensors do not fit the model's settings: wpe\.weight"):
        model.parameters.load_token_order(wrong, model.parameters.new_vector())
    del tensors["ln_f.bias"]
    with pytest.raises(DamagedFile, match=r"ln_f\.bias"):
        model.parameters.load_token_order(tensors, model.parameters.new_vector())


# Initialisation.


def initialized(symmetry_group=None, seed=1, **changes):
    model = make_gpt2(make_config(**changes), symmetry_group)
    FAMILY.initialize(model, seed)
    return model


@TIED
def test_initialisation_does_not_depend_on_the_table(tied):
    models = [initialized(table, tie_embeddings=tied) for table in (None, TABLE, np.zeros(V, np.uint8))]
    tensors = [model.parameters.tensors_in_token_order(model.parameters.vector) for model in models]
    for a, b in itertools.pairwise(tensors):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_initialisation_is_gpt2s():
    model = initialized(n_embd=96, n_layer=3, vocab_size=200, context_length=100)
    seen = []
    for spec in model.parameters.specs:
        tensor = model.parameters[spec.name]
        if spec.name.endswith("bias"):
            np.testing.assert_array_equal(tensor, 0.0)
        elif len(spec.shape) == 1:
            np.testing.assert_array_equal(tensor, 1.0)
        else:
            deviation = 0.02 / sqrt(2 * 3) if spec.name.endswith("c_proj.weight") else 0.02
            assert tensor.std() == pytest.approx(deviation, rel=5 / sqrt(2 * spec.size))
            assert abs(tensor.mean()) < 5 * deviation / sqrt(spec.size)
            assert (abs(tensor) < deviation).mean() == pytest.approx(erf(sqrt(0.5)), abs=0.03)
            seen.append(tensor.ravel()[:50])
    for a, b in itertools.combinations(seen, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.75  # no two tensors are the same draw


def test_the_seed_decides():
    first, again, other = initialized(seed=1), initialized(seed=1), initialized(seed=2)
    np.testing.assert_array_equal(first.parameters.vector, again.parameters.vector)
    assert (first.parameters["wte.weight"] != other.parameters["wte.weight"]).all()


@TIED
def test_the_first_loss_is_close_to_that_of_guessing(tied):
    model = initialized(vocab_size=65, context_length=32, n_embd=48, tie_embeddings=tied)
    tokens = np.random.default_rng(0).integers(0, 65, (8, 33)).astype(np.int32)
    loss, n_tokens = model.loss(Batch(tokens[:, :-1], tokens[:, 1:], np.arange(8), 0, 0))
    assert n_tokens == 256
    assert loss / n_tokens == pytest.approx(log(65), abs=0.05)


# The layout, and arithmetic without a model.


@TIED
def test_tensors_have_hugging_face_names_and_shapes(tied):
    expected = {"wte.weight": (V, 6), "wpe.weight": (CONTEXT, 6), "ln_f.weight": (6,), "ln_f.bias": (6,)}
    if not tied:
        expected["lm_head.weight"] = (V, 6)
    for layer in range(2):
        for name, shape in (("attn.c_attn", (6, 18)), ("attn.c_proj", (6, 6)), ("mlp.c_fc", (6, 24))):
            expected[f"h.{layer}.{name}.weight"], expected[f"h.{layer}.{name}.bias"] = shape, shape[1:]
        expected[f"h.{layer}.mlp.c_proj.weight"], expected[f"h.{layer}.mlp.c_proj.bias"] = (24, 6), (6,)
        for name in ("ln_1", "ln_2"):
            expected[f"h.{layer}.{name}.weight"] = expected[f"h.{layer}.{name}.bias"] = (6,)
    specs = gpt2_specs(make_config(tie_embeddings=tied))
    assert {spec.name: spec.shape for spec in specs} == expected
    tables = {spec.name for spec in specs if spec.symmetry_rows}
    assert tables == {"wte.weight", "lm_head.weight"} & set(expected)


@pytest.mark.parametrize(("width", "heads", "advice"), [(50, 4, "use 48 or 52"), (2, 4, "use 4")])
def test_heads_must_divide_the_width(width, heads, advice):
    with pytest.raises(UsageError, match=f"not a multiple of model.n_head = {heads}: {advice}"):
        specs_of(FAMILY, make_config(n_embd=width, n_head=heads))


@TIED
def test_decay_is_two_runs(tied):
    specs = gpt2_specs(make_config(tie_embeddings=tied))
    assert all(spec.decay == (len(spec.shape) == 2) for spec in specs)
    assert [decay for _, _, decay in ParameterLayout(specs).decay_ranges()] == [True, False]


def test_gpt2_has_124_million_parameters():
    config = ModelConfig(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, n_embd=768)
    assert ParameterLayout(gpt2_specs(config)).count == 124_439_808


def test_flops_are_those_of_the_products():
    """6 per weight of a matrix that multiplies, and 12 L C T for attention."""
    width, layers = 6, 2
    matrices = layers * 12 * width**2 + V * width
    for tied in (True, False):
        flops = flops_per_token(make_config(tie_embeddings=tied))
        assert flops == 6 * matrices + 12 * layers * width * CONTEXT


@pytest.mark.parametrize("context_length", [1, 64, 256, 100_000])
def test_the_automatic_micro_batch(context_length):
    config = make_config(context_length=context_length)
    assert micro_batch_sequences(config) == max(1, 512 // context_length)
    assert micro_batch_sequences(config, 3) == 3


def allocated(action):
    """Bytes that are still held after ``action``, and its result."""
    tracemalloc.start()
    try:
        result = action()
        return tracemalloc.get_traced_memory()[0], result
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_who_never_computes_pays_nothing_and_who_does_what_was_planned(dropout):
    config = make_config(context_length=128, n_embd=48, dropout=dropout)
    vector_bytes = 4 * ParameterLayout(gpt2_specs(config)).size
    warm = np.zeros((4, 128), np.int32)  # scratch of the kernels is not the model's
    make_gpt2(config).loss_and_gradients(Batch(warm, warm, np.arange(4), 0, 0), np.zeros(vector_bytes // 4, "f4"))
    idle, model = allocated(lambda: make_gpt2(config, micro_batch_size=4))
    assert idle < 1.1 * vector_bytes + 100_000
    rows = np.zeros((4, 128), np.int32)
    batch, gradients = Batch(rows, rows, np.arange(4), 0, 0), model.parameters.new_vector()
    busy, _ = allocated(lambda: model.loss_and_gradients(batch, gradients))
    assert busy == pytest.approx(activation_bytes(config, 4), rel=0.05)
    again, _ = allocated(lambda: model.loss_and_gradients(batch, gradients))
    assert again < 0.01 * busy  # allocated once
