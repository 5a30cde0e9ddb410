"""The cached decoder equals a forward pass over the window, also past the context."""

import numpy as np
import pytest

from hiermpi.config.schema import ModelConfig
from hiermpi.errors import UserError
from hiermpi.model.generation import Sampling, WindowDecoder, generate, make_decoder, sample, token_logits
from hiermpi.model.gpt2 import FAMILY, GPT2Decoder, make_gpt2


@pytest.fixture(params=[True, False])
def model(request):
    config = ModelConfig(
        vocab_size=29, context_length=9, n_layer=2, n_head=3, n_embd=12, tie_embeddings=request.param
    )
    model = make_gpt2(config, dtype=np.float64)
    FAMILY.initialize(model, 3)
    for spec in model.parameters.specs:  # far from the initial values, where everything matters
        model.parameters[spec.name][...] += 0.3 * np.random.default_rng(1).standard_normal(spec.shape)
    return model


def uncached(model, tokens):
    window = np.array(tokens[-model.config.context_length :])
    return token_logits(model, window[None])[0, -1]


def extend(decoder, model, tokens):
    """Logits in token order after more token ids."""
    row_of_token = model.parameters.row_of_token
    return decoder.extend(row_of_token[np.array(tokens)])[row_of_token]


@pytest.mark.parametrize("kind", ["cached", "window"])
def test_equal_to_the_uncached_path(model, kind):
    tokens = [3, 1, 4]
    decoder = make_decoder(model, 9) if kind == "cached" else WindowDecoder(model, 9)
    assert isinstance(decoder, GPT2Decoder if kind == "cached" else WindowDecoder)
    logits = extend(decoder, model, tokens)
    for token in np.random.default_rng(0).integers(0, 29, 20):
        assert np.allclose(logits, uncached(model, tokens), rtol=1e-9, atol=1e-9)
        tokens.append(int(token))
        logits = extend(decoder, model, [int(token)])


def test_a_long_prompt_keeps_its_end(model):
    tokens = list(range(25))
    assert np.allclose(extend(make_decoder(model, 9), model, tokens), uncached(model, tokens), rtol=1e-9, atol=1e-9)


def test_a_model_without_logits_is_refused(model):
    with pytest.raises(UserError, match="gives no logits"):
        make_decoder(object(), 9)


def test_training_and_decoding_compute_the_same_in_float32():
    config = ModelConfig(vocab_size=29, context_length=9, n_layer=2, n_head=3, n_embd=12)
    model = make_gpt2(config)
    FAMILY.initialize(model, 3)
    decoder, tokens = make_decoder(model, 9), [3, 1, 4, 1, 5]
    assert np.allclose(extend(decoder, model, tokens), uncached(model, tokens), rtol=1e-5, atol=1e-6)


def test_same_seed_same_tokens(model):
    one, two, other = (list(generate(model, [1], 15, seed, Sampling(), 9)) for seed in (5, 5, 6))
    assert one == two != other
    greedy = list(generate(model, [1], 5, 0, Sampling(temperature=0.0), 9))
    assert greedy == list(generate(model, [1], 5, 9, Sampling(temperature=0.0), 9))


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
    assert max(generate(model, [1], 40, 0, Sampling(temperature=50.0), 9, vocab_size=4)) < 4
