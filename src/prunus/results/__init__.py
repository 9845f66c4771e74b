"""The folder that a user gets: model, card, plan, metrics."""
