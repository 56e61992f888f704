"""satchel packs an LLM job into the memory, compute, tokens and data that you have.

The public names, each imported from its home on first use, so that `import satchel` costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from satchel.core.budget import Budget as Budget
    from satchel.core.errors import DataError as DataError
    from satchel.core.errors import DoesNotFit as DoesNotFit
    from satchel.core.errors import JobError as JobError
    from satchel.core.errors import ModelError as ModelError
    from satchel.core.errors import SatchelError as SatchelError
    from satchel.core.errors import UnknownName as UnknownName
    from satchel.core.errors import UserError as UserError
    from satchel.core.job import PretrainJob as PretrainJob
    from satchel.core.job import TuneJob as TuneJob
    from satchel.core.report import Report as Report
    from satchel.core.serve import ServeJob as ServeJob
    from satchel.core.serve import Terms as Terms
    from satchel.model.load import load as load
    from satchel.model.save import save as save
    from satchel.model.source import load_tokenizer as load_tokenizer
    from satchel.run.export import merge as merge
    from satchel.run.generate import generate as generate
    from satchel.run.planner import plan as plan
    from satchel.run.pretrain import pretrain as pretrain
    from satchel.run.server.start import Serving as Serving
    from satchel.run.tune import tune as tune

__version__ = "0.1.0"

HOMES = {
    "Budget": "core.budget",
    "DataError": "core.errors",
    "DoesNotFit": "core.errors",
    "JobError": "core.errors",
    "ModelError": "core.errors",
    "PretrainJob": "core.job",
    "Report": "core.report",
    "SatchelError": "core.errors",
    "ServeJob": "core.serve",
    "Serving": "run.server.start",
    "Terms": "core.serve",
    "TuneJob": "core.job",
    "UnknownName": "core.errors",
    "UserError": "core.errors",
    "generate": "run.generate",
    "load": "model.load",
    "load_tokenizer": "model.source",
    "merge": "run.export",
    "plan": "run.planner",
    "pretrain": "run.pretrain",
    "save": "model.save",
    "tune": "run.tune",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'satchel' has no attribute '{name}'; it has {', '.join(HOMES)}")
    value = getattr(importlib.import_module(f"satchel.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*HOMES, "__version__"]
