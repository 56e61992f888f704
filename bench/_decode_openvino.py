"""OpenVINO GenAI for bench/decode: `python -m bench._decode_openvino JSON`, in an environment with openvino-genai.

It reads the GGUF itself and keeps the weights in its own 4-bit form.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from bench._decode_play import Answer, Tokens, play


def start(case: dict[str, Any]) -> Answer:
    """The engine. The times of tokens are those of its own record, one for all answers of a batch."""
    pipe = genai.LLMPipeline(case["file"], "CPU", INFERENCE_NUM_THREADS=case["threads"])

    def answer(prompts: list[Tokens], count: int) -> list[list[float]]:
        how = genai.GenerationConfig()
        how.max_new_tokens, how.ignore_eos, how.do_sample, how.apply_chat_template = count, True, False, False
        tokens = np.array(prompts, dtype=np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(tokens), openvino.Tensor(np.ones_like(tokens)))
        begin = time.perf_counter()
        raw = pipe.generate(inputs, how).perf_metrics.raw_metrics
        took_s = time.perf_counter() - begin
        at = [float(t) / 1e3 for t in raw.m_new_token_times]  # milliseconds of a clock of its own
        came = [took_s - (at[-1] - t) for t in at]  # the last one came at the end
        return [came for _ in prompts]

    return answer


if __name__ == "__main__":
    print(json.dumps(play(start, json.loads(sys.argv[1]))))
