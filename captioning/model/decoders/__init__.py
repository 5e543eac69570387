"""Caption decoders, one file a kind."""
