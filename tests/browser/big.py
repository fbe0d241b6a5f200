"""Event files of a long run of a big model, as the recorder writes them: 300 layers, 2,000 readings, 100,000 losses."""

import json
import struct
from functools import cache
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

PARTS = ("attn.qkv.weight", "attn.proj.weight", "mlp.up.weight", "mlp.down.weight")
TABLES = (
    "gradient/dual",
    "gradient/l2",
    "noise/dual",
    "noise/snr",
    "update/ratio",
    "update/operator",
    "weight/operator",
    "spectrum/sigma_max",
    "spectrum/stable_rank",
    "lr/ratio",
)
LOSS = "train/loss"  # at every step
SCALARS = ("gradient/norm", "lr/base", "lr/bounded", "noise/scale", "sharpness/stability_ratio")


def names(layers: int) -> list[str]:
    """Those of a transformer."""
    return [f"model.blocks.{i // len(PARTS)}.{PARTS[i % len(PARTS)]}" for i in range(layers)]


def write(folder: Path, layers: int = 300, steps: int = 2000, every: int = 50) -> dict[str, np.ndarray]:
    """Write the run; give what it holds: ``[steps, layers]`` of each table, ``[steps]`` of each scalar, all losses."""
    generator = np.random.default_rng(0)
    content = json.dumps({"layers": names(layers)}).encode()
    plugin = SummaryMetadata.PluginData(plugin_name="dynamon", content=content)
    metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=layers)])
    depth = np.linspace(1.0, 4.0, layers)
    tables = {q: (np.exp(0.1 * generator.normal(size=(steps, layers))) * depth).astype("<f4") for q in TABLES}
    scalars = {tag: np.exp(0.05 * generator.normal(size=steps)).astype(np.float32) for tag in SCALARS}
    for quantity, table in tables.items():
        quantiles = np.quantile(table, [0.1, 0.5, 0.9], axis=1).astype(np.float32)
        scalars |= {f"{quantity}_{q}": row for q, row in zip(("p10", "median", "p90"), quantiles, strict=True)}
    losses = np.exp(0.05 * generator.normal(size=steps * every)).astype(np.float32)
    folder.mkdir(parents=True)
    with (folder / "events.out.tfevents.1.big.1.0").open("wb") as file:
        for step, loss in enumerate(losses):
            values = [Summary.Value(tag=LOSS, simple_value=float(loss))]
            if step % every == 0:
                row = step // every
                values += [Summary.Value(tag=tag, simple_value=float(own[row])) for tag, own in scalars.items()]
                for quantity, table in tables.items():
                    tensor = TensorProto(dtype=DT_FLOAT, tensor_shape=shape, tensor_content=table[row].tobytes())
                    first = metadata if row == 0 else None
                    values.append(Summary.Value(tag=f"{quantity}/layers", tensor=tensor, metadata=first))
            for value in values:
                file.write(record(Event(step=step, summary=Summary(value=[value]))))
    return {**tables, **scalars, LOSS: losses}


def record(event: Event) -> bytes:
    """A record whose data have an empty checksum: in Python those of the whole file would take eight seconds."""
    data = event.SerializeToString()
    return header(len(data)) + data + bytes(4)


@cache
def header(length: int) -> bytes:
    """The length and its checksum."""
    packed = struct.pack("<Q", length)
    return packed + struct.pack("<I", masked_crc32c(packed))
