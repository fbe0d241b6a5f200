"""Batches as people have them: containers of any class, and what a sample is in them."""

import collections
import dataclasses
import io
import threading
import warnings
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from dynamon.batches import (
    UnknownClassError,
    batch_weight,
    clone,
    count_samples,
    entries,
    restored,
    saved,
    take_samples,
)

CPU = torch.device("cpu")
N = 8


class Encoding(UserDict):
    """As tokenizers return it: a mapping that is no dict, with attributes and access by attribute."""

    def __init__(self, data: Any = None, extra: str = "") -> None:
        super().__init__(data)
        self.extra = extra

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> "Encoding":
        return Encoding({k: v.to(device) for k, v in self.items()}, self.extra)


class ReadOnly(Mapping):
    """A mapping whose constructor takes keywords only."""

    def __init__(self, **known: Any) -> None:
        self._known = known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def __iter__(self) -> Any:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


class Table(MutableMapping):
    """As TensorDict: a mapping with a batch size and an indexing of its own."""

    def __init__(self, source: Mapping[str, Tensor], batch_size: list[int]) -> None:
        self._columns, self.batch_size = dict(source), torch.Size(batch_size)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._columns[key]
        columns = {name: tensor[key] for name, tensor in self._columns.items()}
        return Table(columns, [len(next(iter(columns.values())))])

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._columns[key] = value

    def __delitem__(self, key: str) -> None:
        del self._columns[key]

    def __iter__(self) -> Any:
        return iter(self._columns)

    def __len__(self) -> int:
        return self.batch_size[0]

    def to(self, device: Any) -> "Table":
        return Table({name: tensor.to(device) for name, tensor in self._columns.items()}, list(self.batch_size))


@dataclasses.dataclass(frozen=True)
class Pair:
    """Frozen, with an argument that is no field, and a field that is no argument."""

    x: Tensor
    y: Tensor
    factor: dataclasses.InitVar[float] = 2.0
    scaled: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self, factor: float) -> None:
        object.__setattr__(self, "scaled", self.x * factor)


@dataclasses.dataclass
class Nested:
    pair: Pair
    names: list[str]
    meta: dict[str, Any]


@dataclasses.dataclass(slots=True)
class Slots:
    x: Tensor
    y: Tensor


class Tagged(OrderedDict):
    """Its constructor wants something else than items."""

    def __init__(self, tag: str, items: Any) -> None:
        super().__init__(items)
        self.tag = tag


class Items(list):
    pass


Point = collections.namedtuple("Point", "x y")


class Instances:
    """An object that can be indexed itself."""

    def __init__(self, boxes: Tensor, labels: Tensor) -> None:
        self.boxes, self.labels = boxes, labels

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, place: Any) -> "Instances":
        return Instances(self.boxes[place], self.labels[place])

    def to(self, device: Any) -> "Instances":
        return Instances(self.boxes.to(device), self.labels.to(device))


