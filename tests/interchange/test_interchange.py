"""Export and import: the same model comes back, other programs find what they expect, bad input is refused."""

import json

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from hiermpi.cli import main, parse
from hiermpi.commands.files import run_export, run_import
from hiermpi.config.schema import ModelConfig
from hiermpi.data.tokenizers import BytesTokenizer, CharsTokenizer, tokenizer_from_json, train_bpe
from hiermpi.errors import UsageError, UserError
from hiermpi.interchange.exchange import imported
from hiermpi.interchange.huggingface import tokenizer_from_parts, tokenizer_to_json
from hiermpi.model.generation import token_logits
from hiermpi.model.gpt2 import make_gpt2
from hiermpi.storage.checkpoint import load_checkpoint, parameters_digest, save_checkpoint
from hiermpi.training.opening import load_model

TEXT = "Grüße, 世界!  def f(x):\n    return x + 1\n\n"
TOKENIZERS = [BytesTokenizer(), CharsTokenizer("".join(sorted(set(TEXT)))), train_bpe([TEXT * 9], 290)]


def make(tokenizer, tied=True):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=16, n_layer=2, n_head=2, n_embd=8, tie_embeddings=tied
    )
    rng = np.random.default_rng(0)
    model = make_gpt2(config)
    tensors = {s.name: rng.standard_normal(s.shape).astype(np.float32) / 3 for s in model.parameters.specs}
    return imported(config, tensors, tokenizer)


def run(command, *words):
    names = {run_export: "export", run_import: "import"}
    assert command(parse([names[command], *map(str, words)])) == 0


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.h5"
    save_checkpoint(path, make(TOKENIZERS[0]))
    return path


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.kind)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "out"),
    [("hf", "x"), ("safetensors", "x"), ("safetensors", "x.safetensors"), ("npz", "x"), ("npz", "x.npz")],
)
def test_there_and_back(tmp_path, tokenizer, tied, kind, out):
    save_checkpoint(tmp_path / "a.h5", make(tokenizer, tied))
    run(run_export, tmp_path / "a.h5", "--out", tmp_path / out, "--format", kind)
    run(run_import, tmp_path / out, "--out", tmp_path / "b.h5")
    before, after = load_checkpoint(tmp_path / "a.h5"), load_checkpoint(tmp_path / "b.h5")
    assert parameters_digest(after) == parameters_digest(before)
    assert after.tokenizer == before.tokenizer
    assert after.config == before.config
    inputs = np.arange(12, dtype=np.int32)[None]
    assert np.array_equal(token_logits(load_model(before), inputs), token_logits(load_model(after), inputs))


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.kind)
def test_the_library_reads_our_tokenizer_json(tokenizer):
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_to_json(tokenizer)))
    found = library.encode(TEXT, add_special_tokens=False)
    assert found.ids == tokenizer.encode(TEXT.encode()).tolist()
    assert library.decode(found.ids) == TEXT
    assert tokenizer_from_parts(json.loads(library.to_str())).to_json() == tokenizer.to_json()


