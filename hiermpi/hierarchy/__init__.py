"""Who is who and who gets what: arithmetic on (n, size, rank), without MPI."""
