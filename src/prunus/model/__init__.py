"""What a model consists of: families, geometry, layers, loss."""