def test_the_names_that_transformers_expects(tmp_path, checkpoint):
    run(run_export, checkpoint, "--out", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (8, 24)
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias"} <= tensors.keys()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["n_positions"], config["activation_function"]) == ("gpt2", 16, "gelu_new")


def test_old_files_of_transformers_are_understood(tmp_path, checkpoint):
    """Without the prefix, with mask buffers and a tied output, in two shards of float16, with vocab.json."""
    run(run_export, checkpoint, "--out", tmp_path / "hf")
    folder = tmp_path / "hf"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["wte.weight"]
    tensors["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.float32)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for shard, chosen in (("one.safetensors", names[:9]), ("two.safetensors", names[9:])):
        save_file({name: tensors[name].astype(np.float16) for name in chosen}, folder / shard)
    where = {name: "one.safetensors" if name in names[:9] else "two.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    described = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(described["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    run(run_import, folder, "--out", tmp_path / "b.h5")
    again = load_checkpoint(tmp_path / "b.h5")
    assert tokenizer_from_json(again.tokenizer).kind == "bytes"
    for name, tensor in load_checkpoint(checkpoint).parameters.items():
        assert np.allclose(again.parameters[name], tensor, atol=1e-3)


def test_a_model_without_tokenizer_is_evaluated_by_ids(tmp_path, checkpoint, capsys):
    (tmp_path / "t.txt").write_text(TEXT * 50)
    assert main(["prepare", str(tmp_path / "t.txt"), "--out", str(tmp_path / "d.h5")]) == 0
    run(run_export, checkpoint, "--out", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    run(run_import, tmp_path / "hf", "--out", tmp_path / "b.h5")
    losses = []
    for path in (checkpoint, tmp_path / "b.h5"):
        capsys.readouterr()
        assert main(["evaluate", str(path), "--data", str(tmp_path / "d.h5"), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1]
    assert main(["generate", str(tmp_path / "b.h5"), "--prompt", "x"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type = llama"),
        ({"activation_function": "relu"}, "activation_function = relu"),
        ({"n_inner": 7}, "n_inner = 7"),
        ({"n_layer": 0}, "n_layer = 0"),
        ({"n_layer": 3}, "h.2.attn.c_attn.weight is missing"),
        ({"n_layer": 1}, "unknown tensors h.1"),
        ({"n_head": 3}, "not a multiple"),
        ({"vocab_size": 9}, "wte.weight is float32 of"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ],
)
def test_other_models_are_refused_by_the_field(tmp_path, checkpoint, change, words):
    run(run_export, checkpoint, "--out", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        run(run_import, tmp_path / "hf", "--out", tmp_path / "b.h5")
    assert words in str(caught.value)
    assert not (tmp_path / "b.h5").exists()


def test_damaged_files_are_refused(tmp_path, checkpoint):
    for kind in ("safetensors", "npz", "hf"):
        run(run_export, checkpoint, "--out", tmp_path / kind, "--format", kind)
        model = next((tmp_path / kind).glob("model.*"))
        good = model.read_bytes()
        for bad in (b"", good[:50], good[: len(good) // 2], b"\xff" * 100):
            model.write_bytes(bad)
            with pytest.raises(UserError, match="model"):
                run(run_import, tmp_path / kind, "--out", tmp_path / "b.h5")
        model.unlink()
        with pytest.raises(UserError):
            run(run_import, tmp_path / kind, "--out", tmp_path / "b.h5")
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled"):
        run(run_import, tmp_path / "hf", "--out", tmp_path / "b.h5")
    (tmp_path / "hf" / "config.json").write_text("[" * 99999)
    with pytest.raises(UserError, match="is not JSON"):
        run(run_import, tmp_path / "hf", "--out", tmp_path / "b.h5")
    with pytest.raises(UserError, match="does not exist"):
        run(run_import, tmp_path / "none", "--out", tmp_path / "b.h5")


def test_exports_replace_only_exports(tmp_path, checkpoint):
    run(run_export, checkpoint, "--out", tmp_path / "hf")
    with pytest.raises(UsageError, match="--force"):
        run(run_export, checkpoint, "--out", tmp_path / "hf")
    run(run_export, checkpoint, "--out", tmp_path / "hf", "--force", "--format", "npz")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["model.npz"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="other things"):
        run(run_export, checkpoint, "--out", tmp_path / "mine", "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mine", "model.h5"]


def test_transformers_computes_the_same(tmp_path):
    """Where transformers and torch are installed: their logits of our export, ours of their model."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make optional tries it")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: make optional tries it")
    save_checkpoint(tmp_path / "a.h5", make(TOKENIZERS[2]))
    run(run_export, tmp_path / "a.h5", "--out", tmp_path / "hf")
    inputs = np.arange(12)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours = load_model(load_checkpoint(tmp_path / "a.h5"))
    with torch.no_grad():
        wanted = theirs(torch.tensor(inputs)).logits.numpy()
    assert np.allclose(token_logits(ours, inputs), wanted, atol=1e-4)
    random = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_positions=16, n_embd=12, n_layer=2, n_head=3)
    ).eval()
    random.save_pretrained(tmp_path / "random")
    run(run_import, tmp_path / "random", "--out", tmp_path / "b.h5")
    ours = load_model(load_checkpoint(tmp_path / "b.h5"))
    with torch.no_grad():
        wanted = random(torch.tensor(inputs)).logits.numpy()
    assert np.allclose(token_logits(ours, inputs), wanted, atol=1e-4)
