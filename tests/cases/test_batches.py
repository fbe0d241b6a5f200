"""Batches as people have them: containers of any class, and what a sample is in them."""

import collections
import dataclasses
import io
import logging
import math
import threading
import warnings
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Sampler, TensorDataset

from dynamon import measure
from dynamon.callbacks import DynamicsMonitor, SharpnessMonitor
from dynamon.curvature import EigenTracker, top_eigenvalues
from dynamon.isolation.batches import batch_weight, clone, items_of
from dynamon.isolation.samples import count_samples, take_samples
from dynamon.isolation.saved_batches import UnknownClassError, pack_batch, unpack_batch
from dynamon.monitoring.sharpness_monitor import QUANTITIES
from tests.helpers import Classifier, batches, cnn, fit
from tests.models import dense_hessian

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
    held = items_of(value)
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


class Alone:
    """A key of which there is one."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not me")


def test_what_cannot_be_copied_is_shared_and_tensors_are_not() -> None:
    only = Alone()
    for kind in (dict, defaultdict, OrderedDict, UserDict):
        batch = kind(list) if kind is defaultdict else kind()
        batch[only], batch["deep"] = X, [(Y, only), Point(Y, "text")]
        copied = clone(batch)
        assert type(copied) is kind and copied["deep"][0][1] is only and set(copied) == {only, "deep"}
        assert all(torch.equal(a, b) for a, b in ((copied[only], X), (copied["deep"][0][0], Y)))
        assert copied[only] is not X and copied["deep"][0][0] is not Y and isinstance(copied["deep"][1], Point)


@pytest.mark.parametrize("name", CUT)
def test_every_container_goes_through_a_checkpoint(name: str) -> None:
    batch = CUT[name]
    part = take_samples(batch, 0.25, sizes=[N]).batch
    state = pack_batch(part)
    if name in NOT_SAVED:
        assert state is None
        return
    assert state is not None
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same(unpack_batch(loaded, CPU, like=batch), part)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("called",)


@pytest.mark.parametrize("batch", [Encoding({"x": X}), (X, Evil()), Pair(X, Y)], ids=["class", "function", "dataclass"])
def test_a_checkpoint_brings_no_class_and_no_function(batch: Any, capsys) -> None:
    state = pack_batch(batch)
    assert state is not None
    with pytest.raises(UnknownClassError):
        unpack_batch(state, CPU, like={"x": X, "y": Y})
    with pytest.raises(UnknownClassError):
        unpack_batch(state, CPU)
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
    "images": (_images(), (), None, "list of similar tensors"),
    "clouds": (_clouds(), (), None, "list of similar tensors"),
    "time first": ((torch.randn(32, 4, 5), torch.ones(32, 4).long()), (), None, "first two dimensions"),
    "time first, of a loader": ((torch.randn(32, 4, 5), torch.ones(32, 4).long()), (4,), 4, "begin with 32"),
    "as long as many": ((torch.randn(4, 4, 5), torch.ones(4, 4).long()), (4,), 4, "cannot be told apart"),
    "one tensor": (torch.randn(32, 4), (), None, "single tensor"),
    "one long tensor": ({"wave": torch.randn(320)}, (), None, "single tensor"),
    "packed": ((pack_sequence([torch.ones(3, 2)] * N), Y), (N,), N, "PackedSequence"),
    "packed alone": (pack_sequence([torch.ones(3, 2)] * N), (), N, "PackedSequence"),
    "graphs": (Graphs(torch.randn(20, 3), torch.ones(2, 40).long(), torch.arange(20) % N), (), N, "Graphs"),
    "graph entries": ({"x": torch.randn(20, 3), "edge_index": torch.ones(2, 40).long(), "y": Y}, (N,), N, "begin with"),
    "batches of batches": ((X, Y), (1,), None, "begin with 8 where"),
    "two loaders": ({"a": (X, Y), "b": (X[:4], Y[:4])}, (N, 4), None, "begin with 4 and 8"),
    "text alone": (list("abcdefgh"), (), None, "does not show its samples"),
    "partners": ((X, Y, _perm), (N,), N, "indices into the batch"),
    "eight columns": ([torch.randn(N, 3) for _ in range(N)], (N,), N, "two ways"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_where_signs_disagree_the_whole_batch_is_taken(name: str) -> None:
    batch, sizes, samples, word = WHOLE[name]
    found = take_samples(batch, 0.25, sizes=sizes)
    assert not found.is_cut and found.samples == samples and same(found.batch, batch)
    assert found.reason is not None and word in found.reason, found.reason
    assert take_samples(batch, 1.0, sizes=sizes).reason is None or name == "partners"  # nothing was to be left out


def test_a_single_tensor_is_cut_where_the_loader_says_how_many() -> None:
    assert take_samples([torch.randn(32, 4)], 0.25, sizes=[32]).samples == 8
    assert take_samples(_ragged(torch.jagged), 0.25).samples == 2  # it says itself that it is one a sample


def test_texts_alone_are_samples_where_the_loader_says_how_many() -> None:
    for batch in (list("abcdefgh"), {"text": list("abcdefgh"), "label": list(range(8))}, [("a", 1)] * N):
        found = take_samples(batch, 0.25, sizes=[N])
        first = found.batch["text"] if isinstance(batch, dict) else found.batch
        assert found.samples == 2 and len(first) == 2 and type(found.batch) is type(batch)


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
    with pytest.raises(ValueError, match="the batch has no 'mask' to weight it by"):
        batch_weight(CUT[name], "mask")


# In a fit


class Net(pl.LightningModule):
    """Cross-entropy by ``step(network, batch, index)``, at weights that stay."""

    def __init__(self, step: Any, rate: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.step, self.rate = step, rate

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self.network, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def of_pair(network: Any, batch: Any, index: int = 0) -> Tensor:
    return cross_entropy(network(batch[0]), batch[1])


def of_mapping(network: Any, batch: Any, index: int = 0) -> Tensor:
    return cross_entropy(network(batch["x"]), batch["y"])


def of_fields(network: Any, batch: Any, index: int = 0) -> Tensor:
    return cross_entropy(network(batch.x), batch.y)


SKIPS = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
GENERATOR = torch.Generator().manual_seed(1)
INPUTS = torch.randn(64, 5, dtype=torch.float64, generator=GENERATOR)
LABELS = torch.randint(3, (64,), generator=GENERATOR)


class Order(Sampler):
    """Another order in each epoch, the same in each run."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Any:
        return iter(torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def loader(make: Any = None, size: int = 8, **arguments: Any) -> DataLoader:
    collate = (
        None if make is None else lambda items: make(*(torch.stack(column) for column in zip(*items, strict=True)))
    )
    return DataLoader(TensorDataset(INPUTS, LABELS), size, collate_fn=collate, **arguments)


def sharpness(**arguments: Any) -> SharpnessMonitor:
    return SharpnessMonitor(1, strict=True, **{"quantities": ["hessian"], "tol": 1e-6, **arguments})


def measured(step: Any, data: Any, monitor: SharpnessMonitor, steps: int = 8) -> tuple[float, float | None]:
    """The last eigenvalue of a run at weights that stay, and how many samples it is of."""
    fit(Net(step), [monitor], data, steps=steps)
    samples = monitor.history["sharpness/probe_samples"] if "sharpness/probe_samples" in monitor.history else None
    return monitor.history["sharpness/hessian_max"].values[-1], None if samples is None else samples.values[-1]


def truth(loss_of: Any) -> float:
    """The largest eigenvalue of the dense Hessian of a loss of the network."""
    return float(torch.linalg.eigvalsh(dense_hessian(Net(None).network, loss_of))[-1])


def on(places: Any) -> float:
    return truth(lambda f: cross_entropy(f(INPUTS[places]), LABELS[places]))


def as_mapping(kind: Any) -> Any:
    return lambda x, y: kind(x=x, y=y) if kind is ReadOnly else kind({"x": x, "y": y})


def as_table(x: Tensor, y: Tensor) -> Table:
    return Table({"x": x, "y": y}, [len(x)])


@dataclasses.dataclass
class Fields:
    x: Tensor
    y: Tensor


class Whole:
    """Its tensors cannot be cut; it moves itself, and says how many samples it has."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.batch_size = x, y, len(x)

    def to(self, device: Any) -> "Whole":
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


class Mapped(UserDict):
    pass


IN_A_FIT = {
    "dict": (as_mapping(dict), of_mapping, 4),
    "encoding": (as_mapping(Encoding), of_mapping, 4),
    "user dict": (as_mapping(Mapped), of_mapping, 4),
    "table": (as_table, of_mapping, 4),
    "dataclass": (Fields, of_fields, 4),
    "named tuple": (Point, of_pair, 4),
    "object": (Whole, of_fields, 16),
}


@pytest.mark.parametrize("name", IN_A_FIT)
def test_the_probe_is_cut_saved_and_resumed_in_any_container(name: str, tmp_path) -> None:
    make, step, samples = IN_A_FIT[name]
    step = of_fields if name == "named tuple" else step

    def run(epochs: int, checkpoint: Any = None) -> tuple[Any, Any]:
        monitor = SharpnessMonitor(every_n_steps=4, probe_fraction=0.25, strict=True)
        data = loader(make, 16, sampler=Order())
        done = fit(Net(step, 0.1), [monitor], data, steps=-1, max_epochs=epochs, ckpt_path=checkpoint)
        return done, monitor.history

    _, whole = run(4)
    half, _ = run(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(4, str(tmp_path / "half.ckpt"))  # with weights_only=True
    for tag in ("sharpness/hessian_max", "sharpness/probe_loss"):
        np.testing.assert_array_equal(resumed[tag].values, whole[tag].values[2:])
    assert set(whole["sharpness/probe_samples"].values) == {samples}
    chosen = list(Order())[:samples]
    value, _ = measured(step, loader(make, 16, sampler=Order()), sharpness(probe_fraction=0.25), steps=2)
    assert value == pytest.approx(on(chosen), rel=1e-6)


@SKIPS
def test_batches_of_several_loaders_with_none_in_place_of_one_that_is_over() -> None:
    both = CombinedLoader({"a": loader(size=8), "b": DataLoader(TensorDataset(INPUTS[:8], LABELS[:8]), 8)}, "max_size")

    def step(network: Any, batch: Any, index: int) -> Any:
        parts = [of_pair(network, part) for part in batch.values() if part is not None]
        return None if index == 0 else sum(parts)  # so that the second batch, which has a None, is the probe

    found = measured(step, both, sharpness(probe_fraction=0.5))
    assert found == (pytest.approx(on(slice(8, 12)), rel=1e-6), 4)


def of_images(network: Any, batch: Any, index: int) -> Tensor:
    return sum(((network(image).tanh() - 1) ** 2).mean() for image in batch) / len(batch)


IMAGES = [torch.randn(4 + i, 5, dtype=torch.float64, generator=GENERATOR) for i in range(8)]


@pytest.mark.parametrize("size", [8, None])
def test_a_list_of_tensors_gives_whole_ones(size: int | None, caplog) -> None:
    data = DataLoader(IMAGES, 8, collate_fn=list) if size else DataLoader([IMAGES] * 2, batch_size=None)
    count = 2 if size else 8
    with caplog.at_level(logging.INFO):
        value, samples = measured(of_images, data, sharpness(probe_fraction=0.25), steps=1)
    assert samples == (2 if size else None) and ("the probe holds whole batches" in caplog.text) == (size is None)
    assert value == pytest.approx(truth(lambda f: of_images(f, IMAGES[:count], 0)), rel=1e-6)


SERIES = torch.randn(12, 4, 5, dtype=torch.float64, generator=GENERATOR)  # [time, samples, features]


def of_series(network: Any, batch: Any, index: int) -> Tensor:
    """Each step's input is added to what the step before has left: time cannot be cut."""
    return cross_entropy(network(batch[0].cumsum(0)).flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("samples", [4, None])
def test_time_before_samples_is_not_cut(samples: int | None, caplog) -> None:
    labels = torch.arange(48).reshape(12, 4) % 3
    pairs = [(SERIES[:, i], labels[:, i]) for i in range(4)]
    collate = lambda items: tuple(torch.stack(column, 1) for column in zip(*items, strict=True))  # noqa: E731
    data = DataLoader(pairs, 4, collate_fn=collate) if samples else DataLoader([(SERIES, labels)], batch_size=None)
    with caplog.at_level(logging.INFO):
        found = measured(of_series, data, sharpness(probe_fraction=0.25), steps=1)
    assert found == (pytest.approx(truth(lambda f: of_series(f, (SERIES, labels), 0)), rel=1e-6), samples)
    assert caplog.text.count("the probe holds whole batches") == 1


def test_a_part_that_cannot_be_evaluated_gives_way_to_the_whole(caplog) -> None:
    weights = torch.rand(8, 8, dtype=torch.float64, generator=GENERATOR)

    def step(network: Any, batch: Any, index: int) -> Tensor:
        out = network(batch[0])
        return of_pair(network, batch) + (weights * (out @ out.T)).mean()

    monitor = sharpness(probe_fraction=0.25)
    with caplog.at_level(logging.INFO):
        found = measured(step, loader(), monitor)

    def loss_of(f: Any) -> Tensor:
        return step(f, (INPUTS[8:16], LABELS[8:16]), 0)  # the first batch has been let go of

    assert found == (pytest.approx(truth(loss_of), rel=1e-6), 8) and monitor.failures == 0
    assert caplog.text.count("the loss of a part of one could not be evaluated: The size of tensor") == 1


def skipping(*skipped: int) -> Any:
    return lambda network, batch, index: None if index in skipped else of_pair(network, batch)


def of_nothing(network: Any, batch: Any, index: int) -> Tensor:
    return of_pair(network, batch) if index else torch.tensor(0.0, requires_grad=True)


WITHOUT = {
    "none": (skipping(0), slice(8, 10)),
    "three": (skipping(0, 1, 2), slice(24, 26)),
    "in a dict": (lambda n, b, i: {"loss": skipping(0)(n, b, i)} if i else None, slice(8, 10)),
    "depends on nothing": (of_nothing, slice(8, 10)),
    "every part": (lambda n, b, i: of_pair(n, b) if len(b[0]) == 8 else None, slice(48, 56)),
}


@SKIPS
@pytest.mark.parametrize("name", WITHOUT)
def test_a_batch_without_a_loss_gives_way_to_the_next(name: str, caplog) -> None:
    step, places = WITHOUT[name]
    monitor = sharpness(probe_fraction=0.25)
    with caplog.at_level(logging.INFO):
        found = measured(step, loader(), monitor)
    assert found == (pytest.approx(on(places), rel=1e-6), places.stop - places.start) and monitor.failures == 0
    assert caplog.text.count("there is no loss on the batch that sharpness was to be measured on") == 1


def test_a_batch_without_a_weight_gives_way_to_the_next(caplog) -> None:
    mask = torch.ones(64).index_fill(0, torch.arange(8), 0.0)
    data = DataLoader(TensorDataset(INPUTS, LABELS, mask), 8, collate_fn=lambda items: dict(zip("xyw", map(torch.stack, zip(*items, strict=True)), strict=True)))  # fmt: skip  # noqa: E501
    with caplog.at_level(logging.INFO):
        found = measured(of_mapping, data, sharpness(probe_fraction=0.25, probe_weight="w"))
    assert found == (pytest.approx(on(slice(8, 10)), rel=1e-6), 2) and "The probe takes the next batch" in caplog.text


def test_a_loss_that_is_never_there_is_a_failure() -> None:
    monitor = SharpnessMonitor(1, quantities=["hessian"], loss_fn=lambda module, batch: None)
    with pytest.warns(UserWarning, match="loss_fn must return a scalar tensor as loss, got NoneType"):
        fit(Net(of_pair), [monitor], loader(), steps=24)
    assert monitor.failures == 3


def test_a_batch_whose_loss_is_not_finite_gives_way_to_the_next() -> None:
    def loss_fn(module: Any, batch: Any) -> Tensor:
        return of_pair(module.network, batch) * (math.nan if torch.equal(batch[0][0], INPUTS[0]) else 1.0)

    found = measured(of_pair, loader(), sharpness(probe_fraction=0.25, loss_fn=loss_fn))
    assert found == (pytest.approx(on(slice(8, 10)), rel=1e-6), 2)


EVERYTHING = {  # arguments of the monitor, data, whether the probe is the whole training set
    "one batch": ({"probe_fraction": 1.0}, lambda: loader(size=64), True),
    "half of it": ({"probe_fraction": 0.5}, lambda: loader(size=64), False),
    "one of many": ({"probe_fraction": 1.0}, lambda: loader(), False),
    "all batches": ({"probe_fraction": 1.0, "probe_batches": 4}, lambda: loader(size=16), True),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_probe_is_called_small_only_where_there_is_more(name: str, caplog) -> None:
    arguments, data, are_all = EVERYTHING[name]
    with caplog.at_level(logging.INFO):
        fit(Net(of_pair), [sharpness(**arguments)], data(), steps=8)
    assert ("so small a probe" not in caplog.text) == are_all == ("64 samples, the whole training set" in caplog.text)


class Line(pl.LightningModule):
    """A line, or a plane, with or without a constant: one to three parameters."""

    def __init__(self, inputs: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(inputs, 1, bias=bias).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize(("inputs", "bias"), [(1, False), (1, True), (2, True), (4, False)])
def test_as_many_eigenvalues_as_there_are(inputs: int, bias: bool, adam: bool, monkeypatch) -> None:
    module = Line(inputs, bias)
    if adam:
        monkeypatch.setattr(Line, "configure_optimizers", lambda self: torch.optim.Adam(self.parameters(), lr=0.1))
    quantities = [q for q in QUANTITIES if q != "ggn"] + ["ggn"]
    monitor = DynamicsMonitor("full", every_n_steps=1, strict=True, quantities=quantities, tol=1e-6)
    x = INPUTS[:, :inputs]
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True) + x[:, :1] ** 2), 64)
    fit(module, [monitor], data, steps=7)
    columns = torch.cat([x, torch.ones(64, 1, dtype=x.dtype)], 1) if bias else x
    eigenvalues = torch.linalg.eigvalsh(2 * columns.T @ columns / 64)
    history = monitor.history
    np.testing.assert_allclose(history["sharpness/hessian_max"].values, float(eigenvalues[-1]), rtol=1e-6)
    np.testing.assert_allclose(history["sharpness/ggn_max"].values, float(eigenvalues[-1]), rtol=1e-6)
    assert (history["sharpness/hessian_max_upper"].values >= float(eigenvalues[-1]) * (1 - 1e-9)).all()
    np.testing.assert_allclose(history["sharpness/hessian_min"].values, float(eigenvalues[0]), rtol=1e-6)
    np.testing.assert_allclose(history["sharpness/gradient_share"].values, 1.0, rtol=1e-6)
    np.testing.assert_allclose(history["sharpness/eigenspace_overlap"].values, 1.0, rtol=1e-6)
    trace, error = (history[f"sharpness/trace{which}"].values for which in ("", "_error"))
    assert (np.abs(trace - float(eigenvalues.sum())) <= 5 * error + 1e-9).all()
    assert np.isfinite(history["sharpness/bulk_edge"].values).all()
    assert "sharpness/stability_ratio" in history and monitor.failures == 0


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_solver_gives_as_many_as_there_are(size: int, method: str) -> None:
    matrix = torch.diag(torch.tensor([8.0, 4.0, 2.0, -1.0], dtype=torch.float64)[:size])
    found = top_eigenvalues(matrix, 5, method=method, tol=1e-6, max_matvecs=400)
    np.testing.assert_allclose(found.values, matrix.diagonal(), atol=1e-4)
    again = EigenTracker(5, certify=True)
    for _ in range(7):
        assert len(again.update(matrix).values) == size


# The arguments of all parts in one


def test_one_monitor_takes_the_arguments_of_its_parts(tmp_path) -> None:
    arguments = {
        "quantities": ["hessian", "ggn", "density"],
        "probe_size": 12,
        "tol": 1e-6,
        "histograms": True,
        "outputs": lambda module, batch: ((out := module.network(batch[0])), cross_entropy(out, batch[1])),
    }
    monitor = DynamicsMonitor("economy", every_n_steps=1, strict=True, **arguments)
    done = fit(Net(of_pair), [monitor], loader(), steps=4)
    history = monitor.history
    assert history["sharpness/probe_samples"].values.tolist()[-1] == 12
    assert history["sharpness/hessian_max"].values[-1] == pytest.approx(on(slice(0, 12)), rel=1e-6)
    assert "sharpness/ggn_max" in history and "sharpness/bulk_edge" in history
    assert "sharpness/critical_multiple" not in history and "sharpness/stability_ratio" not in history
    assert any(meter.histograms for meter in monitor._meters)
    done.save_checkpoint(tmp_path / "kept.ckpt")
    assert rows_of_inputs(tmp_path / "kept.ckpt") == 12


def test_a_share_that_was_asked_for_is_not_cut_by_the_budget() -> None:
    for given, expected in ((None, 0.12), (0.5, 0.5)):
        (probe,) = (m for m in DynamicsMonitor(probe_fraction=given)._meters if m.name == "probe")
        assert probe.share == pytest.approx(expected)


def test_a_weight_and_a_convolution_in_one_monitor() -> None:
    monitor = DynamicsMonitor(every_n_steps=1, strict=True, probe_batches=2, probe_fraction=1.0, probe_weight="y")
    fit(Net(of_mapping), [monitor], loader(as_mapping(Encoding)), steps=3)
    first, second = (cross_entropy(Net(None).network(INPUTS[p]), LABELS[p]) for p in (slice(0, 8), slice(8, 16)))
    weights = [float(LABELS[:8].sum()), float(LABELS[8:16].sum())]
    expected = (weights[0] * first + weights[1] * second) / sum(weights)
    assert monitor.history["sharpness/probe_loss"].values[-1] == pytest.approx(float(expected.detach()), rel=1e-9)
    with pytest.raises(ValueError, match="a weight must be positive"):
        batch_weight({"y": torch.zeros(3)}, "y")
    for wanted in (True, False):
        monitor = DynamicsMonitor(every_n_steps=1, convolutions=wanted, quantities=["critical"])
        fit(Classifier(cnn()), [monitor], batches(features=(2, 8, 8)), steps=2)
        assert ("spectrum/convolution_upper" in monitor.history) == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantities": ["hessain"]}, "quantities must be chosen from"),
        ({"quantities": "hessian"}, "quantities must be a list of names"),
        ({"probe_fraction": 0.0}, "probe_fraction must lie in"),
        ({"probe_size": 1}, "probe_size must be at least 2"),
        ({"probe_weight": 3}, "probe_weight must be the name of an entry"),
        ({"outputs": 3}, "outputs must be a function"),
        ({"tol": 2.0}, "tol must lie between 0 and 1"),
        ({"max_matvecs": 3}, "max_matvecs must be at least 8"),
        ({"memory_limit": 0.0}, "memory_limit must be a positive number"),
    ],
)
def test_the_arguments_of_all_parts_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicsMonitor(**arguments)


