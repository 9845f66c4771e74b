"""Changing the remaining weights, without training, so that outputs stay close."""
