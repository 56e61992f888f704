"""A server of a toy model with a real tokenizer, a request through its ASGI application, and a uvicorn of it."""

import contextlib

import httpx
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from satchel.model.tokenizer import Tokenizer
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from satchel.run.server.app import build
from satchel.run.server.house import House, Terms
from satchel.run.server.metrics import Metrics
from satchel.run.server.worker import Worker
from tests.run.toys import toy_decoder

TEMPLATE = (
    "{% if tools %}<s>tools {{ tools | tojson }} write <tool_call></s>{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def byte_tokenizer(template=TEMPLATE):
    """One token a byte, and `<s>`, `</s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {piece: index + 2 for index, piece in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, template)


def toy_house(template=TEMPLATE, terms=None, **limits):
    """Made on the event loop that serves it."""
    torch.set_num_threads(1)
    limits = Limits(**({"blocks": 64, "batch": 8, "step_tokens": 64, "context": 256} | limits))
    tokenizer = byte_tokenizer(template)
    engine = Engine(toy_decoder(vocab=258), limits, tokenizer)
    return House(Worker(engine), tokenizer, "toy", limits, Metrics("toy"), terms or Terms())


@contextlib.asynccontextmanager
async def client_of(house, keys=None):
    """An httpx client that talks to the application without a network."""
    transport = httpx.ASGITransport(build(house, keys), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://toy") as client:
        yield client
    with contextlib.suppress(Exception):
        await house.worker.ask(house.worker.engine.check_integrity)
    await house.worker.stop()
