import sys

import pytest

from satchel.run.governor import RESERVE, Governor

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


class Counted:
    """A page pool that only notes its limit."""

    resident_bytes = 16 * MIB

    def limit(self, limit_bytes):
        self.limit_bytes = limit_bytes

    def reset_peak(self):
        pass


def test_tensors_leave_room_for_what_grows_beside_them_within_a_step():
    governor = Governor("cpu", 4096 * MIB, pool := Counted())
    for hold in (0, 96):
        held = b"1" * (hold * MIB)
        governor.begin() if not hold else governor.before_step(1)
        beside = governor.memory_bytes() - pool.resident_bytes
        left = governor.budget_bytes - pool.limit_bytes - beside
        assert RESERVE - MIB < left < RESERVE + MIB, held[:0]
