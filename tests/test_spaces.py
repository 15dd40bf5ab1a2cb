"""Reading: ``analyze()`` finds the spaces that a person finds, in every form a model comes in."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import (
    NETS,
    AuxiliaryHead,
    Bottleneck,
    ConvChain,
    ConvNormChain,
    CumulativeSum,
    DictOutput,
    FlattenIntoLinear,
    TwoInputs,
    conv,
)
from proofs import permutation_error, randomize_
from small_nets import fingerprint, values
from torch import Tensor, fx, nn

from torchcap import (
    ChannelSpace,
    ExampleInputsError,
    ModelError,
    Port,
    SpaceGraph,
    analyze,
)
from torchcap.graph.values import Call, Value

IMAGE = torch.zeros(2, 3, 8, 8)
EVERY_NET = pytest.mark.parametrize("net", NETS)


def layers_of(ports: Iterable[Port]) -> str:
    return " ".join(dict.fromkeys(port.module for port in ports))


def read(net: str) -> SpaceGraph:
    return analyze(NETS[net].model(), NETS[net].inputs())


# --------------------------------------------------------------------------------------------------
# The truth of the tiny networks


@EVERY_NET
def test_spaces_are_those_found_by_hand(net: str) -> None:
    def told(space: Any, written: str, read: str) -> tuple[Any, ...]:
        return space.channels, space.freedom, space.blocks, written, read

    found = {
        s.name: told(s, layers_of(s.producers), layers_of(s.consumers)) for s in read(net).spaces
    }
    expected = {name: told(s, s.written, s.read) for name, s in NETS[net].spaces.items()}
    assert found == expected
    assert list(found) == list(expected)


@EVERY_NET
def test_carriers_are_those_found_by_hand(net: str) -> None:
    found = {s.name: {port.module for port in s.carriers} for s in read(net).spaces}
    # An empty word is the network itself, whose own parameter carries the space.
    root = {"conv1"} if net == "LayerScaleOfTheRoot" else set()
    expected = {
        name: {""} if name in root else set(space.carried.split())
        for name, space in NETS[net].spaces.items()
    }
    assert found == expected


@EVERY_NET
def test_reasons_say_what_stands_in_the_way(net: str) -> None:
    reasons = {space.name: space.reason for space in read(net).spaces}
    for name, space in NETS[net].spaces.items():
        assert space.reason in reasons[name]
        assert bool(reasons[name]) == (space.freedom in {"fixed", "selection"})


@EVERY_NET
def test_folds_and_notes_are_those_found_by_hand(net: str) -> None:
    graph = read(net)
    assert {fold.layer: fold.norm for fold in graph.folds} == NETS[net].folds
    assert graph.notes == NETS[net].notes


@EVERY_NET
def test_permuting_every_free_space_leaves_the_output_unchanged(net: str) -> None:
    model, inputs = NETS[net].model(), NETS[net].inputs()
    randomize_(model, torch.Generator().manual_seed(2))
    assert permutation_error(model, analyze(model, inputs).free, inputs) <= 1e-10


@EVERY_NET
def test_every_port_lies_within_its_tensor_and_no_two_overlap(net: str) -> None:
    model = NETS[net].model()
    taken: set[tuple[str, str, int, int]] = set()
    for space in read(net).spaces:
        for port in space.ports:
            size = getattr(model.get_submodule(port.module), port.parameter).shape[port.axis]
            entries = range(port.offset, port.offset + port.channels * port.repeat)
            assert 0 <= entries[0] <= entries[-1] < size * port.groups
            assert 0 <= port.start < port.start + port.channels <= space.channels
            places = {(port.module, port.parameter, port.axis, entry) for entry in entries}
            assert not places & taken
            taken |= places


def test_proof_by_permutation_sees_every_port_that_is_left_out() -> None:
    """Leave out one port of a space after the other: the network must come out another."""
    for net in ("DenseBlock", "FlattenIntoLinear", "Grouped", "SqueezeExcite", "Bottleneck"):
        model, inputs = NETS[net].model(), NETS[net].inputs()
        randomize_(model, torch.Generator().manual_seed(2))
        for space in analyze(model, inputs).free:
            for role in ("producers", "consumers", "carriers"):
                for left_out in getattr(space, role):
                    kept = tuple(port for port in getattr(space, role) if port != left_out)
                    wrong = dataclasses.replace(space, **{role: kept})
                    assert permutation_error(model, [wrong], inputs) > 1e-6, left_out


def test_proof_by_permutation_sees_a_space_that_should_be_fixed() -> None:
    model, inputs = NETS["CumulativeSum"].model(), NETS["CumulativeSum"].inputs()
    graph = analyze(model, inputs)
    reader = Port("conv2", "weight", 1, 0, 0, 8)
    guessed = dataclasses.replace(graph["conv1"], consumers=(reader,))
    assert permutation_error(model, [guessed], inputs) > 1e-3


# --------------------------------------------------------------------------------------------------
# Ports


def test_producer_is_the_output_axis_of_weight_and_bias() -> None:
    assert read("ConvChain")["conv1"].producers == (
        Port("conv1", "weight", axis=0, offset=0, start=0, channels=8),
        Port("conv1", "bias", axis=0, offset=0, start=0, channels=8),
    )


def test_norm_carries_its_affine_map_and_its_statistics() -> None:
    assert read("ConvNormChain")["conv1"].carriers == tuple(
        Port("bn1", name, axis=0, offset=0, start=0, channels=8)
        for name in ("weight", "bias", "running_mean", "running_var")
    )


def test_concatenation_gives_its_reader_one_port_for_each_tensor() -> None:
    graph = read("Inception")
    ports = [port for space in graph.spaces for port in space.consumers if port.module == "last"]
    # plain 3 | wide 5 | tall 2 | image 3 | pooled 6
    assert {(port.offset, port.channels) for port in ports} == {(0, 3), (3, 5), (8, 2), (13, 6)}


def test_flattened_channel_repeats_once_a_position() -> None:
    assert read("FlattenIntoLinear")["conv"].consumers == (
        Port("fc1", "weight", axis=1, offset=0, start=0, channels=4, repeat=16),
    )


def test_depthwise_multiplier_repeats_a_channel_in_its_carrier_and_reader() -> None:
    space = read("DepthwiseMultiplier")["expand"]
    assert {(p.parameter, p.axis, p.repeat) for p in space.carriers} == {
        ("weight", 0, 2),
        ("bias", 0, 2),
    }
    assert [port.repeat for port in space.consumers] == [2]


def test_grouped_reader_counts_its_inputs_over_all_groups() -> None:
    assert read("Grouped")["conv1"].consumers == (
        Port("grouped", "weight", axis=1, offset=0, start=0, channels=8, groups=4),
    )


def test_blocks_of_two_layers_stand_one_behind_the_other() -> None:
    weights = [p for p in read("ChunkOfConcatenation")["wide"].producers if p.parameter == "weight"]
    assert weights == [
        Port("wide", "weight", axis=0, offset=0, start=0, channels=5),
        Port("narrow", "weight", axis=0, offset=0, start=5, channels=5),
    ]


def test_gate_and_value_of_one_layer_are_two_ports_of_the_same_channels() -> None:
    weights = [p for p in read("GatedHalves")["conv1"].producers if p.parameter == "weight"]
    assert [(p.offset, p.start, p.channels) for p in weights] == [(0, 0, 6), (6, 0, 6)]


def test_gain_of_a_standardised_layer_is_written_with_its_weight() -> None:
    names = [port.parameter for port in read("Standardised")["conv1"].producers]
    assert names == ["weight", "bias", "gain"]


def test_layer_scale_is_a_parameter_of_its_block() -> None:
    assert read("LayerScale")["block.conv1"].carriers == (
        Port("block", "scale", axis=0, offset=0, start=0, channels=8),
    )


def test_tensor_of_a_port_is_its_name_in_the_model() -> None:
    root = read("LayerScaleOfTheRoot")["conv1"].carriers[0]
    assert (root.module, root.tensor) == ("", "scale")
    assert read("LayerScale")["block.conv1"].carriers[0].tensor == "block.scale"


def test_folding_moves_the_norm_into_the_bias_of_its_layer() -> None:
    folded = read("ConvNormChain").after_folding()
    assert folded["conv1"].carriers == ()
    assert [port.parameter for port in folded["conv1"].producers] == ["weight", "bias"]
    assert folded.tensors == {
        "conv1.weight": (8, 3, 3, 3),
        "conv1.bias": (8,),
        "conv2.weight": (6, 8, 3, 3),
        "conv2.bias": (6,),
        "fc.weight": (5, 6),
        "fc.bias": (5,),
    }
    assert folded.folds == ()


# --------------------------------------------------------------------------------------------------
# The graph as data


def test_graph_prints_every_space_with_its_readers_and_its_reason() -> None:
    graph = read("CumulativeSum")
    lines = str(graph).splitlines()
    assert "CumulativeSum: 3 channel spaces, 1 free, 6 channels in them" in lines[0]
    lines, legend = lines[: lines.index("")], lines[lines.index("") + 1 :]
    by_name = {line.split()[0]: line for line in lines[2:]}
    for space in graph.spaces:
        for fact in (str(space.channels), space.freedom, space.reason, layers_of(space.consumers)):
            assert fact in by_name[space.name]
    assert lines[-1] == "note: no rule for 'cumsum' (1 use)"
    words = [line.partition(":")[0] for line in legend]
    assert words == ["stiefel", "fixed", "[… no rule for …]"]


def test_graph_tells_what_share_of_the_work_is_within_reach() -> None:
    model = nn.Sequential(conv(3, 8, 1), nn.ReLU(), conv(8, 4, 1), nn.Flatten(), nn.Linear(256, 2))
    model.insert(3, nn.Dropout())
    graph = analyze(model, IMAGE[:1])
    assert graph.macs == 64 * (24 + 32) + 512
    assert graph.reachable == 1.0
    assert graph.share(graph["0"]) == 64 * (24 + 32) / graph.macs
    assert graph.share(graph["2"]) == (64 * 32 + 512) / graph.macs
    assert f"they touch 100.0% of {graph.macs:,} multiply-adds" in str(graph)


def test_spaces_are_looked_up_by_name() -> None:
    graph = read("ConvChain")
    assert isinstance(graph["conv2"], ChannelSpace)
    assert graph["conv2"].name == "conv2"
    with pytest.raises(KeyError, match="conv9"):
        graph["conv9"]


def test_free_spaces_are_those_that_are_not_fixed() -> None:
    assert [space.name for space in read("Slopes").free] == ["conv1", "conv2"]
    assert [space.name for space in read("Slopes").spaces] == ["conv1", "conv2", "conv3"]


@EVERY_NET
def test_graph_is_plain_data_that_survives_a_pickle(net: str) -> None:
    graph = read(net)
    assert pickle.loads(pickle.dumps(graph)) == graph


# --------------------------------------------------------------------------------------------------
# The model stays as it is, whatever form it has


@EVERY_NET
@pytest.mark.parametrize("training", [False, True])
def test_analysis_leaves_model_mode_and_hooks_unchanged(net: str, *, training: bool) -> None:
    model = NETS[net].model().train(training)
    next(model.children()).eval()  # a mode that differs from its parent's stays, too
    seen: list[nn.Module] = []
    model.register_forward_hook(lambda module, args, output: seen.append(module))
    before, numbers = fingerprint(model), values(model)
    modes = [module.training for module in model.modules()]

    analyze(model, NETS[net].inputs())

    assert fingerprint(model) == before
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(values(model), numbers, rtol=0, atol=0)
    assert seen == []


@EVERY_NET
def test_training_mode_gives_the_same_graph(net: str) -> None:
    model, inputs = NETS[net].model(), NETS[net].inputs()
    assert analyze(model.train(), inputs) == analyze(model.eval(), inputs)


@EVERY_NET
def test_reading_twice_gives_the_same_graph(net: str) -> None:
    assert read(net) == read(net)


@pytest.mark.parametrize("net", ["ConvNormChain", "Bottleneck", "DepthwiseSeparable", "DictOutput"])
def test_graph_module_has_the_spaces_of_its_model(net: str) -> None:
    model, inputs = NETS[net].model(), NETS[net].inputs()
    code = fx.symbolic_trace(model)
    before = (str(code.graph), code.code)
    found, expected = analyze(code, inputs).spaces, analyze(model, inputs).spaces
    assert list(map(without_place, found)) == list(map(without_place, expected))
    assert (str(code.graph), code.code) == before
    assert not any("val" in node.meta for node in code.graph.nodes)


def without_place(space: ChannelSpace) -> ChannelSpace:
    """Return a space whose reason does not name a place in the code."""
    return replace(space, reason=space.reason.partition(", at ")[0])


@pytest.mark.parametrize(
    "net", ["ConvNormChain", "TwoInputs", "AuxiliaryHead", "FlattenIntoLinear"]
)
def test_model_on_the_meta_device_is_read(net: str) -> None:
    inputs = tuple(tensor.to("meta") for tensor in NETS[net].inputs())
    graph = analyze(NETS[net].model().to("meta"), inputs)
    assert any("not proven" in note for note in graph.notes)
    assert replace(graph, notes=()) == replace(read(net), notes=())


def test_inputs_may_be_a_tensor_a_tuple_or_names() -> None:
    model, (image, vector) = NETS["TwoInputs"].model(), NETS["TwoInputs"].inputs()
    expected = analyze(model, (image, vector))
    assert analyze(model, {"vector": vector, "image": image}) == expected
    assert analyze(ConvChain(), IMAGE) == analyze(ConvChain(), (IMAGE,))
    assert analyze(ConvChain(), {"x": IMAGE}) == analyze(ConvChain(), IMAGE)


class Optional(ConvChain):
    """Branches on an argument that the example leaves at its default."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        x = F.relu(self.conv1(x))
        if mask is not None:
            x = x * mask
        return self.conv3(self.conv2(x * scale))


