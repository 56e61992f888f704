"""What the optimizers share: how they walk over parameters, keep moments, and land an update in a narrow parameter.

Every elementwise update is one operator, `satchel::adam_` or `satchel::move_`: a rehearsal sees one operation a
parameter. On a CPU it is the kernel of native/adam.cpp, one pass over memory. Elsewhere, and without a C++ compiler, it
is the same arithmetic in torch over slices that stay in the processor's cache, so that temporaries are a few slices
whatever the model. Both give the same bits.

A bfloat16 parameter has 8 bits of precision: an update below 1/512 of it is lost by rounding to nearest. Two cures:

    stochastic   round up with a probability of the distance to the lower neighbour: right on average, no bytes
    fp32         keep the low 16 bits beside the parameter: the exact float32 master at 2 bytes a parameter

The noise of stochastic rounding is a hash of (seed, element), and the seed one of (job's seed, parameter, step):
nothing to save, a resumed run continues bit for bit, and slices and threads change nothing.
"""

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from satchel.core.errors import UserError
from satchel.native.adam import KINDS, SPLIT, STOCHASTIC, Array, Rates, loaded, takes
from satchel.native.operators import operator, walk
from satchel.optim._blockwise import BLOCK, Blockwise

# N elements of a flattened parameter, or of one slice of it

ROUNDINGS = ("stochastic", "fp32", "nearest")
SLICE = {"cpu": 1 << 17}  # elements worked on at once: 512 KiB in float32 stays in a core's cache
SLICE_DEVICE = 1 << 22  # elsewhere a slice has to fill the machine


def slices(count: int, device: torch.device) -> Iterator[slice]:
    """Cuts `range(count)` into slices of bounded size, each a whole number of quantisation blocks."""
    width = SLICE.get(device.type, SLICE_DEVICE)
    assert width % BLOCK == 0
    return (slice(start, min(start + width, count)) for start in walk(range(0, count, width)))


@contextmanager
def few_barriers() -> Iterator[None]:
    """On machines of up to two threads, run on one.

    Slices are short, and threads meet after every operation: two gain little over one, and where another process
    takes one of their cores they wait for each other 20 times longer than they work.
    """
    threads = torch.get_num_threads()
    if threads > 2:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def widen(x_N: Tensor) -> Tensor:
    """x_N itself if it is float32, else a float32 copy."""
    return x_N if x_N.dtype == torch.float32 else x_N.float()


def hashed(seed: int, cut: slice, device: torch.device) -> Tensor:
    """32 random bits for each element of a slice, in int32; as in native/adam.cpp."""
    x_N = torch.arange(cut.stop - cut.start, dtype=torch.int32, device=device).add_(_int32(seed + cut.start))
    x_N.bitwise_xor_(_upper(x_N, 16)).mul_(0x7FEB352D)
    x_N.bitwise_xor_(_upper(x_N, 15)).add_(_int32(seed * 0x9E3779B9)).mul_(_int32(0x846CA68B))
    return x_N.bitwise_xor_(_upper(x_N, 16))


