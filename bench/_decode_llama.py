"""llama.cpp for bench/decode, by its own C interface: `python -m bench._decode_llama JSON`, in an environment with
llama-cpp-python (bench/peers/llama_cpp.sh). It needs nothing else of ours."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp as llama
import numpy as np

from bench._decode_play import Answer, Tokens, context, play

STEP = 512  # tokens of a step: its own default


class Session:
    """A model, and a context for as many answers as were last asked for together."""

    def __init__(self, case: dict[str, Any]) -> None:
        llama.llama_backend_init()
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._quiet, None)
        how = llama.llama_model_default_params()
        how.n_gpu_layers = 0
        self.case, self.batch, self.context = case, 0, None
        self.model = llama.llama_model_load_from_file(case["file"].encode(), how)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {case['model']}")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.rows = llama.llama_batch_init(STEP, 0, 1)

    def answer(self, prompts: list[Tokens], count: int) -> list[list[float]]:
        """The times at which the tokens came."""
        self._open(len(prompts))
        begin = time.perf_counter()
        came: list[list[float]] = [[] for _ in prompts]
        last = self._prompts(prompts)
        for step in range(count):
            if step:
                ends = [len(prompt) + step - 1 for prompt in prompts]
                last = self._run([(last[s], end, s, True) for s, end in enumerate(ends)])
            for times in came:
                times.append(time.perf_counter() - begin)
        return came

    def _open(self, batch: int) -> None:
        if self.batch != batch:
            if self.context:
                llama.llama_free(self.context)
            how = llama.llama_context_default_params()
            how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = context(self.case["plan"]), STEP, STEP, batch
            how.n_threads = how.n_threads_batch = self.case["threads"]
            how.flash_attn_type = 1 if self.case["flash"] else 0
            how.kv_unified = True  # every answer takes what it needs of one context, as ours do
            self.context, self.batch = llama.llama_init_from_model(self.model, how), batch
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def _prompts(self, prompts: list[Tokens]) -> Tokens:
        """Feeds all prompts, STEP tokens at a time; the first token of each answer."""
        rows = [(t, at, s, at == len(p) - 1) for s, p in enumerate(prompts) for at, t in enumerate(p)]
        return [token for start in range(0, len(rows), STEP) for token in self._run(rows[start : start + STEP])]

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> Tokens:
        """One step over (token, position, answer, whether to choose a next one) rows; what was chosen."""
        held = self.rows
        held.n_tokens = len(rows)
        for i, (token, position, sequence, chooses) in enumerate(rows):
            held.token[i], held.pos[i], held.n_seq_id[i] = token, position, 1
            held.seq_id[i][0], held.logits[i] = sequence, chooses
        if llama.llama_decode(self.context, held):
            raise SystemExit("llama.cpp could not run a step")
        return [self._likeliest(i) for i, row in enumerate(rows) if row[3]]

    def _likeliest(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self.context, row)
        return int(
            np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)).argmax()
        )


def start(case: dict[str, Any]) -> Answer:
    """The engine."""
    return Session(case).answer


if __name__ == "__main__":
    print(json.dumps(play(start, json.loads(sys.argv[1]))))
