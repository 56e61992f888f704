"""How the past is kept: a method is a file."""
