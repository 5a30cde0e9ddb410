"""Datasets are checked before they are trusted."""

import numpy as np
import pytest

from hiermpi.errors import DamagedFile
from hiermpi.storage import dataset as module
from hiermpi.storage.container import build_image, open_container, write_image
from hiermpi.storage.dataset import open_dataset, token_dtype
from runs import make_dataset


@pytest.fixture
def path(tmp_path):
    return make_dataset(tmp_path, "hello world, " * 300)


def altered(path, **changes):
    """The dataset at ``path`` with some parts replaced, behind a right digest."""

    def fill(out):
        with open_container(path, "dataset") as good:
            parts = {name: good.file[name][:] for name in ("train/tokens", "val/tokens", "symmetry_group", "counts")}
            attributes = dict(good.file.attrs)
        for name, value in changes.items():
            (attributes if name in attributes else parts)[name.replace("__", "/")] = value
        for name, value in parts.items():
            out.create_dataset(name, data=value)
        for name, value in attributes.items():
            out.attrs[name] = value

    write_image(path, build_image("dataset", fill))
    return path


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_reading(path, monkeypatch, limit):
    monkeypatch.setattr(module, "IN_MEMORY_LIMIT", limit)
    data = open_dataset(path)
    text = ("hello world, " * 300).encode()
    cut = int(len(text) * 0.9)
    assert (data.length("train"), data.length("val")) == (cut, len(text) - cut)
    assert (data.bytes, data.train_bytes, data.val_bytes) == (len(text), cut, len(text) - cut)
    rows = data.read("train", np.array([0, 13, 5]), 4)
    assert rows.dtype == np.int32
    assert [bytes(row.astype(np.uint8)) for row in rows] == [b"hell", b"hell", b" wor"]
    assert data.counts.sum() == len(text)
    assert (data.symmetry_group == np.arange(256) % 12).all()
    data.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__tokens": np.array([1, 2, 256], np.uint16)}, "token 2 of train is 256, but vocab_size is 256"),
        ({"val__tokens": np.array([[1, 2]], np.uint16)}, "val/tokens has the shape"),
        ({"val__tokens": np.array([1, -2], np.int32)}, "val/tokens holds int32"),
        ({"symmetry_group": np.full(256, 12, np.uint8)}, "out of range"),
        ({"symmetry_group": np.zeros(255, np.uint8)}, "must have vocab_size = 256 entries"),
        ({"counts": np.full(256, -1)}, "out of range"),
        ({"vocab_size": 255}, "255"),
        ({"vocab_size": 0}, "not usable"),
        ({"symmetry_order": 0}, "not usable"),
        ({"tokenizer": '{"kind": "spells"}'}, "tokenizer"),
        ({"tokenizer": "["}, "tokenizer"),
        ({"tokenizer": '{"kind": "chars", "characters": "ab"}'}, "tokenizer"),
    ],
)
def test_wrong_content_is_refused(path, changes, words):
    with pytest.raises(DamagedFile, match=words):
        open_dataset(altered(path, **changes))


def test_token_types():
    assert token_dtype(256) == token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32
