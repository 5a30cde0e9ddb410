"""One module per command: SUMMARY, EXAMPLE, ``configure(parser)`` and ``run(arguments)``.

Commands that ranks do together have ``run_together(arguments, world)``. Top-level imports stay light: ``--help``
imports every module here.
"""
