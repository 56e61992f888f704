"""Admission: who runs next, and who makes room. A method is a file."""
