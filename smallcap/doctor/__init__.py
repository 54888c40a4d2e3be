"""What can be wrong with a machine, an installation, a store, a model or an index, checked before a run meets it."""
