"""hiermpi: data-parallel training of language models on CPU clusters, through MPI.

This module imports nothing heavy: ``hiermpi --help`` must not pay for numpy or MPI.
"""

__version__ = "0.1.0"
