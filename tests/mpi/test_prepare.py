"""prepare on ranks: the same file as on one; an error ends all."""

import pytest

from hiermpi.cli import parse
from hiermpi.commands.files import prepare_together, run_prepare
from hiermpi.errors import UserError
from hiermpi.preparation import preparing


@pytest.mark.mpi
@pytest.mark.parametrize("options", [("--tokenizer", "bpe", "--vocab-size", "300"), ("--tokenizer", "chars"), ()])
def test_the_same_dataset_as_alone(world, shared_folder, monkeypatch, options):
    monkeypatch.setattr(preparing, "BYTES_AT_ONCE", 1000)
    text = shared_folder / "text.txt"
    if world.rank == 0:
        text.write_text("".join(f"line {i} of {i * i} lines, ä\n" for i in range(3000)))
    words = ["prepare", str(text), "--out"]
    prepare_together(parse([*words, str(shared_folder / "many.h5"), *options]), world)
    if world.rank == 0:
        run_prepare(parse([*words, str(shared_folder / "one.h5"), *options]))
        assert (shared_folder / "many.h5").read_bytes() == (shared_folder / "one.h5").read_bytes()


@pytest.mark.mpi
def test_an_error_is_raised_on_all(world, shared_folder):
    text = shared_folder / "text.txt"
    if world.rank == 0:
        text.write_text("caf\xe9 " * 100)
        with open(text, "ab") as file:
            file.write(b"\xff" * 10)
    words = parse(["prepare", str(text), "--out", str(shared_folder / "d.h5"), "--tokenizer", "chars"])
    with pytest.raises(UserError, match="is not UTF-8"):
        prepare_together(words, world)
