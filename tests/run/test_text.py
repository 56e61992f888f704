from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from satchel.run.text import StopTexts, TextStream

TEXTS = st.text("ab", max_size=12)


@given(st.lists(TEXTS, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_text_however_it_arrives(pieces, stops):
    whole, through = "".join(pieces), StopTexts(stops)
    out = "".join(through.push(piece) for piece in pieces) + through.rest()
    ends = [whole.find(stop) for stop in stops if stop in whole]
    if through.met is None:
        assert not ends and out == whole
    else:
        assert through.met in stops and whole.startswith(out + through.met)
        assert all(stop not in out for stop in stops)


@given(TEXTS)
def test_nothing_is_held_back_that_cannot_become_a_stop_text(text):
    through = StopTexts(["bbx"])
    out = through.push(text)
    held = text[len(out) :]
    assert text.startswith(out) and held in ("", "b", "bb")


def bytes_tokenizer():
    """One token a byte, so that most characters span several tokens."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()

    class Bytes:
        encode = staticmethod(lambda text: backend.encode(text).ids)
        decode = staticmethod(lambda ids, skip_special=True: backend.decode(list(ids)))

    return Bytes()


@given(st.text(max_size=30))
def test_streamed_characters_come_out_whole_and_add_up(text):
    tokenizer = bytes_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.rest() == text
    assert all(piece in text for piece in pieces)
