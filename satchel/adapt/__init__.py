"""Adapters: what is added to a frozen linear map. A method is a file; beside them, the layout that PEFT shares."""

from satchel.adapt._peft import each_peft, load_peft, outline_peft, read_peft, save_peft
from satchel.adapt._peft_names import Low

__all__ = ["Low", "each_peft", "load_peft", "outline_peft", "read_peft", "save_peft"]