def test_arguments_left_at_their_default_are_read_as_such() -> None:
    assert analyze(Optional(), IMAGE)["conv1"].freedom == "stiefel"
    masked = analyze(Optional(), {"x": IMAGE, "mask": torch.zeros(2, 8, 8, 8)})
    assert masked["conv1"].freedom == "fixed"
    assert "multiplied with a tensor whose channels are not followed" in masked["conv1"].reason


def test_arguments_that_are_no_tensors_are_read_as_given() -> None:
    class Switched(ConvChain):
        def forward(self, x: Tensor, mask: Tensor | None, bent: bool) -> Tensor:  # noqa: FBT001
            x = self.conv1(x)
            if mask is not None:
                x = x * mask
            return self.conv2(F.relu(x) if bent else x)

    assert analyze(Switched(), (IMAGE, None, True))["conv1"].freedom == "stiefel"
    assert (
        analyze(Switched(), {"x": IMAGE, "mask": None, "bent": False})["conv1"].freedom == "linear"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_does_not_matter(dtype: torch.dtype) -> None:
    model = NETS["Bottleneck"].model().to(dtype)
    assert analyze(model, IMAGE.to(dtype)) == read("Bottleneck")


def test_batch_of_one_gives_the_same_spaces() -> None:
    for net in ("FlattenIntoLinear", "ReshapesThatFollow", "GroupNormed", "SqueezeExcite"):
        single = tuple(tensor[:1] for tensor in NETS[net].inputs())
        assert analyze(NETS[net].model(), single).spaces == read(net).spaces


# --------------------------------------------------------------------------------------------------
# What a user may teach it


class Doubler(nn.Module):
    """A layer without parameters, whose forward branches on a size."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 1 else x


class ValueDoubler(Doubler):
    """The same, but it branches on a value, so that even its shape is known to a run alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 1 else x


class WithDoubler(nn.Module):
    def __init__(self, gate: type[nn.Module] = Doubler) -> None:
        super().__init__()
        self.conv1 = conv(3, 8)
        self.gate = gate()
        self.conv2 = conv(8, 4)
        self.last = conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.conv2(self.gate(self.conv1(x)))))


