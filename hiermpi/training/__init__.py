"""The package trains and evaluates; here model, hierarchy, communication and storage meet."""
