"""The bytes of single tokens, which decoding them one by one would lose: a character may span several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

from satchel.model.tokenizer import Tokenizer

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Spelling:
    """Spells the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend = tokenizer.backend

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; nothing for an id without one."""
        piece = self.backend.id_to_token(token)
        if piece is None:
            return b""
        if token in self._added or self._alphabet is None:
            byte = BYTE.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()
        return b"".join(bytes([self._alphabet[c]]) if c in self._alphabet else c.encode() for c in piece)

    def text_of(self, token: int) -> str:
        """Its text; bytes that are no characters as OpenAI writes them, `bytes:\\xe2\\x80`."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    @cached_property
    def _added(self) -> set[int]:
        return set(self.backend.get_added_tokens_decoder())

    @cached_property
    def _alphabet(self) -> Mapping[str, int] | None:
        """GPT-2's characters for bytes, if that is how this tokenizer writes them."""
        if "ByteLevel" not in repr(self.backend.decoder):
            return None
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        shifted = [byte for byte in range(256) if byte not in plain]
        return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(shifted)}
