"""One measurement of a peer: `python -m bench._tune_peer JSON` prints one line of JSON. See bench/tune.py.

transformers with PEFT, torch's AdamW, galore-torch or bitsandbytes, each as its own documentation shows it.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from bench._tune_loop import BATCH, CLIP, Tokens, Tuning, run

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def quantized(name: str, dtype: torch.dtype) -> Any:
    """bitsandbytes' configuration for frozen weights; None for plain ones."""
    if name == "none":
        return None
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


def adapted(model: nn.Module, name: str) -> nn.Module:
    """The model with PEFT's LoRA of rank 8 on all linear maps."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules="all-linear",
        use_dora=name == "dora",
        use_rslora=name == "rslora",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """torch's AdamW."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def adamw8bit(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with both moments in 8 bits."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def galore(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """galore-torch's AdamW: rank 128 on the matrices of attention and feed-forward, plain Adam on the rest."""
    from galore_torch import GaLoreAdamW

    named = list(model.named_parameters())
    low = [p for name, p in named if p.ndim == 2 and ("attn" in name or "mlp" in name)]
    chosen = {id(p) for p in low}
    rest = [p for _, p in named if id(p) not in chosen]
    knobs = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    same = {"lr": lr, "eps": 1e-8, "weight_decay": 0.0}  # its own eps is 1e-6; ours, as torch's, 1e-8
    return GaLoreAdamW([{"params": rest}, {"params": low, **knobs}], **same, no_deprecation_warning=True)


OPTIMIZERS = {"adamw": adamw, "adamw8bit": adamw8bit, "galore": galore}


def scheduler(name: str, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """transformers' schedule without warm-up; of `wsd`, the last tenth of the steps falls in a straight line."""
    if name == "wsd":
        return transformers.get_wsd_schedule(optimizer, 0, max(steps // 10, 1), steps, decay_type="linear")
    return transformers.get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=steps)


def tuning(model: nn.Module, tokens: Tokens, steps: int, settings: dict[str, Any]) -> Tuning:
    """The peer's training step over these tokens."""
    if settings["adapter"] != "none":
        model = adapted(model, settings["adapter"])
    if settings["checkpointing"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = OPTIMIZERS[settings["optimizer"]](model, settings["lr"])
    schedule = scheduler(settings["schedule"], optimizer, steps)

    def step(number: int) -> float:
        loss = _loss(model, tokens.train_MC[tokens.order_SB[number]])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Tuning(step, lambda: _held_out_loss(model, tokens.held_out_MC), optimizer)


def _loss(model: nn.Module, blocks_BC: np.ndarray) -> Tensor:
    """The mean loss over every block's context, each token predicting the one behind it."""
    blocks_BC = torch.from_numpy(blocks_BC.astype(np.int64))
    targets_BT = blocks_BC[:, 1:].contiguous()
    return model(input_ids=blocks_BC[:, :-1], labels=targets_BT, shift_labels=targets_BT, use_cache=False).loss


@torch.no_grad()
def _held_out_loss(model: nn.Module, blocks_MC: np.ndarray) -> float:
    model.eval()
    losses = [_loss(model, blocks_MC[i : i + BATCH]).item() for i in range(0, len(blocks_MC), BATCH)]
    return sum(losses) / len(losses)


def main(work: str, steps: int, **settings: Any) -> dict[str, Any]:
    """Measure the peer that `settings` name, on the model and the tokens in the folder `work`."""
    import peft  # noqa: F401  its import is no part of a step

    plain = {"adapter": "none", "optimizer": "adamw", "checkpointing": False, "quantized": "none"}
    settings = plain | {"schedule": "constant", "dtype": "bf16"} | settings
    torch.manual_seed(0)
    tokens, dtype = Tokens.read(Path(work) / "tokens.npz"), DTYPES[settings["dtype"]]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        f"{work}/model", dtype=dtype, quantization_config=quantized(settings["quantized"], dtype)
    )
    return run(model, lambda: tuning(model, tokens, steps, settings), steps)


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
