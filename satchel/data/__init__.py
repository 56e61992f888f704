"""Which documents a run learns from."""
