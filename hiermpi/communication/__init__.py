"""All that talks to other ranks. The only package that imports mpi4py."""
