"""All that reads and writes files. The only package that imports h5py."""

import os

# No file may make HDF5 load a filter plugin from disk; read by HDF5 when it is first imported.
os.environ["HDF5_PLUGIN_PRELOAD"] = "::"
