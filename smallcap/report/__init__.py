"""A page about a run, about two runs side by side, or about a datastore: one HTML file that needs nothing else."""
