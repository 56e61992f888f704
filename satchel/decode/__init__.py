"""Decoding: how an answer's next tokens are found. A method is a file."""

from satchel.decode._acceptance import Acceptance, Learnt, train_acceptance

__all__ = ["Acceptance", "Learnt", "train_acceptance"]
