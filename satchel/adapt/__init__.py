"""Adapters: what is added to a frozen linear map. A method is a file; beside them, the layout that PEFT shares."""

from satchel.adapt._peft import load_peft, read_peft, save_peft

__all__ = ["load_peft", "read_peft", "save_peft"]
