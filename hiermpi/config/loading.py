"""The configuration is read here: command line beats environment beats file beats default.

Only rank 0 does this; the result is broadcast, so other ranks never import pydantic.
"""

import argparse
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from hiermpi.config.schema import SECTIONS, Config, build, flatten, nearest, require_setting
from hiermpi.errors import UsageError

ENVIRONMENT_PREFIX = "HIERMPI_"
RESERVED_VARIABLES = frozenset({"HIERMPI_FAULT", "HIERMPI_KERNELS"})
"""The variables of hiermpi that are not settings; tests use them."""
MAX_FILE_BYTES = 1 << 20
PRESETS = Path(__file__).parent / "presets"

def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the flag ``--config`` and one flag ``--section.field`` per setting."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"TOML file of settings, or the name of a shipped one: {', '.join(presets())}",
    )
    for section, kind in SECTIONS.items():
        group = parser.add_argument_group(section, (kind.__doc__ or "").splitlines()[0])
        for entry in fields(kind):
            shown = _shown_type(get_type_hints(kind, include_extras=False)[entry.name])
            group.add_argument(
                f"--{section}.{entry.name}",
                dest=f"{section}.{entry.name}",
                metavar=shown,
                default=argparse.SUPPRESS,
                help=f"{entry.metadata['help']} (default: {_shown_default(getattr(Config(), section), entry.name)})",
            )


def presets() -> dict[str, Path]:
    """Return the paths of the configurations shipped with the package, by name."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}


def load_config(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Config:
    """Return the resolved configuration.

    Args:
        arguments: The arguments parsed by a parser made with :func:`add_config_arguments`.
        environment: The environment variables, usually ``os.environ``.

    Raises:
        UsageError: A key is unknown, a value has the wrong type or is out of range, or a file cannot be read.
    """
    known = flatten(Config())
    settings: dict[str, tuple[Any, str]] = {}  # {name: (value, its origin)}
    file = getattr(arguments, "config", None)
    if file is not None:
        settings.update(_from_file(file, known))
    settings.update(_from_environment(environment, known))
    for name in known:
        if hasattr(arguments, name):
            settings[name] = (getattr(arguments, name), f"--{name}")
    return build(settings)


def config_to_toml(config: Config) -> str:
    """Return the configuration as a TOML text that :func:`load_config` reads back to the same values."""
    nested: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in flatten(config).items():
        section, _, key = name.partition(".")
        nested[section][key] = value
    return tomli_w.dumps(nested)


def _shown_type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    return "TABLE" if get_origin(hint) is dict else hint.__name__.upper()


def _shown_default(section: Any, name: str) -> str:
    value = getattr(section, name)
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value in ("", {}) else str(value)


def _from_file(path: Path, known: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    path = path if path.exists() else presets().get(str(path), path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path} is larger than 1 MiB: this is not a configuration, name a TOML file")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(presets())
        raise UsageError(
            f"{path}: {error.strerror}: name a readable TOML file with --config, or one of {names}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {str(error).splitlines()[0]}") from None
    settings: dict[str, tuple[Any, str]] = {}
    for section, entries in table.items():
        if section not in SECTIONS:
            raise UsageError(f'{path}: unknown section "{section}"{nearest(section, SECTIONS)}')
        if not isinstance(entries, dict):
            raise UsageError(f"{path}: {section} is a section: write [{section}] with its settings below")
        for key, value in entries.items():
            name = f"{section}.{key}"
            require_setting(name, known, str(path))
            settings[name] = (value, f"{name} in {path}")
    return settings


def _from_environment(environment: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    settings: dict[str, tuple[Any, str]] = {}
    for variable in sorted(environment):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in RESERVED_VARIABLES:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).replace("__", ".", 1).lower()
        if name not in known:
            variables = [ENVIRONMENT_PREFIX + entry.replace(".", "__").upper() for entry in known]
            meant = "__" in variable or difflib.get_close_matches(variable, variables, n=1, cutoff=0.9)
            if not meant:  # a variable such as HIERMPI_ROOT, which module systems set
                continue
            raise UsageError(f"unknown environment variable {variable}{nearest(variable, variables)}")
        settings[name] = (environment[variable], variable)
    return settings


def unknown_flag_message(flag: str) -> str:
    """Return the message about a flag that no command knows."""
    name = flag.split("=", maxsplit=1)[0]
    return f"unknown option {name}{nearest(name, ['--' + entry for entry in flatten(Config())])}"

