"""Decoding: how an answer's next tokens are found. A method is a file."""
