"""`/v1/embeddings`: the mean over a text's tokens of the states that the model's head reads, scaled to length 1.

A model that was made to write makes embeddings that order similar texts roughly; one that was tuned for it does better.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from satchel.core.request import Request
from satchel.run.server.completions import PROMPTS, tokens_of
from satchel.run.server.faults import Fault
from satchel.run.server.house import House
from satchel.run.server.replies import require_good
from satchel.run.server.wire import EmbeddingBody


async def embed(house: House, body: EmbeddingBody, tenant: str) -> dict[str, Any]:
    """The embeddings of all inputs. Raises Fault or UserError for what cannot be embedded."""
    adapter = house.adapter(body.model)
    house.admit(len(body.input))
    _check(house, body)
    requests = [
        Request(
            prompt=await tokens_of(house, text, "input"),
            max_tokens=1,
            embed=True,
            adapter=adapter,
            tenant=tenant,
            deadline_s=house.terms.timeout_s,
        )
        for text in body.input
    ]
    stream = await house.submit(requests)
    found, prompt_tokens = {}, 0
    try:
        async for number, event in stream:
            require_good(event)
            found[number] = event.embedding
            prompt_tokens += event.usage.prompt_tokens if event.usage else 0
    finally:
        stream.close()
    if not all(found.values()):
        raise Fault(408, "the deadline passed", kind="timeout_error", code="deadline")
    rows = [{"object": "embedding", "index": i, "embedding": _spelt(found[i], body)} for i in range(len(requests))]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": rows, "model": body.model or house.name, "usage": usage}


def _check(house: House, body: EmbeddingBody) -> None:
    if len(body.input) > PROMPTS:
        raise Fault(400, f"{len(body.input)} inputs; one body has {PROMPTS} at most", param="input")
    width = house.worker.engine.model.config.embed_width or house.worker.engine.model.config.width
    if body.dimensions not in (None, width):
        raise Fault(400, f"dimensions={body.dimensions}; this model's embeddings have {width}", param="dimensions")


def _spelt(embedding: tuple[float, ...], body: EmbeddingBody) -> list[float] | str:
    """As numbers, or as the bytes of float32 in base64."""
    values = np.asarray(embedding, dtype="<f4")
    values /= max(float(np.linalg.norm(values)), 1e-12)
    return base64.b64encode(values.tobytes()).decode() if body.encoding_format == "base64" else values.tolist()