def followed(call: Call) -> Value:
    """A user's rule: the operator scales every channel alike."""
    (x,) = call.followed()
    return call.like(x)


def test_leaf_without_a_rule_is_a_boundary() -> None:
    graph = analyze(WithDoubler(), IMAGE, leaves=[Doubler])
    assert graph["conv1"].freedom == "fixed"
    assert "no rule for 'gate' (Doubler)" in graph["conv1"].reason
    assert graph["conv2"].freedom == "stiefel"


def test_leaf_may_branch_on_values() -> None:
    graph = analyze(WithDoubler(ValueDoubler), IMAGE, leaves=[ValueDoubler])
    assert graph["conv1"].freedom == "fixed"
    assert graph["conv2"].freedom == "stiefel"


def test_rule_of_the_user_makes_a_module_known() -> None:
    graph = analyze(WithDoubler(), IMAGE, rules={Doubler: followed})
    assert graph["conv1"].freedom == "linear"
    assert layers_of(graph["conv1"].consumers) == "conv2"


def test_rule_of_the_user_makes_a_function_known() -> None:
    graph = analyze(CumulativeSum(), IMAGE, rules={torch.cumsum: followed})
    assert (graph["conv1"].freedom, layers_of(graph["conv1"].consumers)) == ("linear", "conv2")
    assert graph.notes == ()


