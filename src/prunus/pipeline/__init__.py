"""The main jobs, each a few calls of the stages."""
