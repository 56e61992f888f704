"""`adapter_config.json` of PEFT's LoRA layout: read with its patterns, written as plainly as older versions want it.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from satchel.adapt.dora import Dora
from satchel.adapt.lora import Lora
from satchel.adapt.rslora import RsLora
from satchel.core.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys that are read, and keys that say nothing of what a trained adapter computes. Any other that is set is an error:
# it asks for something that is not built here, in this version of PEFT or a newer one.
READ = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"}
)
SILENT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"}
    | {"qalora_group_size", "runtime_config", "ensure_weight_tying"}
)
# Initialisations that take something away from the base: the adapter is wrong beside the original weights.
CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter's folder says of it."""

    source: Path
    keys: Mapping[str, Any]

    @property
    def decomposed(self) -> bool:
        """Whether each map has a magnitude (DoRA)."""
        return bool(self.keys.get("use_dora"))

    def method(self, path: str) -> Lora:
        """The adapter of the map at `path`, by the model's own names."""
        rank = self._patterned("rank_pattern", path, self.keys.get("r", 8))
        alpha = float(self._patterned("alpha_pattern", path, self.keys.get("lora_alpha", 8)))
        dropout = float(self.keys.get("lora_dropout") or 0)
        if self.decomposed:
            alpha *= math.sqrt(rank) if self.keys.get("use_rslora") else 1
            return Dora(rank=rank, alpha=alpha, dropout=dropout)
        return (RsLora if self.keys.get("use_rslora") else Lora)(rank=rank, alpha=alpha, dropout=dropout)

    def targets(self, path: str) -> bool:
        """Whether the adapter is meant for the map at `path`."""
        if _named(self.keys.get("exclude_modules"), path):
            return False
        targets = self.keys.get("target_modules")
        return _named(targets, path) and (isinstance(targets, str) or self._in_layers(path))

    def _patterned(self, key: str, path: str, default: Any) -> Any:
        found = (v for pattern, v in (self.keys.get(key) or {}).items() if re.match(rf"(.*\.)?({pattern})$", path))
        return next(found, default)

    def _in_layers(self, path: str) -> bool:
        layers = self.keys.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        names = self.keys.get("layers_pattern") or [r"[^.]*"]
        for name in [names] if isinstance(names, str) else names:
            if match := re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path):
                return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
        return False


def _named(names: str | Collection[str] | None, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None  # 'all-linear' is no path: then the file says which
    return any(path == name or path.endswith("." + name) for name in names or ())


def read_config(folder: Path) -> PeftConfig:
    """Raises ModelError where there is no such file, or it asks for what is not supported here."""
    source = folder / CONFIG
    if not source.exists():
        raise ModelError(f"{folder}: no {CONFIG}: not an adapter, or its saving was cut off")
    try:
        keys = json.loads(source.read_text(encoding="utf-8"))
        kind, bias, init = keys.get("peft_type"), keys.get("bias", "none"), str(keys.get("init_lora_weights", True))
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{source}: not a JSON object ({error}); fetch it again") from error
    if kind != "LORA":
        raise ModelError(f"{source}: an adapter of type {kind}; LoRA, rsLoRA and DoRA can be loaded")
    foreign = sorted(key for key in keys.keys() - READ - SILENT if keys[key])
    if bias != "none" or foreign:
        asked = ", ".join(f"{key}={keys[key]!r}" for key in [*(["bias"] if bias != "none" else []), *foreign])
        raise ModelError(f"{source}: {asked} is not supported; merge the adapter into its model with PEFT, load that")
    if CHANGES_BASE.match(init):
        raise ModelError(
            f"{source}: init_lora_weights={init!r} changed the base; convert the adapter with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return PeftConfig(source, keys)


def config_of(methods: Mapping[str, Lora], maps: Collection[str], base_name: str) -> dict[str, Any]:
    """The configuration of the adapters `methods`, by the model's own names, of which `maps` are all linear ones."""
    stable = all(isinstance(m, RsLora) for m in methods.values())
    ranks = {path: m.rank for path, m in methods.items()}
    alphas = {path: m.alpha if stable else m.scale * m.rank for path, m in methods.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(methods.values())).dropout,
        "target_modules": _short(methods, maps),
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "use_rslora": stable,
        "use_dora": all(isinstance(m, Dora) for m in methods.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _short(paths: Collection[str], maps: Collection[str]) -> list[str]:
    """Last names, if they name these paths and no other map; else the paths."""
    ends = sorted({path.rpartition(".")[2] for path in paths})
    return ends if {path for path in maps if path.rpartition(".")[2] in ends} == set(paths) else sorted(paths)
