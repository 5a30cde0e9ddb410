"""The cached decoder equals a forward pass over the window, also past the context."""

import numpy as np
import pytest

from hiermpi.config.schema import ModelConfig
from hiermpi.model.decoder import Decoder, Sampling, generate, sample
from hiermpi.model.transformer import Transformer


@pytest.fixture(params=[True, False])
def model(request):
    config = ModelConfig(
        vocab_size=29, context_length=9, n_layer=2, n_head=3, n_embd=12, tie_embeddings=request.param
    )
    model = Transformer(config, dtype=np.float64)
    model.initialize(3)
    for spec in model.parameters.specs:  # far from the initial values, where everything matters
        model.parameters[spec.name][...] += 0.3 * np.random.default_rng(1).standard_normal(spec.shape)
    return model


def uncached(model, tokens):
    window = np.array(tokens[-model.config.context_length :])
    return model.logits(model.symmetry.row_of_token[window][None].astype(np.int32))[0, -1]


def test_equal_to_the_uncached_path(model):
    tokens = [3, 1, 4]
    decoder = Decoder(model)
    logits = decoder.extend(tokens)
    for token in np.random.default_rng(0).integers(0, 29, 20):
        assert np.allclose(logits, uncached(model, tokens), rtol=1e-9, atol=1e-9)
        tokens.append(int(token))
        logits = decoder.extend([int(token)])


def test_a_long_prompt_keeps_its_end(model):
    tokens = list(range(25))
    assert np.allclose(Decoder(model).extend(tokens), uncached(model, tokens), rtol=1e-9, atol=1e-9)


def test_same_seed_same_tokens(model):
    one, two, other = (list(generate(model, [1], 15, seed, Sampling())) for seed in (5, 5, 6))
    assert one == two != other
    greedy = list(generate(model, [1], 5, 0, Sampling(temperature=0.0)))
    assert greedy == list(generate(model, [1], 5, 9, Sampling(temperature=0.0)))


def test_sampling_follows_the_distribution():
    generator = np.random.default_rng(0)
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    counts = np.bincount([sample(logits, generator, Sampling()) for _ in range(4000)], minlength=4)
    assert np.allclose(counts / 4000, [0.1, 0.2, 0.3, 0.4], atol=0.03)
    among_two = {sample(logits, generator, Sampling(top_k=2)) for _ in range(100)}
    assert among_two == {2, 3}
    assert sample(logits, generator, Sampling(temperature=0.0)) == 3
    assert {sample(logits, generator, Sampling(top_p=0.65)) for _ in range(200)} == {2, 3}
    assert {sample(logits, generator, Sampling(top_p=0.75)) for _ in range(200)} == {1, 2, 3}
    assert {sample(logits, generator, Sampling(top_p=1e-9)) for _ in range(20)} == {3}
    hot = np.bincount([sample(logits, generator, Sampling(temperature=2.0)) for _ in range(4000)], minlength=4)
    expected = np.sqrt([0.1, 0.2, 0.3, 0.4])
    assert np.allclose(hot / 4000, expected / expected.sum(), atol=0.03)


def test_spare_rows_are_never_chosen(model):
    assert max(generate(model, [1], 40, 0, Sampling(temperature=50.0), vocab_size=4)) < 4
