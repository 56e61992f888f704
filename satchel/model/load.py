"""A decoder from a source: made without memory, then filled parameter by parameter from the mapped files.

Beside the decoder there is never more than a piece of a tensor; with a format, one dense matrix. The same loop runs on
fake tensors with a `FakeReader`, which has no files: that is how a load is rehearsed.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from satchel.core.errors import ModelError
from satchel.core.seams import WeightFormat
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.linear import linears, swap
from satchel.model.source import Source, find_source
from satchel.model.stored import Part, Reader

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"


def load(
    name: str | Source,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    format: WeightFormat | None = None,
    *,
    frozen: bool = False,
) -> Decoder:
    """The model as a Decoder in evaluation mode, its weights in `dtype` on `device`; every parameter requires grad.

    With a `format` the matrices of the layers (not the embeddings, the head or a router) are packed as they arrive;
    where nothing will train, which `frozen` says, a format may have embeddings and head, too.
    Raises ModelError, naming file, tensor and cure, if the source cannot be found or does not match its configuration.
    """
    source = find_source(name) if isinstance(name, str) else name
    decoder = Decoder(source.config, dtype=dtype, device="meta")
    check(source, decoder)
    with source.reader() as reader:
        return fill(decoder, source.parts, reader, device, format, frozen=frozen)


def draw(config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int) -> Decoder:
    """A decoder of random weights, in evaluation mode; on one kind of device a seed gives the same ones each time."""
    decoder = Decoder(config, dtype, device)
    decoder.init_weights(torch.Generator(device).manual_seed(seed))
    return decoder.eval()


def fill(
    decoder: Decoder,
    parts: Mapping[str, Part],
    reader: Reader,
    device: torch.device | str = "cpu",
    format: WeightFormat | None = None,
    *,
    frozen: bool = False,
) -> Decoder:
    """Give a decoder that was made on `meta` its parameters, one by one; with a FakeReader, a rehearsal of that."""
    packed = {f"model.layers.{path}" for path in linears(decoder.layers)} if format else set()
    outer = {EMBEDDINGS, HEAD} if format and frozen else set()
    for path in [path for path, _ in decoder.named_modules()]:
        module = decoder.get_submodule(path)
        if path == HEAD and decoder.config.tied:
            _tie(decoder)
        elif format and path in packed | outer:
            swap(decoder, path, _packed(format, module, path, parts, reader, device))
        else:
            _read(module, path, parts, reader, device)
    return decoder.eval()


def _read(
    module: nn.Module, path: str, parts: Mapping[str, Part], reader: Reader, device: torch.device | str, but: str = ""
) -> None:
    """The module's own parameters, `but` for one."""
    for name, shell in list(module.named_parameters(recurse=False)):
        if name != but:
            out = torch.empty(shell.shape, dtype=shell.dtype, device=device)
            reader.read(parts[f"{path}.{name}"], out)
            setattr(module, name, nn.Parameter(out))


def _packed(
    format: WeightFormat,
    module: nn.Module,
    path: str,
    parts: Mapping[str, Part],
    reader: Reader,
    device: torch.device | str,
) -> nn.Module:
    """What stands for a linear map or the embeddings in this format; the module itself where that stays."""
    weight = module.get_parameter("weight")
    blocks = reader.blocks(parts[f"{path}.weight"], weight.shape) if format.keeps else None
    if blocks:
        packed = format.keep(*blocks, weight.shape[1], weight.dtype).to(device)
        _read(module, path, parts, reader, device, but="weight")
    else:
        _read(module, path, parts, reader, device)
        pack = format.pack_outer if path in (EMBEDDINGS, HEAD) else format.pack
        packed = pack(module.get_parameter("weight").detach())
    if packed is None:
        return module
    bias_O = getattr(module, "bias", None)
    if bias_O is not None:
        packed.bias = bias_O.detach()
    return format.embed(packed) if path == EMBEDDINGS else packed


def _tie(decoder: Decoder) -> None:
    """The head is the matrix of the embeddings, in whatever form."""
    embeddings = decoder.model.embed_tokens
    if isinstance(embeddings, nn.Embedding):
        decoder.lm_head.weight = embeddings.weight
    else:
        swap(decoder, HEAD, embeddings.base)


def check(source: Source, decoder: Decoder) -> None:
    """ModelError if the files lack a parameter, hold a tensor that belongs nowhere, or one of another shape."""
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    spare = {"lm_head.weight"} if source.config.tied else set()
    where = f"{source.path}: the weights do not match the configuration:"
    if missing := sorted(shapes.keys() - source.parts.keys()):
        raise ModelError(f"{where} {_some(missing)} missing; fetch the model again, or correct the configuration")
    if unexpected := sorted(source.parts[name].stored for name in source.parts.keys() - shapes.keys() - spare):
        raise ModelError(f"{where} {_some(unexpected)} not expected; is it a model of another architecture?")
    sharing: dict[str, list[str]] = {}
    for name in shapes:
        sharing.setdefault(source.parts[name].stored, []).append(name)
    for stored, names in sharing.items():
        found = source.tensors[stored].shape
        expected = [_stored_shape(source.parts[name], shapes[name], found) for name in names]
        if not _fits(expected, found):
            listed = " + ".join(str(list(shape)) for shape in expected[:3]) + (" ..." if len(expected) > 3 else "")
            raise ModelError(
                f"{where} '{stored}' is {list(found)}, but {', '.join(names[:3])} should be {listed}; take weights and "
                "configuration from the same place"
            )


def _fits(expected: list[tuple[int, ...]], found: tuple[int, ...]) -> bool:
    """Whether parameters of these shapes fill a stored tensor: one of the same shape, or several of as many numbers."""
    if len(expected) == 1 and _squeezed(expected[0]) != _squeezed(found):
        return False
    return sum(map(math.prod, expected)) == math.prod(found)


def _stored_shape(part: Part, shape: tuple[int, ...], found: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a parameter has in its file: a view of another depth is the same tensor with axes split."""
    view = tuple(part.into(torch.empty(shape, device="meta")).shape) if part.into else shape
    return view if len(view) == len(found) else shape


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more + (" is" if len(names) == 1 else " are")
