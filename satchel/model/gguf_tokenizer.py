"""The tokenizer that a GGUF file describes, as the one that the model was published with.

`gpt2`: byte-level BPE; the file gives vocabulary, merges and, as `tokenizer.ggml.pre`, the name of the rule that cuts
text into words first. `llama`: SentencePiece BPE with bytes for what is unknown; its merges follow from the
vocabulary: of two pieces that make a third, the third's score is the rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from satchel.core.errors import ModelError, nearest

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types
SPACE = "\u2581"

_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}*{_LETTERS[1]}+%s|[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}+{_LETTERS[1]}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)
_TEKKEN = _CASED % ("", "", "")
_O200K = _CASED % (_ENDINGS + "?", _ENDINGS + "?", "{1,3}")

# The rule's name to (regular expression of words; '' is GPT-2's own, 'digits' cuts digits apart before it).
WORDS = (
    dict.fromkeys(("gpt-2", "gpt2", "olmo", "jais", "mpt", "phi-2", "gpt-neox", "exaone"), "")
    | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "digits")
    | dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3", "pixtral"), _CL100K)
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2)
    | {"tekken": _TEKKEN, "gpt-4o": _O200K, "llama4": _O200K}
)
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken", "pixtral")  # a word in the vocabulary is never cut
COMPOSED = ("qwen2", "deepseek-r1-qwen", "megrez", "gpt-neox")  # text is brought into Unicode's form C first


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """From the metadata of a GGUF file. ModelError for a kind of tokenizer that we cannot make exactly."""
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders or not metadata.get("tokenizer.ggml.tokens"):
        raise ModelError(
            f"the file's tokenizer is of kind {kind!r}; we make {' and '.join(builders)}: load the model from its "
            "Hugging Face folder, which brings tokenizer.json"
        )
    tokenizer = builders[kind](metadata)
    _add_special(tokenizer, metadata)
    bos = token_of(metadata, "bos")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        index = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, index)]
        )
    return tokenizer


def token_of(metadata: Mapping[str, Any], role: str) -> str | None:
    """The text of the `bos`, `eos`, `unknown` or `padding` token, if the file names one."""
    index, tokens = metadata.get(f"tokenizer.ggml.{role}_token_id"), metadata["tokenizer.ggml.tokens"]
    return tokens[index] if index is not None and index < len(tokens) else None


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    rule = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if rule not in WORDS:
        raise ModelError(
            f"the file's tokenizer cuts words by the rule '{rule}', which we do not know; {nearest(rule, WORDS)} "
            "Load the model from its Hugging Face folder, which brings tokenizer.json"
        )
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=rule in WHOLE_WORDS))
    if rule in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _words(WORDS[rule])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern in ("", "digits"):
        words = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True)] * bool(pattern) + words)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    architecture = metadata.get("general.architecture", "")
    gemma = architecture.startswith("gemma")
    tokens = metadata["tokenizer.ggml.tokens"]
    if gemma:  # runs of spaces are written as spaces in these files, and ranked by place, not by score
        tokens = [SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]
    rank = list(range(0, -len(tokens), -1)) if gemma else metadata["tokenizer.ggml.scores"]
    merges = _merges(tokens, rank)
    unknown = token_of(metadata, "unknown") if gemma else None
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unknown))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", not gemma) and not gemma
    _spaces(tokenizer, "" if not prefix else "text" if architecture == "phi3" else "first")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * bool(prefix))
    return tokenizer


def _spaces(tokenizer: Tokenizer, prefix: str) -> None:
    """Write spaces as SPACE, and one before the text: '' never, 'first' unless there is one, 'text' always."""
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
        return
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace


def _merges(tokens: Sequence[str], rank: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best rank first; among equals as SentencePiece would meet them."""
    index = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, rank, strict=True):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in index and right in index]
        pairs.sort(key=lambda pair: (index[pair[0]], index[pair[1]]))
        found += [(score, left, right) for left, right in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _add_special(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Tokens that are found whole in the text: control tokens, and what the model's makers added."""
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    pairs = list(zip(metadata["tokenizer.ggml.tokens"], kinds, strict=False))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in pairs if k == CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in pairs if k == USER_DEFINED])
