"""From statistics to the global table: methods, mixtures, weights."""
