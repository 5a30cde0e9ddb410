"""The documentation: its commands run, its examples work, and what it names exists."""

import gzip
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from launch import BIN, environment

import hiermpi
from hiermpi.cli import build_parser
from hiermpi.config.loading import presets
from hiermpi.config.registry import COMMANDS
from hiermpi.config.schema import Config, flatten
from runs import TEXT

ROOT = Path(hiermpi.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = (
    *("--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "24", "--model.context_length", "16"),
    *("--train.batch_size", "26", "--train.micro_batch_size", "2", "--train.steps", "4"),
    *("--train.eval_interval", "0", "--train.eval_batches", "1"),
)
NOT_RUN = {
    "gpt2": "needs GPT-2's weights",
    "mine-hf": "is run by the tests of the interchange",
    "bench": "takes as long as it takes to measure",
    "plan --ranks": "runs in the tests of planning",
}
MOST_RANKS = 3


def commands_of(page):
    """The commands that a page shows in indented blocks, without their comments."""
    for line in page.read_text().splitlines():
        words = re.sub(r"\s{2,}(#|\().*$", "", line)
        if re.match(r"    (hiermpi|mpirun|python|HIERMPI_FAULT)", words):
            yield words.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a corpus, a dataset, a run, and the example files of all pages."""
    found = tmp_path_factory.mktemp("docs")
    (found / "my-texts").mkdir()
    (found / "my-texts" / "a.txt").write_text(TEXT)
    (found / "my-texts" / "b.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    for page in PAGES:
        for name, body in re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", page.read_text(), re.DOTALL):
            path = found / name
            path.write_text(body)
    for words in ("prepare my-texts --out data.h5", f"train --data data.h5 --run runs/mine {' '.join(SMALL)}"):
        finish(found, [str(BIN / "hiermpi"), *words.split()])
    return found


def finish(folder, words):
    result = subprocess.run(
        words, cwd=folder, env=environment(), text=True, capture_output=True, timeout=100, check=False
    )
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def runnable(page, command):
    """The words to run for a command of a page, small enough for a test."""
    shell = [word.strip('"') for word in re.findall(r"\"[^\"]*\"|\S+", command)]
    words = []
    while shell:
        word = shell.pop(0)
        if word == "mpirun":
            assert shell.pop(0) == "-n"
            words += [str(BIN / "mpiexec"), "-n", str(min(int(shell.pop(0)), MOST_RANKS))]
        else:
            words.append({"hiermpi": str(BIN / "hiermpi"), "python": sys.executable}.get(word, word))
    if "train" in words:
        words += SMALL
        words[words.index("--run") + 1] += f"-{zlib.crc32(repr((page, command)).encode())}"  # a run of its own
    if "prepare" in words:
        words[words.index("--out") + 1] += f"-{zlib.crc32(repr((page, command)).encode())}"
    if "--vocab-size" in words:
        words[words.index("--vocab-size") + 1] = "300"
    return words


SHOWN = [(page, command) for command, page in {c: p for p in reversed(PAGES) for c in commands_of(p)}.items()]
"""Each command once, on the first page that shows it."""


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{page.stem}: {command[:60]}" for page, command in SHOWN])
def test_commands_run(folder, page, command):
    for words, reason in NOT_RUN.items():
        if words in command:
            pytest.skip(reason)
    if "HIERMPI_FAULT" in command:
        pytest.skip("ends its job on purpose; the tests of faults run it")
    words = runnable(page, command)
    for earlier in re.findall(r"runs/(?!mine)\w+", command) if "train" not in words else ():
        if not (folder / earlier).exists():  # made by the command above it, under a name of its own
            made = [other for other in commands_of(page) if f"--run {earlier} " in f"{other} "]
            small = runnable(page, made[0]) if made else []
            if small:
                small[small.index("--run") + 1] = earlier
                finish(folder, small)
    finish(folder, words)


def test_an_example_file_of_each_plugin_page_is_run():
    pages = [page for page in PAGES if page.stem.startswith("own-")]
    assert len(pages) == 7
    for page in pages:
        names = re.findall(r"```python\n# (my_\w+)\.py\n", page.read_text())
        assert len(names) == 1
        assert any(names[0] in command for command in commands_of(page)), page


@pytest.mark.parametrize("name", ["own-model", "own-optimizer", "own-routing", "own-reduction"])
def test_plugins_of_the_pages_give_the_same_bits_on_any_ranks(folder, name):
    page = ROOT / "docs" / f"{name}.md"
    words = runnable(page, next(command for command in commands_of(page) if "train" in command))
    place = words.index("--run") + 1
    words += ["--hierarchy.reproducible", "true"]
    runs = []
    for ranks in (1, 3):
        words[words.index("-n") + 1], words[place] = str(ranks), f"runs/{name}-{ranks}"
        finish(folder, words)
        runs.append(words[place])
    assert "the same parameters" in finish(folder, [str(BIN / "hiermpi"), "verify", *runs, "--digest"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:`|    )make ([a-z][a-z-]*[a-z])", text):
        assert target in targets, f"make {target}"
    for path in re.findall(r"`((?:hiermpi|tests|jobs|examples|docs)/[\w./-]+)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    shown = [*re.findall(r"`(hiermpi [^`\n]*)`", text), *commands_of(page)]
    for name in re.findall(r"hiermpi ([a-z]\w+)", "\n".join(shown)):
        assert name in tuple(COMMANDS), name
    for name in re.findall(r"--config ([a-z][\w-]+)", text):
        assert name in presets(), name
    settings = flatten(Config())
    flags = re.findall(r"--((?:model|train|optimizer|hierarchy|lattice|checkpoint|run)\.\w+)", text)
    for name in [*flags, *re.findall(r"`((?:hierarchy|lattice|checkpoint)\.\w+)", text)]:
        assert name in settings, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_exist(page):
    known = {
        word
        for action in build_parser()._subparsers._group_actions[0].choices.values()
        for word in action._option_string_actions
    }
    for command in commands_of(page):
        if "hiermpi" in command:
            for flag in re.findall(r"(?<!\S)--[\w.-]+", command):
                assert flag in known, f"{flag} in {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        if "reference/" in path:
            continue  # generated when the site is built, which checks the link
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_reference_has_every_setting_and_command(tmp_path):
    shutil.copy(ROOT / "docs" / "generate.py", tmp_path)
    finish(tmp_path, [sys.executable, "generate.py"])
    settings = (tmp_path / "reference" / "settings.md").read_text()
    assert all(f"`{name}`" in settings for name in flatten(Config()))
    commands = (tmp_path / "reference" / "commands.md").read_text()
    assert all(f"## {name}\n" in commands for name in COMMANDS)
