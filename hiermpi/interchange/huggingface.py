"""The format of a folder that ``transformers`` opens as GPT-2: config.json, model.safetensors, tokenizer.json.

The tensors of hiermpi have GPT-2's names and orientation (x @ W) already; only a prefix differs.
"""

import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hiermpi.config.schema import ModelConfig
from hiermpi.data.tokenizers import (
    BpeTokenizer,
    BytesTokenizer,
    CharsTokenizer,
    NoTokenizer,
    Tokenizer,
    byte_alphabet,
    tokenizer_from_json,
)
from hiermpi.errors import UserError
from hiermpi.interchange.exchange import fitted, imported
from hiermpi.interchange.plain import load_tensors, save_tensors
from hiermpi.kernels.layers import NORM_EPSILON
from hiermpi.storage.checkpoint import Checkpoint, model_config

CONFIG_FILE = "config.json"
FAMILY = "gpt2"
PREFIX = "transformer."
NOT_PARAMETERS = (".attn.bias", ".attn.masked_bias")
"""The endings of buffers that old versions of transformers saved beside the parameters."""
GELUS = ("gelu_new", "gelu_pytorch_tanh")
LARGEST_JSON = 1 << 26


class HuggingFace:
    """The format of a folder of ``transformers``."""

    suffix = ""
    file_names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")

    def write(self, folder: Path, checkpoint: Checkpoint) -> None:
        write_huggingface(folder, checkpoint)

    def accepts(self, source: Path) -> bool:
        return source.is_dir() and (source / CONFIG_FILE).exists()

    def read(self, source: Path) -> Checkpoint:
        return read_huggingface(source)


FORMAT = HuggingFace()


def write_huggingface(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the model into ``folder``. Raises UserError for a family whose layout transformers does not have."""
    config = model_config(checkpoint)
    if config.family != FAMILY:
        raise UserError(f"the model's family is {config.family}, and --format hf has only {FAMILY}: use safetensors")
    tokenizer = tokenizer_from_json(checkpoint.tokenizer)
    write_json(
        folder / CONFIG_FILE,
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.context_length,
            "n_ctx": config.context_length,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "activation_function": GELUS[0],
            "layer_norm_epsilon": NORM_EPSILON,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "tie_word_embeddings": config.tie_embeddings,
            "scale_attn_weights": True,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "dtype": "float32",
        },
    )
    tensors = {name if name.startswith("lm_head") else PREFIX + name: t for name, t in checkpoint.parameters.items()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    described = tokenizer_to_json(tokenizer)
    if described is not None:
        write_json(folder / "tokenizer.json", described)
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": config.context_length,
                "clean_up_tokenization_spaces": False,
            },
        )


def read_huggingface(folder: Path) -> Checkpoint:
    """Read the model in ``folder``. Raises UserError."""
    config = read_config(folder / CONFIG_FILE)
    found = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in read_shards(folder).items()
        if not name.endswith(NOT_PARAMETERS)
    }
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)
    return imported(config, fitted(config, found, str(folder)), read_tokenizer(folder, config.vocab_size))


def read_config(path: Path) -> ModelConfig:
    """Return the model's shape. Raises UserError, which names the field, where it is not a GPT-2 of the usual kind."""
    described = read_json(path)
    required = {
        "model_type": ("gpt2",),
        "activation_function": GELUS,
        "layer_norm_epsilon": (NORM_EPSILON,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "n_inner": (None, 4 * described["n_embd"] if isinstance(described.get("n_embd"), int) else None),
    }
    for name, allowed in required.items():
        if described.get(name, allowed[0]) not in allowed or (name == "model_type" and name not in described):
            raise UserError(f"{path}: {name} = {described.get(name)}, but hiermpi has only {allowed[0]}")
    sizes: dict[str, Any] = {}
    for ours, theirs in (
        ("vocab_size", "vocab_size"),
        ("context_length", "n_positions"),
        ("n_layer", "n_layer"),
        ("n_head", "n_head"),
        ("n_embd", "n_embd"),
    ):
        value = described.get(theirs)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}: {theirs} = {value}: expected a whole number of at least 1")
        sizes[ours] = value
    try:
        return ModelConfig(**sizes, tie_embeddings=bool(described.get("tie_word_embeddings", True)))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def read_shards(folder: Path) -> dict[str, NDArray]:
    """Read all tensors from the folder's safetensors file, or from several with an index. Raises UserError."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        path = folder / "model.safetensors"
        if not path.exists() and list(folder.glob("*.bin")):
            raise UserError(
                f"{folder} holds pickled weights (.bin), which can run code: save them as safetensors with "
                "model.save_pretrained first"
            )
        return load_tensors(path)[0]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise UserError(f"{index}: weight_map is not a table of file names: download it again")
    tensors: dict[str, NDArray] = {}
    for name in sorted(set(names.values())):
        tensors.update(load_tensors(folder / name)[0])
    return tensors


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Read the tokenizer of the folder, where it is one that hiermpi has. Raises UserError."""
    described: dict[str, Any] = {}
    if (folder / "tokenizer.json").exists():
        described = read_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        text = (folder / "merges.txt").read_text(encoding="utf-8")
        merges = [line.split(" ") for line in text.splitlines() if line and not line.startswith("#version")]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False}
        model = {"type": "BPE", "vocab": read_json(folder / "vocab.json"), "merges": merges}
        described = {"model": model, "pre_tokenizer": byte_level}
    found = tokenizer_from_parts(described)
    return found if found is not None and found.vocab_size <= vocab_size else NoTokenizer(vocab_size)


def tokenizer_to_json(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the content of tokenizer.json, or None where there is no tokenizer."""
    byte_level: dict[str, Any] | None = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": True,
    }
    merges: list[tuple[str, str]] = []
    decoder: dict[str, Any] | None = byte_level
    if isinstance(tokenizer, BpeTokenizer):
        tokens, merges = tokenizer.vocabulary, tokenizer.merges
    elif isinstance(tokenizer, BytesTokenizer):
        tokens = list(byte_alphabet())
    elif isinstance(tokenizer, CharsTokenizer):
        tokens, byte_level, decoder = list(tokenizer.characters), None, {"type": "Fuse"}
    else:
        return None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def tokenizer_from_parts(described: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer that a tokenizer.json describes, or None where hiermpi has none like it."""
    try:
        model, before = described["model"], described.get("pre_tokenizer") or {}
        ids = {**model["vocab"], **{token["content"]: token["id"] for token in described.get("added_tokens") or ()}}
        tokens = sorted(ids, key=ids.__getitem__)
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        if (
            model["type"] != "BPE"
            or described.get("normalizer")
            or model.get("byte_fallback")
            or sorted(ids.values()) != list(range(len(ids)))
        ):
            return None
        if not before and not merges and all(len(token) == 1 for token in tokens) and tokens == sorted(tokens):
            return CharsTokenizer("".join(tokens))
        if before["type"] != "ByteLevel" or before.get("add_prefix_space") or not before.get("use_regex", True):
            return None
        if tokens == list(byte_alphabet()) and not merges:
            return BytesTokenizer()
        return BpeTokenizer(tokens, merges)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises UserError."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is larger than {LARGEST_JSON >> 20} MiB: this is not a description of a model")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON: download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object to a file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
