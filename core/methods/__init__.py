"""Importance and selection under their original names; see `core.methods.global_pruning`."""
