"""The output folder belongs to one run: `run.json` says which job, data and model it was begun with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TypeVar

from torch import nn

from satchel.core.disk import writing
from satchel.core.errors import UserError
from satchel.core.job import TrainJob
from satchel.model.disk import replace_text

CLAIM = "run.json"
J = TypeVar("J", bound=TrainJob)
# Fields that may change on a resume: they say where and how often, not what is computed.
FREE = frozenset(
    {"out", "resume", "merge", "memory", "device", "micro_batch", "eval_every", "save_every", "checkpoint"}
)


def check_out(job: TrainJob) -> None:
    """Refuse, before anything is loaded, an output folder that this job may not write to. Raises UserError."""
    out = Path(job.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; name a folder")
    if job.resume and not (out / CLAIM).exists():
        raise UserError(f"out: {out} holds no run to resume; leave resume out to start one")
    if not job.resume and out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        cure = "go on with its run by --resume, or" if (out / CLAIM).exists() else "it holds no run of satchel's:"
        raise UserError(f"out: {out} exists and is not empty; {cure} name another --out")


def begun_with(out: str | Path, kind: type[J]) -> J | None:
    """The job that a folder's run was begun with; None if there is none.

    Raises UserError if it cannot be read, or is a job of another kind.
    """
    path = Path(out) / CLAIM
    if not path.exists():
        return None
    try:
        return kind.from_dict(json.loads(path.read_text())["job"], where=str(path))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); start again with another out") from None


def require_same(job: TrainJob, before: TrainJob) -> None:
    """Raises UserError, naming the field, unless a resumed job computes what the run was begun with."""
    for name, value in job.to_dict().items():
        if name not in FREE and getattr(before, name) != value:
            raise UserError(f"resume: {name} was {getattr(before, name)!r} and is {value!r}; {_way_out(job.out)}")


def claim(job: TrainJob, data: str, model: str) -> None:
    """Take the folder for a new run, or check that a resumed one is the same job on the same data and model.

    Raises UserError that names the field that changed, NoDisk if the folder cannot be written.
    """
    check_out(job)
    path = Path(job.out) / CLAIM
    mine = {"job": job.to_dict(), "data": data, "model": model}
    before = begun_with(job.out, type(job)) if job.resume else None
    if before is None:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(mine, indent=1))
        return
    require_same(job, before)
    held = json.loads(path.read_text())
    for name in ("data", "model"):
        if held[name] != mine[name]:
            raise UserError(f"resume: the content of {name}={mine['job'][name]!r} has changed; {_way_out(job.out)}")


def fingerprint(model: nn.Module) -> str:
    """Changes with any name, shape or dtype of the model's tensors, and nearly surely with their content.

    A sample of each tensor is read, not all of it: a resume is to notice another model, not to prove the same one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        sample = tensor.detach().reshape(-1)[:: max(tensor.numel() // 64, 1)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _way_out(out: str) -> str:
    return f"restore it, or name another out than {out} to start anew"
