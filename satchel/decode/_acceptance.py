"""How likely the large model is to keep a guess, by the small one's state after it; and how that is learnt.

    x <- x + silu(W x + b), `depth` times with one W;    chance = softmax(U x + c)[1]

Trained on texts such as the large model goes on with: at every token of a text the small model guesses the next one and
the large one says its own, by the same noise; what is learnt is whether they agree. The small model reads its guesses
rather than the text, as it will when it drafts, but for a share of them: there the text stands and nothing is learnt.
A wrong guess weighs six times a right one. After the authors' code, whose labels are min(1, q/p), the chance under the
rule of rejection; ours are those of the engine's own rule, yes or no.
Code: https://github.com/Kaffaljidhmah2/SpecDec_pp
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from satchel.core.errors import ModelError, UserError
from satchel.model.decoder import Decoder
from satchel.model.forward import HEAD_ROWS
from satchel.model.safetensors_io import Outgoing, read_safetensors, write_safetensors
from satchel.model.stored import Part, Reader

# T tokens of a text, N tokens of all of them, R rows, D width, V vocabulary

FILE = "acceptance.safetensors"
WEIGHT = 6.0  # of a wrong guess
MIX = 0.15  # share of the guesses in whose place the text stands
BATCH = 64  # tokens of a step
HELD_OUT = 8  # of so many texts one is only measured


class Acceptance(nn.Module):
    """The head."""

    depth: Tensor  # [1]: how often the block runs

    def __init__(self, width: int, depth: int = 3) -> None:
        super().__init__()
        self.block, self.out = nn.Linear(width, width), nn.Linear(width, 2)
        self.register_buffer("depth", torch.tensor([float(depth)]))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits [N, 2]: wrong, right; in float32."""
        x_ND = x_ND.float()
        for _ in range(int(self.depth)):
            x_ND = x_ND + F.silu(self.block(x_ND))
        return self.out(x_ND)

    def chance(self, x_ND: Tensor) -> list[float]:
        """That each guess is kept."""
        with torch.inference_mode():
            return self(x_ND).softmax(-1)[:, 1].tolist()

    def save(self, path: str | Path) -> None:
        """Write it, as safetensors."""
        tensors = self.state_dict()
        write_safetensors(
            Path(path), [Outgoing(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]
        )


def read_acceptance(path: Path, width: int) -> Acceptance:
    """The head in a file, for a model of that width. Raises ModelError if it is none, or another model's."""
    if not path.is_file():
        raise ModelError(
            f"{path}: there is no such file; make it with satchel.decode.train_acceptance, as docs/SERVE.md shows"
        )
    head, stored = Acceptance(width), read_safetensors(path)
    shapes = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in stored.items()}:
        raise ModelError(f"{path}: no head for a model of width {width}; train it with the small model that it serves")
    with Reader(stored) as reader:
        for name, tensor in head.state_dict().items():
            reader.read(Part(name), tensor)
    return head.eval()


@dataclass(frozen=True)
class Learnt:
    """A trained head, and what it is worth on texts that it was not trained on."""

    head: Acceptance
    kept: float  # share of the guesses that were right
    loss: float  # weighted as in training
    constant: float  # that of the one probability that suits these texts best


def train_acceptance(
    model: Decoder,
    small: Decoder,
    texts: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    epochs: int = 3,
    depth: int = 3,
    lr: float = 1e-3,
    seed: int = 0,
) -> Learnt:
    """Train a head for a small model whose guesses the large one checks; neither changes.

    `texts`: token ids, each of 2 to the shorter context. `temperature`: at which tokens are chosen, 0 for greedy.
    Keeps one state of the small model for every token. Raises UserError if there are too few texts.
    """
    if len(texts) < HELD_OUT:
        raise UserError(f"texts: {len(texts)} are too few; give at least {HELD_OUT}")
    rng = torch.Generator().manual_seed(seed)
    seen = [_examples(model, small, text, temperature, rng) for text in texts]
    (x_ND, right_N), held_out = _joined(s for i, s in enumerate(seen) if i % HELD_OUT), _joined(seen[::HELD_OUT])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Acceptance(small.config.width, depth)
    _fit(head, x_ND, right_N, epochs, lr, rng)
    with torch.no_grad():
        loss = float(_loss(head(held_out[0]), held_out[1]))
    return Learnt(head.eval(), float(right_N.mean()), loss, _constant(held_out[1]))


def _joined(some: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    states, labels = zip(*some, strict=True)
    return torch.cat(states), torch.cat(labels)


def _fit(head: Acceptance, x_ND: Tensor, right_N: Tensor, epochs: int, lr: float, rng: torch.Generator) -> None:
    steps = epochs * -(-len(x_ND) // BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for _ in range(epochs):
        for some in torch.randperm(len(x_ND), generator=rng).split(BATCH):
            optimizer.zero_grad()
            _loss(head(x_ND[some]), right_N[some]).backward()
            optimizer.step()
            schedule.step()


def _loss(logits_N2: Tensor, right_N: Tensor) -> Tensor:
    """Cross-entropy, a wrong guess weighing WEIGHT."""
    return F.cross_entropy(logits_N2, right_N.long(), weight=logits_N2.new_tensor([WEIGHT, 1.0]))


def _constant(right_N: Tensor) -> float:
    """The least loss that one probability for all can have."""
    wrong, right = WEIGHT * float((1 - right_N).sum()), float(right_N.sum())
    share = right / (wrong + right)
    return -sum(s * math.log(s) for s in (share, 1 - share) if s > 0)


@torch.no_grad()
def _examples(
    model: Decoder, small: Decoder, text: Sequence[int], temperature: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The small model's state after each guess that stands, and whether it was right."""
    text_T = torch.tensor(text)
    guess_T, said_T = _chosen(model, small, text_T, temperature, rng)
    stands_T = torch.rand(len(text) - 1, generator=rng) >= MIX
    read_T = torch.cat([text_T[:1], torch.where(stands_T, guess_T, text_T[1:])])
    x_TD = small.hidden(read_T[None])[0, 1:]
    return x_TD[stands_T], (guess_T == said_T)[stands_T].float()


def _chosen(
    model: Decoder, small: Decoder, text_T: Tensor, temperature: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What both models say after each token but the last, by the same noise."""
    states = [each.hidden(text_T[None, :-1])[0].split(HEAD_ROWS) for each in (small, model)]
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for pair in zip(*states, strict=True):
        logits = [each.logits(x_RD[None])[0].float() for each, x_RD in zip((small, model), pair, strict=True)]
        shared = min(l_RV.shape[1] for l_RV in logits)
        noise_RV = torch.empty(len(pair[0]), shared).exponential_(generator=rng).log_().neg_()  # Gumbel's
        for into, logits_RV in zip(found, logits, strict=True):
            into.append((logits_RV[:, :shared] + temperature * noise_RV).argmax(1))
    return torch.cat(found[0]), torch.cat(found[1])
