"""What a verb needs beyond the base install, and how to get it."""

from collections.abc import Generator
from contextlib import contextmanager

from satchel.core.errors import UserError


@contextmanager
def needs(extra: str) -> Generator[None, None, None]:
    """Around the imports of a verb: UserError that names the extra where a package of it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "satchel").startswith("satchel"):
            raise
        raise UserError(f"{error.name} is not installed; pip install 'satchel[{extra}]'") from None
