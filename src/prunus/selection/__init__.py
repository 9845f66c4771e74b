"""From the table to a plan. Never sees a model."""
