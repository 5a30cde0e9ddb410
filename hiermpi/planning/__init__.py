"""What a topology and a configuration amount to, before a job is submitted. Arithmetic only."""
