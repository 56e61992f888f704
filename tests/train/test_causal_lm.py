import pytest
import torch
import torch.nn.functional as F
from torch import nn

from satchel.core.errors import UserError
from satchel.train.causal_lm import CausalLM
from tests.tolerances import TOLERANCE
from tests.train.toys import toy_batch, toy_decoder

EXACT = TOLERANCE[torch.float32]


class Opaque(nn.Module):
    """A head without a matrix of its own, as a packed or an adapted one."""

    def __init__(self, head):
        super().__init__()
        self.base = head

    def forward(self, x):
        return self.base(x)


def reference(decoder, batch):
    logits_NV = decoder(batch.tokens_1N, lengths=batch.lengths)[0]
    return F.cross_entropy(logits_NV, batch.targets_1N[0], ignore_index=-100, reduction="sum")


def loss_and_gradients(decoder, loss):
    loss.backward()
    gradients = [p.grad.clone() for p in decoder.parameters()]
    decoder.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_loss_and_gradients_equal_those_of_whole_logits(chunk, changes):
    decoder, batch = toy_decoder(**changes), toy_batch()
    want = loss_and_gradients(decoder, reference(decoder, batch))
    got = loss_and_gradients(decoder, CausalLM(chunk=chunk).loss(decoder, batch)[0])
    torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)


def test_a_head_without_a_plain_matrix_gives_the_same():
    decoder, batch = toy_decoder(), toy_batch()
    want = loss_and_gradients(decoder, reference(decoder, batch))
    decoder.lm_head = Opaque(decoder.lm_head)
    got = loss_and_gradients(decoder, CausalLM(chunk=7).loss(decoder, batch)[0])
    torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)


def test_documents_sum_as_if_alone():
    decoder, batch = toy_decoder(), toy_batch()
    parts = zip(batch.tokens_1N.split(batch.lengths, 1), batch.targets_1N.split(batch.lengths, 1), strict=True)
    alone = sum(CausalLM().loss(decoder, type(batch)(t, y, (t.shape[1],), 0))[0] for t, y in parts)
    torch.testing.assert_close(CausalLM().loss(decoder, batch)[0], alone, rtol=EXACT, atol=EXACT)


def test_chunk_below_one_is_refused():
    with pytest.raises(UserError, match="chunk=0 is below 1"):
        CausalLM(chunk=0)
