"""The trainer: where model, hierarchy, communication and storage meet."""
