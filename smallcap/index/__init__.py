"""A published index, as its readers see it: manifest, verified files, captions, and exact answers to queries."""