class Graphs:
    """As a batch of graphs: only the object knows how its tensors belong together."""

    def __init__(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> None:
        self.x, self.edge_index, self.batch = x, edge_index, batch

    @property
    def num_graphs(self) -> int:
        return int(self.batch.max()) + 1

    def to(self, device: Any) -> "Graphs":
        self.x = self.x.to(device)
        return self


class Locked(UserDict):
    """Something beside its entries can neither be copied nor pickled."""

    def __init__(self, data: Any = None) -> None:
        super().__init__(data)
        self.lock = threading.Lock()


class Special(Tensor):
    """A tensor of a class of its own."""


def _xy() -> tuple[Tensor, Tensor]:
    return torch.arange(5.0 * N).reshape(N, 5), torch.arange(N) % 3


def _ragged(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that nested tensors are a prototype
        return torch.nested.nested_tensor([torch.full((3 + i, 2), float(i)) for i in range(N)], layout=layout)


X, Y = _xy()
CUT = {
    "encoding": Encoding({"x": X, "y": Y}, "kept"),
    "read only": ReadOnly(x=X, y=Y),
    "proxy": MappingProxyType({"x": X, "y": Y}),
    "table": Table({"x": X, "y": Y}, [N]),
    "dataclass": Pair(X, Y),
    "nested": Nested(Pair(X, Y), list("abcdefgh"), {"deep": [Y]}),
    "slots": Slots(X, Y),
    "tagged": Tagged("kept", {"x": X, "y": Y}.items()),
    "defaultdict": defaultdict(list, x=X, y=Y),
    "list class": Items([X, Y]),
    "named tuple": Point(X, (Y, "text", None)),
    "deque": collections.deque([X, Y]),
    "loaders by name": {"a": (X, Y), "b": None},
    "loaders in a list": [(X, Y), None],
    "instances": Instances(X, Y),
    "sparse": (X.to_sparse(), Y),
    "ragged": (_ragged(torch.strided), Y),
    "jagged": (_ragged(torch.jagged), Y),
    "array": {"x": X, "y": Y, "ids": np.arange(N)},
    "locked": Locked({"x": X, "y": Y}),
    "texts": {"x": X, "y": Y, "text": tuple("abcdefgh"), "shape": (3, 8, 9)},
    "subclass": (X.clone().as_subclass(Special), Y),
    "an object beside": (X, SimpleNamespace(a=1), Y),
    "labels one by one": (X, [torch.tensor(i % 3) for i in range(N)], Y),
}
NOT_SAVED = {"proxy", "locked"}  # they cannot be pickled, so no loader with workers gives them either


def leaves(value: Any) -> list[Any]:
    """Tensors, arrays and texts in any container, in their order."""
    if isinstance(value, Instances | Graphs):
        return [leaf for item in vars(value).values() for leaf in leaves(item)]
    held = entries(value)
    return [value] if held is None else [leaf for item in held.values() for leaf in leaves(item)]


def plain(tensor: Tensor) -> list[Any]:
    if tensor.is_nested:
        return [t.tolist() for t in tensor.unbind()]
    return tensor.to_dense().tolist()


def same(one: Any, other: Any) -> bool:
    first, second = leaves(one), leaves(other)
    if type(one) is not type(other) or len(first) != len(second):
        return False
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, Tensor)]
    return all(type(a) is type(b) and a.layout == b.layout and plain(a) == plain(b) for a, b in pairs)


@pytest.mark.parametrize("sizes", [(), (N,), (64, N)], ids=str)
@pytest.mark.parametrize("name", CUT)
def test_every_container_is_cut_alike(name: str, sizes: tuple[int, ...]) -> None:
    batch = CUT[name]
    if name == "instances" and not sizes:
        return  # its length alone is not several signs
    before = [plain(t) for t in leaves(batch) if isinstance(t, Tensor)]
    found = take_samples(batch, 0.25, sizes=sizes)
    assert found.samples == 2 and found.is_cut and found.reason is None and type(found.batch) is type(batch)
    assert count_samples(batch, sizes) == N
    for part, whole in zip(leaves(found.batch), leaves(batch), strict=False):
        if isinstance(whole, Tensor) and whole.ndim:
            assert plain(part) == plain(whole)[:2] and type(part) is type(whole)
        elif isinstance(whole, np.ndarray):
            assert part.tolist() == whole.tolist()[:2]
    assert [plain(t) for t in leaves(batch) if isinstance(t, Tensor)] == before  # and the batch is as it was
    for attribute in ("extra", "tag"):
        if hasattr(batch, attribute):
            assert getattr(found.batch, attribute) == "kept"
    if name == "texts":
        assert found.batch["text"] == ("a", "b") and found.batch["shape"] == (3, 8, 9)
    if name == "table":
        assert found.batch.batch_size == torch.Size([2])


@pytest.mark.parametrize("name", CUT)
def test_every_container_is_copied_and_shares_nothing(name: str) -> None:
    copied = clone(CUT[name])
    assert same(copied, CUT[name])
    for a, b in zip(leaves(copied), leaves(CUT[name]), strict=True):
        if isinstance(a, Tensor):
            assert a is not b
        if isinstance(a, Tensor) and a.layout is torch.strided and not a.is_nested:
            assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("name", CUT)
def test_every_container_goes_through_a_checkpoint(name: str) -> None:
    batch = CUT[name]
    part = take_samples(batch, 0.25, sizes=[N]).batch
    state = saved(part)
    if name in NOT_SAVED:
        assert state is None
        return
    assert state is not None
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same(restored(loaded, CPU, like=batch), part)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("called",)


@pytest.mark.parametrize("batch", [Encoding({"x": X}), (X, Evil()), Pair(X, Y)], ids=["class", "function", "dataclass"])
def test_a_checkpoint_brings_no_class_and_no_function(batch: Any, capsys) -> None:
    state = saved(batch)
    assert state is not None
    with pytest.raises(UnknownClassError):
        restored(state, CPU, like={"x": X, "y": Y})
    with pytest.raises(UnknownClassError):
        restored(state, CPU)
    assert "called" not in capsys.readouterr().out


