"""The package holds the configuration: the schema, and its loading from command line, environment and file."""
