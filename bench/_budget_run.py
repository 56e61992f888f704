"""One job of bench/budget, from reading to merging: `python -m bench._budget_run JSON` prints one line of JSON.

With --insist a job that is refused runs all the same, as the planner's smallest rung. The whole process's peak is read
twice, because the job starts a new one when it begins: up to then, and after it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from satchel.core.errors import DoesNotFit, SatchelError
from satchel.core.job import TuneJob
from satchel.core.report import Report
from satchel.run.memory import peak_resident_bytes
from satchel.run.planner import Plan
from satchel.run.tune import tune


@dataclass
class Witness(Report):
    """Notes what the planner said and what the process took before the job began."""

    said: dict[str, Any] = field(default_factory=dict)

    def plan(self, plan: Plan) -> None:
        """Called right before the job begins, or is refused."""
        rung = plan.chosen or plan.smallest
        assert rung is not None, "a plan that refuses knows the smallest way"
        self.said = {
            "accepted": plan.chosen is not None,
            "changes": list(rung.changes),
            "predicted_bytes": rung.peak_bytes,
            "planning_peak_bytes": peak_resident_bytes(),
        }
        print(json.dumps(self.said), flush=True)  # so that a job that is killed later is known as accepted


def main(job: dict[str, Any], insist: bool) -> dict[str, Any]:
    """Run the job; `outcome` is finished, refused or failed."""
    witness = Witness()
    if insist:
        Plan.require = lambda plan: plan.chosen or plan.smallest  # type: ignore[method-assign]
    try:
        receipt = tune(TuneJob.from_dict(job), witness)
    except DoesNotFit as refusal:
        return witness.said | {"outcome": "refused", "error": str(refusal)}
    except (SatchelError, MemoryError, RuntimeError, OSError) as error:
        return witness.said | {"outcome": "failed", "error": f"{type(error).__name__}: {error}"}
    peak = max(peak_resident_bytes(), witness.said["planning_peak_bytes"])
    return witness.said | {
        "outcome": "finished",
        "peak_bytes": peak,
        "notes": list(receipt.notes),
        "losses": receipt.losses,
        "outputs": sorted(receipt.outputs),
        "lines": [[line.name, line.predicted, line.measured] for line in receipt.lines],
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]), "--insist" in sys.argv)))
