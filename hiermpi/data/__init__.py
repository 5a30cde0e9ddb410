"""Text to tokens, tokens to sequences: pure, without files of our own format and without MPI."""
