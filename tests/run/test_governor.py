import sys

import pytest

from satchel.run.governor import Governor

MIB = 1 << 20


def rise(mib):
    """Hold so much for a moment, every page of it."""
    b"1" * (mib * MIB)  # no tensor: the page pool may have pages to spare


@pytest.mark.skipif(sys.platform != "linux", reason="a peak can be started anew on Linux only")
def test_the_peak_is_what_the_process_held_since_the_job_began():
    governor = Governor("cpu")
    rise(192)
    governor.begin()
    begun = governor.peak_bytes()
    assert begun < governor.memory_bytes() + 64 * MIB  # the rise before is forgotten
    rise(96)
    governor.end()
    assert 64 * MIB < governor.peak_bytes() - begun < 128 * MIB
