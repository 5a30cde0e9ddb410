"""The package computes what a topology and a configuration amount to, before a job is submitted."""
