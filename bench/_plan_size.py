"""The seconds that one rehearsal takes, first in a process and again, for bench/plan.

python -m bench._plan_size '{"hf": {...}, "job": {...}}'
"""

import json
import sys
import time

from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.run.memory import peak_resident_bytes, reset_peak_resident, resident_bytes
from satchel.run.rehearse import rehearse


def main(case: dict) -> None:
    """Print the seconds, and what the rehearsal itself added to this process."""
    job, config = TuneJob(**case["job"]), ModelConfig.from_hf(case["hf"])
    before = resident_bytes()
    reset_peak_resident()
    first = _seconds(job, config)
    took = peak_resident_bytes() - before
    again = _seconds(job, config)
    peak = rehearse(job, config).peak.peak_bytes
    found = {"first_s": first, "again_s": again, "own_bytes": took, "predicted_bytes": peak}
    print(json.dumps(found | {"parameters": config.parameters}))


def _seconds(job: TuneJob, config: ModelConfig) -> float:
    start = time.perf_counter()
    rehearse(job, config)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
