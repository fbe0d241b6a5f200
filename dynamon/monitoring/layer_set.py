"""The layers of a module while it is trained: they may not be known yet, join, leave, and be made anew."""

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dynamon.distributed.dtensor import reshard
from dynamon.layers import Layer, measurable_layers, select
from dynamon.monitoring.arguments import BadArgumentError


class LayerSet:
    """Which layers there are, read anew when they have changed.

    Two signs tell a change. Where an optimizer holds another number of parameters than before, which is cheap to see,
    it is noticed at every step. Everything else, a lazy module that has got its shape, a parameter that was replaced,
    renamed or deleted, is noticed where the layers are asked for, by names and identity of all parameters: only steps
    that measure something ask.

    Args:
        module: The module.
        patterns: Globs for those that are chosen, or None for all.
        roles: Roles by glob, as ``overrides`` of :func:`dynamon.layers.describe_layers`.

    Raises:
        BadArgumentError: Where a glob of ``roles`` matches nothing that can have the role.
    """

    def __init__(
        self, module: nn.Module, patterns: Sequence[str] | None, roles: Mapping[str, str] | None = None
    ) -> None:
        """Read them."""
        self._module, self._patterns, self._roles = module, patterns, roles
        self._held: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._seen: list[tuple[str, int, bool]] | None = None
        self._looked = self._joined = False
        self._every: list[Layer] = []
        self._chosen: list[Layer] = []
        self._names: dict[int, str] = {}
        self._version = 0
        self._look()

    def hook(self, optimizer: Optimizer | None = None) -> None:
        """A hook begins, perhaps an optimizer's: what was looked at before may be out of date."""
        self._looked = False
        if optimizer is not None:
            count = sum(len(group["params"]) for group in optimizer.param_groups)
            if self._held.get(optimizer) != count:
                self._held[optimizer], self._joined = count, True

    @property
    def every(self) -> list[Layer]:
        """All that can be measured."""
        self._look()
        return self._every

    @property
    def chosen(self) -> list[Layer]:
        """Return those that the globs choose."""
        self._look()
        return self._chosen

    @property
    def version(self) -> int:
        """Return how often they have changed."""
        self._look()
        return self._version

    @property
    def names(self) -> dict[int, str]:
        """Names by the ``id`` of the parameter; looked up at every step, so only the cheap sign is minded."""
        if self._joined:
            self._look()
        return self._names

    def _look(self) -> None:
        """See whether the layers have changed, once a hook."""
        if self._looked:
            return
        self._looked, self._joined = True, False
        if self._signs() != self._seen:
            reshard(self._module)  # whole weights in the place of FSDP2's shards are no change
            if self._signs() != self._seen:
                self._read()

    def _signs(self) -> list[tuple[str, int, bool]]:
        return [(name, id(p), is_lazy(p)) for name, p in self._module.named_parameters()]

    def _read(self) -> None:
        try:
            self._every = measurable_layers(self._module, self._roles)
        except ValueError as error:
            raise BadArgumentError(f"roles: {error}") from error
        self._chosen = select(self._every, self._patterns)
        self._names = {id(layer.parameter): layer.name for layer in self._every}
        self._seen = self._signs()
        self._version += 1