def noises(seed: int, cut: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two independent int32 numbers for each element of a slice, uniform in [0, 2^16)."""
    bits_N = hashed(seed, cut, device)
    return bits_N & 0xFFFF, _upper(bits_N, 16)


def _upper(x_N: Tensor, shift: int) -> Tensor:
    """x_N shifted right with zeros coming in."""
    return (x_N >> shift).bitwise_and_((1 << (32 - shift)) - 1)


def _int32(number: int) -> int:
    """The signed number with the same lower 32 bits."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def land_(x_N: Tensor, wide_N: Tensor, noise_N: Tensor | None) -> None:
    """Write float32 values into x_N; with noise, bfloat16 is rounded stochastically and wide_N is used up."""
    if x_N.dtype == torch.float32 or noise_N is None:
        if x_N.untyped_storage() is not wide_N.untyped_storage():
            x_N.copy_(wide_N)
        return
    bits_N = wide_N.view(torch.int32).add_(noise_N).bitwise_and_(-(1 << 16))
    x_N.copy_(bits_N.view(torch.float32))


def join(high_N: Tensor, low_N: Tensor) -> Tensor:
    """The float32 value of a bfloat16 parameter and the signed low half that `split_` kept of it."""
    return high_N.float().view(torch.int32).add_(low_N).view(torch.float32)


def split_(high_N: Tensor, low_N: Tensor, wide_N: Tensor) -> None:
    """Write float32 values as the nearest bfloat16 and the rest of their bits; `join` gives them back exactly."""
    bits_N = wide_N.view(torch.int32)
    rounded_N = bits_N.add(1 << 15).bitwise_and_(-(1 << 16))
    high_N.copy_(rounded_N.view(torch.float32))
    low_N.copy_(bits_N.sub_(rounded_N))


def master(x_N: Tensor, low_N: Tensor | None) -> Tensor:
    """The float32 value of a parameter; x_N itself if it is float32."""
    return widen(x_N) if low_N is None else join(x_N, low_N)


def land_master_(x_N: Tensor, low_N: Tensor | None, wide_N: Tensor, noise_N: Tensor | None) -> None:
    """Write a parameter's float32 value, which is used up."""
    if low_N is None:
        land_(x_N, wide_N, noise_N)
    else:
        split_(x_N, low_N, wide_N)


def parameter_array(x_N: Tensor, low_N: Tensor | None, rounding: str) -> Array:
    """A parameter as the kernel knows it."""
    if low_N is not None:
        return Array(SPLIT, x_N, low=low_N)
    return Array(STOCHASTIC if rounding == "stochastic" and x_N.dtype != torch.float32 else KINDS[x_N.dtype], x_N)


@dataclass(frozen=True)
class Plain:
    """Moments kept in one dtype. bfloat16 takes a slowly moving second moment only with stochastic rounding."""

    dtype: torch.dtype

    def zeros(self, count: int, device: torch.device, signed: bool) -> dict[str, Tensor]:
        """The state of one moment of `count` elements."""
        return {"": torch.zeros(count, dtype=self.dtype, device=device)}

    def read(self, held: Sequence[Tensor], cut: slice, signed: bool) -> Tensor:
        """The moment's slice in float32."""
        return widen(held[0][cut])

    def write_(self, held: Sequence[Tensor], cut: slice, wide_N: Tensor, signed: bool, noise_N: Tensor | None) -> None:
        """Put the slice back. The first moment moves by a tenth of itself a step, far above bfloat16's rounding."""
        land_(held[0][cut], wide_N, None if signed else noise_N)

    def array(self, held: Sequence[Tensor], signed: bool) -> Array:
        """The moment as the kernel knows it."""
        narrow = self.dtype == torch.bfloat16 and not signed
        return Array(STOCHASTIC if narrow else KINDS[self.dtype], held[0])


STORES = {"fp32": Plain(torch.float32), "bf16": Plain(torch.bfloat16), "8bit": Blockwise()}
MOMENTS = ("exp_avg", "exp_avg_sq")


def store_name(moments: str, parameter: Tensor, least_quantised: int = 4096) -> str:
    """Which of STORES keeps the moments of a parameter; as in bitsandbytes, small ones are not quantised."""
    if moments == "follow":
        return "bf16" if parameter.dtype == torch.bfloat16 else "fp32"
    return "fp32" if moments == "8bit" and parameter.numel() < least_quantised else moments


def zero_moments(store: str, count: int, device: torch.device) -> dict[str, Tensor]:
    """Fresh state of both moments, for an optimizer's state of one parameter."""
    return {
        name + suffix: tensor
        for name in MOMENTS
        for suffix, tensor in STORES[store].zeros(count, device, signed=name == "exp_avg").items()
    }


def parts(
    held: Sequence[Tensor], x_N: Tensor, rounding: str
) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
    """What an operator holds of a parameter: the first moment's tensors, the second's, and the low bits if kept."""
    split = rounding == "fp32" and x_N.dtype != torch.float32
    count = (len(held) - split) // 2
    return held[:count], held[count : 2 * count], held[-1] if split else None


@few_barriers()
def adam_in_torch_(
    x_N: Tensor,
    g_N: Tensor,
    held: list[Tensor],
    store: str,
    rounding: str,
    beta1: float,
    beta2: float,
    eps: float,
    step_size: float,
    keep: float,
    seed: int,
) -> None:
    """One step of Adam: x = keep * x - step_size * m / (sqrt(v) + eps), with m and v moved towards g and g**2.

    `held` is the first moment's tensors, the second's, and for rounding "fp32" of a bfloat16 x the low bits.
    """
    moments, noisy = STORES[store], store == "bf16" or (rounding == "stochastic" and x_N.dtype != torch.float32)
    first, second, low_N = parts(held, x_N, rounding)
    for cut in slices(x_N.numel(), x_N.device):
        g = widen(g_N[cut])
        m = moments.read(first, cut, True).lerp_(g, 1 - beta1)
        v = moments.read(second, cut, False).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        low = None if low_N is None else low_N[cut]
        x = master(x_N[cut], low).mul_(keep)
        x.addcdiv_(m, v.sqrt().add_(eps), value=-step_size)
        x_noise, v_noise = noises(seed, cut, x_N.device) if noisy else (None, None)
        moments.write_(first, cut, m, True, None)
        moments.write_(second, cut, v, False, v_noise)
        land_master_(x_N[cut], low, x, x_noise if rounding == "stochastic" else None)


def _adam_in_kernel_(x_N: Tensor, g_N: Tensor, held: list[Tensor], store: str, rounding: str, *numbers: Any) -> None:
    (beta1, beta2, *rates, seed), (first, second, low_N) = numbers, parts(held, x_N, rounding)
    x, g = parameter_array(x_N, low_N, rounding), Array(KINDS[g_N.dtype], g_N)
    m, v = STORES[store].array(first, True), STORES[store].array(second, False)
    loaded().adam_(x, g, m, v, Rates(1 - beta1, beta2, 1 - beta2, *rates), x_N.numel(), seed)


adam_ = operator(
    "adam_(Tensor(a!) x_N, Tensor g_N, Tensor(b!)[] held, str store, str rounding, float beta1, float beta2, "
    "float eps, float step_size, float keep, int seed) -> ()",
    adam_in_torch_,
    _adam_in_kernel_,
    lambda x_N, g_N, *_: takes(x_N, g_N),
)


@few_barriers()
def move_in_torch_(x_N: Tensor, step_N: Tensor, low_N: Tensor | None, rounding: str, keep: float, seed: int) -> None:
    """x = keep * x + step, landed as `rounding` says; low_N is the low half of x's bits, if that is kept."""
    noisy = rounding == "stochastic" and x_N.dtype != torch.float32
    for cut in slices(x_N.numel(), x_N.device):
        low = None if low_N is None else low_N[cut]
        x = master(x_N[cut], low).mul_(keep).add_(step_N[cut])
        land_master_(x_N[cut], low, x, noises(seed, cut, x_N.device)[0] if noisy else None)


def _move_in_kernel_(x_N: Tensor, step_N: Tensor, low_N: Tensor | None, rounding: str, keep: float, seed: int) -> None:
    step = Array(KINDS[step_N.dtype], step_N)
    loaded().move_(parameter_array(x_N, low_N, rounding), step, keep, x_N.numel(), seed)


move_ = operator(
    "move_(Tensor(a!) x_N, Tensor step_N, Tensor(b!)? low_N, str rounding, float keep, int seed) -> ()",
    move_in_torch_,
    _move_in_kernel_,
    lambda x_N, step_N, *_: takes(x_N, step_N),
)


def decay_groups(named_parameters: Sequence[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and norms and biases, which do not. Raises UserError on a dtype it cannot."""
    for name, p in named_parameters:
        if p.dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"{name} is {p.dtype}; train in bf16 or fp32")
    matrices = [(name, p) for name, p in named_parameters if p.ndim > 1]
    vectors = [(name, p) for name, p in named_parameters if p.ndim <= 1]
    pairs = ((matrices, weight_decay), (vectors, 0.0))
    return [{"params": group, "weight_decay": decay} for group, decay in pairs if group]


def gradient(p: Tensor) -> Tensor:
    """p.grad, of a parameter that is being stepped: `Stepper` passes over those that have none."""
    assert p.grad is not None
    return p.grad


class Stepper(torch.optim.Optimizer):
    """A torch optimizer that updates one parameter after the other. State: tensors, ints and strings."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, seed: int, **defaults: Any) -> None:
        super().__init__(groups, {"lr": lr, "seed": seed, **defaults})

    def update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> None:
        """Apply p.grad to p in place; state["step"] counts from 1. `seed` differs by parameter and step."""
        raise NotImplementedError

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """As torch's, but the hook runs before the step's first write rather than before its closure."""
        handle = RemovableHandle(self._write_hooks)
        self._write_hooks[handle.id] = hook
        return handle

    def before_write(self) -> None:
        """Run the step's pre-hooks. Every `step` calls it once, before it changes a parameter or state."""
        for hook in self._write_hooks.values():
            hook(self, (), {})

    @property
    def _write_hooks(self) -> OrderedDict[int, Any]:
        return self.__dict__.setdefault("_hooks_before_write", OrderedDict())  # a copied optimizer has none

    def index(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Every parameter with its group, in the order of the state dict's numbers."""
        return [(group, p) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One optimizer step over every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.before_write()
        for number, (group, p) in enumerate(self.index()):
            self.update_one(number, group, p)
        return loss

    def update_one(self, number: int, group: dict[str, Any], p: Tensor) -> None:
        """Step parameter `number`, if it has a gradient."""
        if p.grad is None:
            return
        state = self.state[p]
        state["step"] = state.get("step", 0) + 1
        torch.autograd.graph.increment_version(p)
        self.update(p, state, group, self.noise(number, group, state))

    def noise(self, number: int, group: dict[str, Any], state: dict[str, Any]) -> int:
        """What the randomness of a step of parameter `number` begins with."""
        return zlib.crc32(f"{group['seed']}/{number}/{state['step']}".encode())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which takes tensors over rather than copies them, except that they keep their dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        for number, (_, p) in enumerate(self.index()):
            saved = state_dict["state"].get(number, {})
            moved = {k: v.to(p.device) if isinstance(v, Tensor) else v for k, v in saved.items()}
            self.state[p].update(moved)
