"""The decoder: one model for every family, read from its configuration.

    tokens -> embedding -> blocks -> norm -> head -> logits

Parameters bear Hugging Face's names for Llama whatever the family; `names.py` translates. Nothing here draws random
numbers or copies to the host, so that a decoder of any size builds and runs on fake and meta tensors.
"""

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import torch
from torch import Tensor, nn

from satchel.core.errors import ModelError
from satchel.model.attention import Place
from satchel.model.block import Block
from satchel.model.cache import Past
from satchel.model.config import ModelConfig
from satchel.model.empty import At, Embedding, Linear
from satchel.model.linear import dtype_of
from satchel.model.norm import make_norm
from satchel.model.paged import Row
from satchel.model.rope import rope_tables
from satchel.model.stack import Stack, stack_of

if TYPE_CHECKING:
    from satchel.core.seams import Activations, Run
    from satchel.core.serve_seams import Feed

# B batch, T tokens, N tokens of one row of documents, D width, V vocabulary


class Trunk(nn.Module):
    """What lies below the head. It holds the modules; `Decoder` runs them."""

    def __init__(self, config: ModelConfig, **at: Unpack[At]) -> None:
        super().__init__()
        embed = config.embed_width or config.width
        self.embed_tokens = Embedding(config.vocab, embed, **at)
        self.embed_positions = (
            Embedding(config.learned_positions, config.width, **at) if config.learned_positions else None
        )
        self.project_in = Linear(embed, config.width, False, **at) if embed != config.width else None
        self.layers = nn.ModuleList(Block(config, index, **at) for index in range(config.layers))
        self.norm = make_norm(config, config.width, **at) if config.final_norm else None
        self.project_out = Linear(config.width, embed, False, **at) if embed != config.width else None


