"""Shards are whole or not there, hold every document once, and are made anew when text or tokenizer changes."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from satchel.core.errors import DataError, NoDisk, UserError
from satchel.run import shards
from satchel.run.data import split, tokenize
from satchel.run.shards import shard
from tests.run.toys import END, CharTokenizer, toy_text

TOKENIZER = CharTokenizer()


def documents(made):
    return [TOKENIZER.decode(made.tokens_N[a:b]) for a, b in zip(made.starts_M1, made.starts_M1[1:], strict=False)]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_shard_holds_the_tokens_that_tuning_would_read(tmp_path):
    path = toy_text(tmp_path / "a.jsonl")
    made, read = shard(path, TOKENIZER, tmp_path / "tokens"), tokenize(path, TOKENIZER, 1024)
    assert made.tokens_N[0 : len(made.tokens_N)].tolist() == read.tokens_N.tolist()
    assert made.starts_M1.tolist() == read.starts_M1.tolist() and len(made) == 60 and made.learnt_N.all()
    assert made.tokens_N[int(made.starts_M1[1]) - 1 : int(made.starts_M1[1])] == [END]


def test_a_shard_is_written_once_and_told_once(tmp_path):
    path, told = toy_text(tmp_path / "a.jsonl"), []
    first = shard(path, TOKENIZER, tmp_path / "tokens", told.append)
    stamp = (tmp_path / "tokens" / first.key / "tokens.bin").stat().st_mtime_ns
    again = shard(path, TOKENIZER, tmp_path / "tokens", told.append)
    assert again.key == first.key and len(told) == 1 and "tokenizing" in told[0]
    assert (tmp_path / "tokens" / first.key / "tokens.bin").stat().st_mtime_ns == stamp


class Shouting(CharTokenizer):
    def key(self):
        return "capitals"

    def encode(self, text, special=False):
        return super().encode(text.upper())


def test_changed_text_another_tokenizer_or_a_file_cut_short_is_tokenized_anew(tmp_path):
    path, folder = toy_text(tmp_path / "a.jsonl"), tmp_path / "tokens"
    first = shard(path, TOKENIZER, folder)
    shouted = shard(path, Shouting(), folder)
    assert shouted.key != first.key and documents(shouted)[0] == documents(first)[0].upper()
    with open(path, "a") as file:
        file.write('{"text": "one more"}\n')
    longer = shard(path, TOKENIZER, folder)
    assert longer.key != first.key and documents(longer) == [*documents(first), "one more"]
    damaged = folder / longer.key / "tokens.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    assert documents(shard(path, TOKENIZER, folder)) == documents(longer)


def test_ids_take_two_bytes_unless_the_vocabulary_is_larger(tmp_path):
    path = toy_text(tmp_path / "a.jsonl")
    small = shard(path, TOKENIZER, tmp_path / "tokens")
    large = CharTokenizer()
    large.size, large.key = 70_000, lambda: "large"
    wide = shard(path, large, tmp_path / "tokens")
    sizes = [(tmp_path / "tokens" / each.key / "tokens.bin").stat().st_size for each in (small, wide)]
    assert sizes == [2 * len(small.tokens_N), 4 * len(small.tokens_N)] and documents(small) == documents(wide)


def test_every_malformed_record_is_told_at_once_and_nothing_is_left(tmp_path):
    bad = [{"text": "fine"}, {"text": 1}, {"prompt": "q", "completion": "a"}, {"instruction": "q"}]
    with pytest.raises(DataError) as caught:
        shard(jsonl(tmp_path / "x.jsonl", bad), TOKENIZER, tmp_path / "tokens")
    assert [p.split(":")[1] for p in caught.value.problems] == ["2", "3", "4"]
    assert "a completion record; pre-training reads plain text" in caught.value.problems[1]
    assert [p.name for p in (tmp_path / "tokens").iterdir()] == [".lock"]


def test_a_source_that_is_not_there_is_told_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        shard(str(tmp_path / "none.jsonl"), TOKENIZER, tmp_path / "tokens")


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path):
    path = toy_text(tmp_path / "a.jsonl", count=400)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(NoDisk, match="no disk left"):
            shard(path, TOKENIZER, tmp_path / "tokens")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in (tmp_path / "tokens").iterdir()] == [".lock"]
    assert len(shard(path, TOKENIZER, tmp_path / "tokens")) == 400


class Slow(CharTokenizer):
    """Never ends its second batch."""

    calls = 0

    def encode_batch(self, texts, special=False):
        self.calls += 1
        if self.calls == 2:
            time.sleep(60)
        return super().encode_batch(texts)


def test_a_killed_tokenization_leaves_no_shard_and_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "AT_ONCE", 200)
    path, folder = toy_text(tmp_path / "a.jsonl"), tmp_path / "tokens"
    if not (child := os.fork()):
        shard(path, Slow(), folder)
        os._exit(0)
    while not list(folder.glob(".*.part/tokens.bin")):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not [p for p in folder.iterdir() if not p.name.startswith(".")]
    assert len(shard(path, TOKENIZER, folder)) == 60 and not list(folder.glob(".*.part"))


def test_equal_documents_fall_on_one_side_of_the_split_and_a_seed_moves_it(tmp_path):
    texts = [{"text": f"text {i}"} for i in range(50)]
    made = shard(jsonl(tmp_path / "x.jsonl", texts * 2), TOKENIZER, tmp_path / "tokens")
    kept, held = split(made, 0.2, seed=0)
    assert len(held) == 20 and {i % 50 for i in kept}.isdisjoint({i % 50 for i in held})
    assert split(made, 0.2, seed=1)[1].tolist() != held.tolist()


GROWTH = """
import resource, sys
from pathlib import Path
import numpy as np
from satchel.run.packing import fill
from satchel.run.shards import shard
from tests.run.toys import CharTokenizer
class Bytes(CharTokenizer):
    def encode_batch(self, texts, special=False):
        return [list(text.encode()) for text in texts]
def read(name):
    made = shard(f"{sys.argv[1]}/{name}.jsonl", Bytes(), Path(sys.argv[1]) / "tokens")
    rows = fill(made, np.arange(len(made)), 1024)
    for row in range(len(rows)):
        rows.batch([row])
    return rows.tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
print(*read("small"), *read("large"))
"""


def test_memory_does_not_grow_with_the_text(tmp_path):
    """Twelve times the text and hardly more memory at the peak: neither text nor tokens are held."""
    for name, count in (("small", 80), ("large", 1000)):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": f"{i} {'word ' * 2000}"}) + "\n" for i in range(count))
    done = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, small, many, large = map(int, done.stdout.split())
    assert many > 12 * few > 9e6 and large - small <= 8  # MiB


def test_slices_are_copies(tmp_path):
    made = shard(toy_text(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "tokens")
    first = made.tokens_N[0:10]
    first[:] = 0
    assert made.tokens_N[0:10].any() and isinstance(first, np.ndarray)
