"""This package does all communication between ranks; no other package imports mpi4py."""