def test_rule_of_the_user_makes_a_method_known() -> None:
    class Clipped(ConvChain):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x).clip(0, 1))

    assert analyze(Clipped(), IMAGE)["conv1"].freedom == "fixed"
    assert analyze(Clipped(), IMAGE, rules={"clip": followed})["conv1"].freedom == "linear"


@pytest.mark.parametrize("target", ["cumsum", torch.cumsum, Tensor.cumsum])
@pytest.mark.parametrize("method", [False, True])
def test_rule_is_for_the_method_and_the_function(target: Any, *, method: bool) -> None:
    class Summed(ConvChain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            return self.conv2(x.cumsum(3) if method else torch.cumsum(x, 3))

    assert analyze(Summed(), IMAGE, rules={target: followed})["conv1"].freedom == "linear"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"cumsumm": followed}, "'cumsumm', which is no method of torch.Tensor"),
        ({3: followed}, "a rule for 3; a rule is for a module class"),
        ({torch.cumsum: 7}, "takes a function or an Operator; got 7"),
    ],
)
def test_rules_that_are_none_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        analyze(ConvChain(), IMAGE, rules=rules)


def test_rule_that_returns_nothing_is_a_boundary() -> None:
    graph = analyze(ConvChain(), IMAGE, rules={F.relu: lambda call: None})
    assert graph["conv1"].reason.startswith("the rule of 'relu' returns None, at nets.py:")


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.ReLU(), nn.LSTM(4, 8), nn.BatchNorm1d(4)])
def test_model_that_is_one_layer_has_nothing_free(layer: nn.Module) -> None:
    graph = analyze(layer.eval(), torch.zeros(2, 4))
    assert not graph.free
    assert all(space.reason for space in graph.spaces)


