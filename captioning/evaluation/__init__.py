"""Caption a split, match references, compute all scores."""
