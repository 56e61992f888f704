"""A real engine in a process of its own, whose torch allocates from the page pool; prints what it held.

python -m tests.run.served FORMAT ...      `draft` and `rsd` are no formats but a second model that guesses ahead,
                                           `kv` is keys and values in 8 bits
"""

import gc
import json
import sys
import tempfile

import torch

from satchel.core.book import make
from satchel.core.request import Request, Sampling
from satchel.core.serve import ServeJob
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.load import load
from satchel.model.save import save
from satchel.model.source import find_source
from satchel.run.capacity import rehearse_all, second_models
from satchel.run.engine import Engine
from satchel.run.memory import install_pool
from satchel.run.scheduler import Limits

LLAMA = {"model_type": "llama", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 640}
LLAMA |= {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
LLAMA |= {"max_position_embeddings": 1024, "tie_word_embeddings": True}


def saved(folder: str, **changes: int) -> str:
    """A folder with a model of random weights."""
    model = Decoder(ModelConfig.from_hf(LLAMA | changes), torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    return str(save(model, folder))


def peaks(model: str, format: str = "none", **how: str) -> tuple[int, int]:
    """Predicted bytes of weights and workspace, then measured ones, the pool left out."""
    gc.collect()
    pages, config = install_pool(), ModelConfig.from_hf(LLAMA)
    idle = pages.live_bytes  # of the runs before: nothing but what is kept for good
    job = ServeJob(model="toy", format=format, step_tokens=256, **how)
    predicted = sum(rehearse_all(job, config, second_models(job), "cpu").values())
    limits = Limits(blocks=100, batch=32, step_tokens=256, context=1024)
    served = load(find_source(model), torch.bfloat16, format=make("format", format), frozen=True)
    engine = Engine(served, limits, **how)
    pages.reset_peak()
    for length, temperature in ((700, 0.0), (256, 1.0), *((9, 0.7),) * 20):
        engine.submit(Request(prompt=(5,) * length, max_tokens=4, sampling=Sampling(temperature=temperature)))
    engine.submit(Request(prompt=(5,) * 300, max_tokens=1, prompt_logprobs=True))  # logits of a whole chunk
    engine.run()
    return predicted, pages.peak_bytes - engine.pool.data.nbytes - idle


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        whole, small = saved(f"{home}/whole"), saved(f"{home}/small", num_hidden_layers=2)
        ways = {name: {"decoding": f"{name}:model={small}"} for name in ("draft", "rsd")} | {"kv": {"kv": "int8"}}
        print(json.dumps({name: peaks(whole, **ways.get(name, {"format": name})) for name in sys.argv[1:]}))