@pytest.mark.parametrize(
    ("example_inputs", "message"),
    [
        ((1, 3, 8, 8), r"not their sizes: pass torch.zeros\(1, 3, 8, 8\)"),
        (np.zeros((1, 3, 8, 8)), "got a ndarray"),
        ("image", "got a str"),
    ],
)
def test_example_inputs_that_are_no_tensors_are_refused(example_inputs: Any, message: str) -> None:
    with pytest.raises(ExampleInputsError, match=message):
        analyze(ConvChain(), example_inputs)


def test_norm_that_hands_its_width_on_is_followed() -> None:
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    net = nn.Sequential(conv(3, 8), ChannelsFirst(8), nn.ReLU(), conv(8, 4))
    assert analyze(net, IMAGE)["0"].freedom == "selection"


def test_exported_program_is_refused_with_what_to_do() -> None:
    exported = torch.export.export(ConvChain().eval(), (IMAGE,)).module()
    with pytest.raises(ModelError, match="exported program; pass the module that it was made from"):
        analyze(exported, IMAGE)


def test_attribute_that_cannot_be_copied_is_named() -> None:
    model = ConvChain()
    model.conv2.lock = threading.Lock()
    with pytest.raises(ModelError, match="the attribute 'lock' of 'conv2', a lock, cannot"):
        analyze(model, IMAGE)