def rows_of_inputs(path: Any) -> int:
    """How many training samples a checkpoint holds."""
    found: list[Tensor] = []

    def search(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            search(item)

    search(torch.load(path, weights_only=True))
    rows = [row for t in found if t.ndim == 2 and t.shape[1] == 5 and t.dtype == INPUTS.dtype for row in t]
    return sum(any(torch.equal(row, sample) for sample in INPUTS) for row in rows)


@pytest.mark.parametrize("make", [SharpnessMonitor, DynamicsMonitor])
def test_samples_stay_out_of_checkpoints_where_that_is_wanted(make: Any, tmp_path, caplog) -> None:
    for save, rows in ((True, 4), (False, 0)):
        path = tmp_path / f"{save}.ckpt"
        monitor = make(every_n_steps=2, probe_fraction=0.5, quantities=["hessian"], save_probe=save)
        fit(Net(of_pair), [monitor], loader(), steps=2).save_checkpoint(path)
        assert rows_of_inputs(path) == rows
    with caplog.at_level(logging.INFO):
        again = make(every_n_steps=2, probe_fraction=0.5, save_probe=False)
        fit(Net(of_pair), [again], loader(), steps=4, ckpt_path=str(tmp_path / "False.ckpt"))
    assert "the checkpoint did not hold the probe" in caplog.text and "sharpness/probe_loss" in again.history


def test_measure_takes_any_container() -> None:
    module = Net(of_mapping)
    plain_batch = {"x": INPUTS[:8], "y": LABELS[:8]}
    expected = measure(module, plain_batch)
    for batch in (Encoding(plain_batch), as_table(INPUTS[:8], LABELS[:8]), Locked(plain_batch)):
        found = measure(module, batch)
        assert found["sharpness/hessian_max"] == expected["sharpness/hessian_max"] and torch.equal(
            batch["x"], INPUTS[:8]
        )