def _images(count: int = N) -> list[Tensor]:
    return [torch.randn(3, 8 + i, 9) for i in range(count)]


def _clouds() -> list[Tensor]:
    return [torch.randn(64, 3) + i for i in range(N)]


def test_a_list_as_long_as_the_loader_says_holds_whole_samples() -> None:
    images, boxes = _images(), tuple({"boxes": torch.randn(i + 1, 4), "label": torch.tensor(i)} for i in range(N))
    found = take_samples((tuple(images), boxes), 0.25, sizes=[N])
    assert found.samples == 2 and [t.shape for t in found.batch[0]] == [t.shape for t in images[:2]]
    assert [len(b["boxes"]) for b in found.batch[1]] == [1, 2] and isinstance(found.batch[1], tuple)
    found = take_samples(_clouds(), 0.5, sizes=[N])
    assert found.samples == 4 and all(t.shape == (64, 3) for t in found.batch)


_perm = torch.randperm(N, generator=torch.Generator().manual_seed(0))
WHOLE = {  # batch, what the loader says, samples that are known, a word of the reason
    "images": (_images(), (), None, "list of like tensors"),
    "clouds": (_clouds(), (), None, "list of like tensors"),
    "time first": ((torch.randn(32, 4, 5), torch.ones(32, 4).long()), (), None, "first two dimensions"),
    "time first, of a loader": ((torch.randn(32, 4, 5), torch.ones(32, 4).long()), (4,), 4, "begin with 32"),
    "as long as many": ((torch.randn(4, 4, 5), torch.ones(4, 4).long()), (4,), 4, "cannot be told apart"),
    "one tensor": (torch.randn(32, 4), (), None, "first two dimensions"),
    "packed": ((pack_sequence([torch.ones(3, 2)] * N), Y), (N,), N, "PackedSequence"),
    "packed alone": (pack_sequence([torch.ones(3, 2)] * N), (), N, "PackedSequence"),
    "graphs": (Graphs(torch.randn(20, 3), torch.ones(2, 40).long(), torch.arange(20) % N), (), N, "Graphs"),
    "graph entries": ({"x": torch.randn(20, 3), "edge_index": torch.ones(2, 40).long(), "y": Y}, (N,), N, "begin with"),
    "batches of batches": ((X, Y), (1,), None, "begin with 8 where"),
    "two loaders": ({"a": (X, Y), "b": (X[:4], Y[:4])}, (N, 4), N, "begin with 4 and 8"),
    "partners": ((X, Y, _perm), (N,), N, "places in the batch"),
    "eight columns": ([torch.randn(N, 3) for _ in range(N)], (N,), N, "two ways"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_where_signs_disagree_the_whole_batch_is_taken(name: str) -> None:
    batch, sizes, samples, word = WHOLE[name]
    found = take_samples(batch, 0.25, sizes=sizes)
    assert not found.is_cut and found.samples == samples and same(found.batch, batch)
    assert found.reason is not None and word in found.reason, found.reason
    assert take_samples(batch, 1.0, sizes=sizes).reason is None or name == "partners"  # nothing was to be left out


def test_labels_and_words_are_not_places() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 2, 1, 0, 9, 8, 7, 3, 3, 1, 2])
    assert take_samples((torch.randn(16, 3), labels), 0.25, sizes=[16]).samples == 4
    words = torch.randint(50, (16, 12), generator=torch.Generator().manual_seed(0))
    assert take_samples((words, words), 0.25, sizes=[16]).samples == 4
    own = torch.arange(16)  # each sample's partner is itself: what is left points to what is left
    assert take_samples((torch.randn(16, 3), own), 0.25, sizes=[16]).samples == 4


@pytest.mark.parametrize("name", ["encoding", "read only", "table", "dataclass", "slots", "named tuple", "instances"])
def test_a_weight_is_found_in_any_container(name: str) -> None:
    where = "labels" if name == "instances" else "x"
    expected = float((Y if name == "instances" else X).sum())
    assert batch_weight(CUT[name], where) == expected
    with pytest.raises(ValueError, match="the batch has no 'mask' to weigh it by"):
        batch_weight(CUT[name], "mask")