def test_rule_of_the_user_comes_before_the_table() -> None:
    def refuse(call: Call) -> Value:
        return call.give_up("not today")

    graph = analyze(ConvChain(), IMAGE, rules={F.relu: refuse})
    assert graph["conv1"].freedom == "fixed"
    assert graph["conv1"].reason.startswith("not today, at nets.py:")
    assert analyze(ConvChain(), IMAGE)["conv1"].freedom == "stiefel"


def test_rule_that_fails_is_a_boundary_and_is_noted() -> None:
    def broken(call: Call) -> Value:
        raise RuntimeError("out of luck")

    graph = analyze(ConvChain(), IMAGE, rules={F.relu: broken})
    assert graph["conv1"].freedom == "fixed"
    assert "the rule of 'relu' failed" in graph["conv1"].reason
    assert any("out of luck" in note for note in graph.notes)


def test_subclass_with_a_forward_of_its_own_is_read_inside() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Named(nn.Conv2d):
        pass

    def chain(kind: type[nn.Conv2d]) -> nn.Module:
        return nn.Sequential(conv(3, 8), kind(8, 6, 1), conv(6, 4))

    assert analyze(chain(Named), IMAGE)["0"].freedom == "linear"
    graph = analyze(chain(Doubled), IMAGE)
    assert [(s.name, s.freedom) for s in graph.free] == [("0", "linear"), ("1", "linear")]


# --------------------------------------------------------------------------------------------------
# Bad input


def test_example_inputs_are_asked_for_where_the_shape_is_unknown() -> None:
    with pytest.raises(ExampleInputsError, match=r"ConvChain.*example_inputs"):
        analyze(ConvChain())


@pytest.mark.parametrize(
    ("inputs", "facts"),
    [
        (torch.zeros(2, 5, 8, 8), r"ConvChain.*\(2, 5, 8, 8\)"),
        ((IMAGE, IMAGE), r"ConvChain.*too many positional arguments"),
        ({"image": IMAGE}, r"ConvChain.*'x'"),
        ((), r"ConvChain.*'x'"),
    ],
    ids=["channels", "too many", "unknown name", "none"],
)
def test_example_inputs_that_do_not_fit_are_refused(inputs: Any, facts: str) -> None:
    model = ConvChain().train()
    before = fingerprint(model)
    with pytest.raises(ExampleInputsError, match=facts):
        analyze(model, inputs)
    assert fingerprint(model) == before
    assert model.training


@pytest.mark.parametrize("gate", [Doubler, ValueDoubler])
def test_module_that_branches_is_read_or_is_a_boundary_without_being_named(
    gate: type[nn.Module],
) -> None:
    model = WithDoubler(gate).train()
    graph = analyze(model, IMAGE)
    free = ["conv1", "conv2"] if gate is Doubler else ["conv2"]
    assert [space.name for space in graph.free] == free
    if gate is ValueDoubler:
        pattern = r"'gate' is read in pieces.*test_spaces.py:\d+ \(float\(x.sum\(\)\)\)"
        assert any(re.search(pattern, note) for note in graph.notes)
    assert all(module.training for module in model.modules())


def test_scripted_model_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)))
    with pytest.raises(ModelError, match="scripted"):
        analyze(scripted, IMAGE)


@pytest.mark.parametrize("thing", [F.relu, None, "resnet18"])
def test_what_is_no_module_is_refused(thing: Any) -> None:
    with pytest.raises(ModelError, match=rf"torch.nn.Module was expected.*{type(thing).__name__}"):
        analyze(thing, IMAGE)


def test_model_without_layers_has_no_spaces() -> None:
    assert analyze(nn.Sequential(nn.ReLU(), nn.Flatten()), IMAGE).spaces == ()


def test_copies_of_a_model_are_read_alike() -> None:
    for build in (AuxiliaryHead, Bottleneck, ConvNormChain, DictOutput, FlattenIntoLinear):
        model = build()
        assert analyze(copy.deepcopy(model), IMAGE) == analyze(model, IMAGE)
    inputs = (IMAGE, torch.zeros(2, 7))
    assert analyze(copy.deepcopy(TwoInputs()), inputs) == analyze(TwoInputs(), inputs)
