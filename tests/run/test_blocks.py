import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from satchel.core.errors import SatchelError
from satchel.run.blocks import Blocks, digests


def test_a_digest_depends_on_all_tokens_before_it_and_on_the_root():
    tokens = list(range(50))
    whole = digests(tokens, 16, b"")
    assert len(whole) == 3 and len(set(whole)) == 3
    assert digests(tokens, 16, b"", whole[:1]) == whole == digests(tokens[:48], 16, b"")
    assert digests([*tokens[:3], 99, *tokens[4:]], 16, b"")[2] != whole[2]
    assert digests([*tokens[:20], 99, *tokens[21:]], 16, b"")[0] == whole[0]
    assert not set(digests(tokens, 16, b"other")) & set(whole)


def test_a_published_block_is_found_until_its_place_is_needed():
    blocks = Blocks(3, 16)
    a, b = blocks.take(), blocks.take()
    blocks.publish(a, b"A")
    blocks.publish(b, b"B")
    assert blocks.match([b"A", b"B", b"C"]) == [a, b] and blocks.match([b"C", b"A"]) == []
    blocks.release(b)
    blocks.release(a)
    assert blocks.free == 3 and blocks.match([b"A"]) == [a]
    blocks.share(a)
    assert {blocks.take(), blocks.take()} == {0, 1, 2} - {a}
    assert blocks.match([b"B"]) == [] and blocks.match([b"A"]) == [a]
    with pytest.raises(SatchelError, match="no free block"):
        blocks.take()


@pytest.mark.parametrize("table", [[[2, 3]], [[0], [0], [1]], [[0]]])
def test_what_does_not_add_up_is_noticed(table):
    blocks = Blocks(4, 16)
    blocks.take(), blocks.take()
    blocks.check_integrity([[0, 1]])
    with pytest.raises(SatchelError):
        blocks.check_integrity(table)


class Holders(RuleBasedStateMachine):
    """Any order of taking, sharing, publishing and releasing keeps the books right."""

    def __init__(self):
        super().__init__()
        self.blocks, self.tables, self.runs = Blocks(6, 16), [], []

    @rule()
    def take(self):
        if self.blocks.free:
            self.tables.append([self.blocks.take()])

    @rule(digest=st.binary(min_size=1, max_size=1))
    def publish(self, digest):
        for table in self.tables:
            self.blocks.publish(table[0], digest)

    @rule(digest=st.binary(min_size=1, max_size=1))
    def reuse(self, digest):
        for block in self.blocks.match([digest]):
            self.blocks.share(block)
            self.tables.append([block])

    @rule(count=st.integers(1, 3))
    def take_run(self, count):
        before = {block: self.blocks.digest[block] for table in self.tables for block in table}
        if taken := self.blocks.take_run(count):
            start, pairs = taken
            moved = dict(pairs)
            self.tables = [[moved.get(block, block) for block in table] for table in self.tables]
            self.runs.append(range(start, start + count))
            assert all(self.blocks.digest[moved.get(block, block)] == digest for block, digest in before.items())
        else:
            assert count > self.blocks.free or self.runs

    @rule()
    def release_run(self):
        if self.runs:
            self.blocks.release_run(self.runs.pop(0))

    @rule(at=st.integers(0, 9))
    def release(self, at):
        if at < len(self.tables):
            self.blocks.release(self.tables.pop(at)[0])

    @rule()
    def forget(self):
        self.blocks.forget_all()

    @invariant()
    def adds_up(self):
        self.blocks.check_integrity([*self.tables, *self.runs])


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
