"""This package turns text into tokens and tokens into sequences; it knows neither hiermpi's file formats nor MPI."""
