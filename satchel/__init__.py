"""satchel."""
