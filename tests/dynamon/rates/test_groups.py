"""Which layers share a ratio."""

import pytest
import torch
from torch import nn

from dynamon.layers import describe_layers
from dynamon.optim import LayerwiseRates
from dynamon.rates import BalancedRates, FixedRates
from dynamon.rates.groups import group_layers, kind_of
from tests.models import gpt


class Stage(nn.Module):
    """A residual block with torchvision's names."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))


class ResNet(nn.Module):
    """Two stages of two blocks."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7)
        self.layer1, self.layer2 = (nn.Sequential(Stage(4), Stage(4)) for _ in range(2))
        self.fc = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.11.qkv.weight", "blocks.*.qkv.weight"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.*.attn.c_attn.weight"),
        ("layer4.1.conv2.weight", "layer*.*.conv2.weight"),
        ("conv1.weight", "conv1.weight"),
        ("lstm.weight_ih_l0", "lstm.weight_ih_l0"),
        ("0.weight", "*.weight"),
        ("experts.3.7.up", "experts.*.*.up"),
    ],
)
def test_the_numbers_of_blocks_are_starred(name, kind):
    assert kind_of(name) == kind


def test_kinds_of_a_residual_network():
    groups = {group.label: len(group.indices) for group in group_layers(describe_layers(ResNet()))}
    kinds = {"conv1.weight": 1, "layer*.*.conv1.weight": 4, "layer*.*.downsample.*.weight": 4, "fc.weight": 1}
    assert groups == {**kinds, "role:vector": 26}


def test_layers_of_one_starred_name_and_two_roles_are_kept_apart():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    groups = {group.label: group.keys for group in group_layers(describe_layers(model))}
    names = {"embedding": "0.weight", "hidden": "1.weight", "head": "2.weight"}
    assert groups == {f"*.weight ({role})": (name,) for role, name in names.items()} | {"role:vector": ("role:vector",)}


@pytest.mark.parametrize("group_by", ["kind", "role", ["head.*", "role:vector", "blocks.*.up.*"]])
@pytest.mark.parametrize("model", [gpt(), ResNet(), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))])
def test_each_layer_is_in_one_group_and_the_keys_say_the_same_to_fixed_rates(model, group_by):
    layers = describe_layers(model)
    if not isinstance(group_by, str):
        group_by = [layers[0].name, "role:vector"]
    groups = group_layers(layers, group_by)
    assert sorted(index for group in groups for index in group.indices) == list(range(len(layers)))
    rule = FixedRates({key: 1.0 + number for number, group in enumerate(groups) for key in group.keys})
    rule.start(layers, [])
    for number, group in enumerate(groups):
        assert (rule.ratios()[group.indices] == 1.0 + number).all()


def test_the_optimizers_own_groups():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD([{"params": model[1].parameters()}, {"params": model[0].parameters()}], lr=0.1)
    rule = LayerwiseRates(optimizer, BalancedRates("parameter_groups"), model).rule
    assert {group.label: group.keys for group in rule.groups} == {
        "group 1": ("0.weight", "0.bias"),
        "group 0": ("1.weight", "1.bias"),
    }


def test_what_is_wrong_is_named():
    layers = describe_layers(ResNet())
    with pytest.raises(ValueError, match="group_by must be one of"):
        BalancedRates("layer")
    with pytest.raises(ValueError, match=r"'layer9\.\*' matches no layer"):
        group_layers(layers, ["layer9.*"])


@pytest.mark.parametrize("wrong", [3, None, [1], {"role:head": 2.0}.values()])
def test_a_grouping_of_another_type_is_named(wrong):
    with pytest.raises(TypeError, match="group_by must be one of kind, role, parameter_groups, or a list of globs"):
        BalancedRates(group_by=wrong)