class Decoder(nn.Module):
    """A causal language model. Weights are allocated, not initialised: load them, or call `init_weights`."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.activations: Activations | None = None
        self.runs: list[Run] = []  # the blocks as the policy runs them
        self._blocks: Stack | Literal[False] | None = None  # all below the head as one operator; None: not tried yet
        at: At = {"dtype": dtype, "device": device}
        self.model = Trunk(config, **at)
        self.lm_head = Linear(config.embed_width or config.width, config.vocab, False, **at)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        """In which the stream from block to block flows."""
        return dtype_of(self.model.embed_tokens)

    @property
    def device(self) -> torch.device:
        """Where tokens are looked up."""
        embeddings = self.model.embed_tokens
        return next(chain(embeddings.parameters(), embeddings.buffers())).device

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, called `block(x_BTD, place)`."""
        return self.model.layers

    def forward(
        self, tokens_BT: Tensor, *, lengths: tuple[int, ...] | None = None, cache: Past | None = None
    ) -> Tensor:
        """Logits [B, T, V] for tokens [B, T]; see `hidden` for `lengths` and `cache`."""
        return self.logits(self.hidden(tokens_BT, lengths=lengths, cache=cache))

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        lengths: tuple[int, ...] | None = None,
        cache: Past | None = None,
        feed: "Feed | None" = None,
    ) -> Tensor:
        """The state [B, T, D] that the head reads, after the final norm.

        `lengths`: the tokens are one row of documents of these lengths, each of which sees itself only and starts at
        position 0. `cache`: what came before; it is extended by the tokens. `feed`: what runs the feed-forwards.
        """
        if lengths is None:
            return self._run(tokens_BT, None, cache, feed)
        if cache is not None or tokens_BT.shape[0] != 1 or sum(lengths) != tokens_BT.shape[1]:
            raise ModelError(
                f"lengths {lengths} describe one row of {sum(lengths)} tokens without a cache; "
                f"the tokens are {tuple(tokens_BT.shape)}"
            )
        if min(lengths) == max(lengths):  # a plain batch
            return self._run(tokens_BT.view(len(lengths), -1), None, None).flatten(0, 1)[None]
        return self._run(tokens_BT, tuple(lengths), None)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """What the head makes of hidden states: [B, T, D] to [B, T, V]."""
        logits_BTV = self.lm_head(x_BTD)
        cap = self.config.logit_softcap
        return logits_BTV if cap is None else (logits_BTV / cap).tanh() * cap

    def wrap_blocks(self, policy: "Activations | None", home: Path | None = None) -> None:
        """Lets a policy decide what each block keeps for the backward pass; None keeps everything.

        `home`: a folder where the policy may keep files for as long as the process lives.
        """
        self.activations = policy
        wrap = policy.start(len(self.layers), home) if policy else None
        self.runs = [wrap(block, index) for index, block in enumerate(self.layers)] if wrap else []

    def policy_state(self) -> dict[str, Tensor]:
        """What the policy keeps from step to step, by name: it belongs into a checkpoint beside the parameters."""
        states = {index: run.state_dict() for index, run in enumerate(self.runs) if isinstance(run, nn.Module)}
        return {f"activations.{index}.{name}": t for index, state in states.items() for name, t in state.items()}

    @torch.no_grad()
    def init_weights(self, rng: torch.Generator | None = None, std: float = 0.02) -> None:
        """Random weights, for tests and for training from scratch: normal matrices, neutral norms, zero biases."""
        plus_one = self.config.norm == "rms_plus_one"
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, std, generator=rng)
            else:
                parameter.fill_(0.0 if plus_one or name.endswith("bias") else 1.0)

    def _run(
        self, tokens_BT: Tensor, lengths: tuple[int, ...] | None, cache: Past | None, feed: "Feed | None" = None
    ) -> Tensor:
        if feed is None and isinstance(cache, Row) and (stack := self._stack(cache)):
            return stack(tokens_BT if stack.embeddings else self._embed(tokens_BT, cache.position_N), cache)
        position_T, longest = cache.positions(tokens_BT) if cache else self._positions(tokens_BT, lengths)
        rows = self.config.learned_positions
        if rows and longest + self.config.position_offset > rows:
            raise ModelError(f"{longest} tokens exceed the {self.config.context} positions that the model has learned")
        x_BTD = self._embed(tokens_BT, position_T)
        place = Place(self._tables(position_T, longest, x_BTD.dtype), lengths, cache, feed)
        runs = self.runs if torch.is_grad_enabled() else []  # without gradients nothing is kept
        for run in runs or self.layers:
            x_BTD = run(x_BTD, place)
        trunk = self.model
        if trunk.norm is not None:
            x_BTD = trunk.norm(x_BTD)
        return x_BTD if trunk.project_out is None else trunk.project_out(x_BTD)

    def _stack(self, cache: Row) -> Stack | None:
        """All below the head as one operator, where it can run as one now."""
        if torch.is_grad_enabled() or not cache.suits(self.dtype):
            return None
        if self._blocks is None or (self._blocks and not self._blocks.untouched()):
            self._blocks = stack_of(self) or False
        return self._blocks if self._blocks and self._blocks.idle() else None

    @staticmethod
    def _positions(tokens_BT: Tensor, lengths: tuple[int, ...] | None) -> tuple[Tensor, int]:
        """The positions of the tokens in their documents, and the longest document's length."""
        if lengths is None:
            lengths = (tokens_BT.shape[1],)
        longest = max(lengths)
        position = torch.arange(longest, device=tokens_BT.device)
        return torch.cat([position[:length] for length in lengths]), longest

    def _embed(self, tokens_BT: Tensor, position_T: Tensor) -> Tensor:
        trunk, config = self.model, self.config
        x_BTD = trunk.embed_tokens(tokens_BT)
        if config.embed_scale != 1:  # rounded to the weights' type first, as in training
            x_BTD = x_BTD * torch.full((), config.embed_scale, dtype=x_BTD.dtype, device=x_BTD.device)
        if trunk.project_in is not None:
            x_BTD = trunk.project_in(x_BTD)
        if trunk.embed_positions is not None:
            x_BTD = x_BTD + trunk.embed_positions(position_T + config.position_offset)
        return x_BTD

    def _tables(self, position_T: Tensor, longest: int, dtype: torch.dtype) -> dict:
        dim = self.config.head_dim
        ropes = {kind.rope for kind in self.config.pattern if kind.rope}
        return {rope: rope_tables(rope, dim, position_T, longest, dtype) for rope in ropes}
