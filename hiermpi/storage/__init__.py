"""The package stores datasets, checkpoints and run folders; it is the only package that imports h5py."""

import os

# No file may make HDF5 load a filter plugin from disk. HDF5 reads this variable when it is first imported.
os.environ["HDF5_PLUGIN_PRELOAD"] = "::"
