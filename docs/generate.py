"""Write the reference pages from the code: settings from the schema, commands from the parser, the Python interface."""

import argparse
import inspect
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import hiermpi
from hiermpi.cli import build_parser
from hiermpi.config.loading import presets
from hiermpi.config.registry import COMMANDS
from hiermpi.config.schema import SECTIONS, Config, flatten


def settings() -> str:
    """Return the page of all settings."""
    defaults = flatten(Config())
    lines = [
        "# Settings",
        "",
        "Each setting is a key of the TOML file given with `--config`, a flag such as `--train.steps 500`, and an "
        "environment variable such as `HIERMPI_TRAIN__STEPS=500`. The command line beats the environment, which beats "
        "the file.",
        "",
        f"Shipped files, by name: {', '.join(f'`{name}`' for name in presets())}.",
    ]
    for section, kind in SECTIONS.items():
        lines += ["", f"## {section}", "", (kind.__doc__ or "").splitlines()[0], ""]
        lines += ["| setting | type | default | |", "|---|---|---|---|"]
        hints = get_type_hints(kind)
        for entry in fields(kind):
            hint = hints[entry.name]
            shown = getattr(hint, "__name__", str(hint)) if not hasattr(hint, "__args__") else str(hint)
            shown = shown.replace("typing.Literal", "").replace("|", "or")
            text = str(entry.metadata.get("help", "")).replace("|", "\\|")
            default = defaults.get(f"{section}.{entry.name}")
            lines.append(f"| `{section}.{entry.name}` | `{shown}` | `{default!r}` | {text} |")
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Return the page of all commands."""
    parser = build_parser()
    children = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    lines = ["# Commands", ""]
    for name in COMMANDS:
        child = children[name]
        lines += [f"## {name}", "", f"hiermpi {name}: {COMMANDS[name].summary}.", ""]
        if COMMANDS[name].example:
            lines += ["```text", COMMANDS[name].example.strip("\n"), "```", ""]
        rows = []
        for action in child._actions:
            words = ", ".join(f"`{word}`" for word in action.option_strings) or f"`{action.metavar or action.dest}`"
            if any(word.count(".") for word in action.option_strings) or action.dest == "help":
                continue
            rows.append(f"| {words} | {str(action.help or '').replace('|', ' or ')} |")
        if any("." in word for action in child._actions for word in action.option_strings):
            rows.append("| `--SECTION.FIELD` | any of the [settings](settings.md) |")
        lines += ["| flag | |", "|---|---|", *rows, ""]
    return "\n".join(lines) + "\n"


def interface() -> str:
    """Return the page of the Python interface."""
    lines = ["# Python interface", "", "The names of `import hiermpi`, each loaded when it is first used.", ""]
    for name in hiermpi.PLACES:
        found = getattr(hiermpi, name)
        lines += [f"## {name}", ""]
        if inspect.isfunction(found):
            lines += ["```python", f"hiermpi.{name}{inspect.signature(found)}", "```", ""]
        lines += ["```text", inspect.getdoc(found) or "", "```", ""]
        for member, method in vars(found).items() if inspect.isclass(found) else ():
            if inspect.isfunction(method) and not member.startswith("_") and inspect.getdoc(method):
                lines += [f"`{member}{inspect.signature(method)}`", ""]
                lines += ["```text", inspect.getdoc(method) or "", "```", ""]
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    """Write all pages into ``folder``."""
    folder.mkdir(exist_ok=True)
    for name, make in (("settings", settings), ("commands", commands), ("api", interface)):
        (folder / f"{name}.md").write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent / "reference")
