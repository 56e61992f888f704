"""Put adapters around a model's linear maps, and take them off again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from satchel.core.errors import ModelError, UserError
from satchel.core.seams import Adapter
from satchel.model.linear import dense_OI, features, linears, swap

# N tokens, I inputs, O outputs


class Adapted(nn.Module):
    """A frozen linear map with adapters around it, by name; the first stands nearest to the map.

    Each adapter is called as `adapter(x_NI, base)`, `base` being the map with the adapters before it, and returns
    y_NO. It has no `weight`: code that would read one gets an error, not the base without its adapters.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = features(base)
        self.adapters = nn.ModuleDict()
        self.methods: dict[str, Adapter] = {}  # what made each of the adapters
        self.frozen: list[nn.Parameter] = []  # of the whole model: trained before the adapters came, and will again
        self.train(base.training)

    def add(self, name: str, method: Adapter, module: nn.Module) -> None:
        """Put an adapter around those that are here."""
        self.adapters[name] = module.train(self.training)
        self.methods[name] = method

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return self.run(x.reshape(-1, self.in_features), self.base).view(*x.shape[:-1], self.out_features)

    def run(self, x_NI: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The adapters around another base: [N, O]. Each may write into what it calls: nobody else holds it."""
        call = base
        for index, adapter in enumerate(self.adapters.values()):
            inner = partial(_fresh, call) if index else call
            call = partial(adapter, base=inner)
        return call(x_NI)

    def dense(self) -> Tensor:
        """The base's matrix, without the adapters."""
        return dense_OI(self.base)


def _fresh(call: Callable[[Tensor], Tensor], x_NI: Tensor) -> Tensor:
    return call(x_NI).clone()  # an inner adapter may keep its output for its backward pass


def attach(
    model: nn.Module,
    adapter: Adapter,
    rng: torch.Generator | None = None,
    *,
    targets: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    name: str = "default",
) -> list[str]:
    """Freeze the model and adapt its linear maps; the paths of those are returned.

    `targets` (see `linears`) go before the adapter's own knob of that name; `dtype` is that of the new parameters.
    Raises UnknownName for a target that matches nothing, ModelError where `name` is attached already.
    """
    paths = list(linears(model, targets or getattr(adapter, "targets", ())))
    if not paths:
        raise UserError(f"{adapter.name}: the model has no linear map to adapt; name them with targets=")
    install(model, dict.fromkeys(paths, adapter), rng, dtype=dtype, name=name)
    return paths


def install(
    model: nn.Module,
    methods: Mapping[str, Adapter],
    rng: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    name: str = "default",
) -> None:
    """`attach` with an adapter for each path. Nothing is changed if one of them is refused."""
    places = {path: model.get_submodule(path) for path in methods}
    if any(isinstance(place, Adapted) and name in place.adapters for place in places.values()):
        raise ModelError(f"an adapter '{name}' is attached already; detach it or give the new one another name")
    made = {path: methods[path].attach(path, place, rng) for path, place in places.items()}
    frozen = freeze(model)
    for path, module in made.items():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)  # Module.to cannot swap fake tensors
        place = places[path]
        if not isinstance(place, Adapted):
            place = Adapted(place)
            swap(model, path, place)
        place.add(name, methods[path], module)
        place.frozen, frozen = place.frozen + frozen, []


def freeze(model: nn.Module) -> list[nn.Parameter]:
    """Switch gradients off for all parameters but adapters'; those that had them are returned."""
    ours = {id(p) for _, p in adapter_parameters(model)}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    for parameter in trained:
        parameter.requires_grad_(False)
    return trained


def detach(model: nn.Module) -> None:
    """Take all adapters off: the very modules that were there before, and what trained before trains again."""
    for path, place in list(adapted(model)):
        swap(model, path, place.base)
        for parameter in place.frozen:
            parameter.requires_grad_(True)


def adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Adapted maps by path, in the model's order."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, Adapted))


def adapter_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters of all adapters with their names in the model's state dict."""
    return [
        (f"{path}.adapters.{name}", parameter)
        for path, place in adapted(model)
        for name, parameter in place.adapters.named_parameters()
    ]
