"""Configuration: the schema (pure dataclasses) and its loading from command line, environment and file."""
