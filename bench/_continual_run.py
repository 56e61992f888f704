"""One run of the continual bench: `python -m bench._continual_run JSON` prints one line of JSON."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from satchel.core.job import PretrainJob
from satchel.run.metrics import FILE, read_metrics
from satchel.run.pretrain import pretrain


def main(**fields: Any) -> dict[str, Any]:
    """Run the job; every evaluation of each source, what was fed, and the processor's seconds."""
    job, began = PretrainJob.from_dict(fields), time.process_time()
    receipt = pretrain(job)
    evaluations = [line for line in read_metrics(Path(job.out) / FILE) if "held_out_loss" in line]
    shutil.rmtree(Path(job.out) / "checkpoints")
    return {
        "losses": {
            name.partition("/")[2]: [(line["step"], line[name]) for line in evaluations]
            for name in evaluations[0]
            if "/" in name
        },
        "tokens": receipt.tokens,
        "cpu_s": time.process_time() - began,
    }


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
