"""Second moments against their definition; input patches against the layers themselves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame
from torch import Tensor, nn
from torch.testing import assert_close

from torchcap import processes
from torchcap.errors import DataError
from torchcap.projection import moments as module
from torchcap.projection.moments import JointMoments, SecondMoments, input_patches

SEEDS = st.integers(0, 2**32 - 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moments_of(rows: Tensor) -> SecondMoments:
    moments = SecondMoments(rows.shape[1])
    moments.update(rows)
    return moments


# --- second moments ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, print_blob=True)
@given(
    seed=SEEDS,
    features=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_moments_of_batches_are_those_of_all_rows(seed, features, sizes, dtype):
    rows = torch.randn(sum(sizes), features, generator=seeded(seed)).to(dtype)
    moments = SecondMoments(features)
    for batch in rows.split(sizes):
        moments.update(batch)

    exact = rows.double()
    assert moments.count == len(rows)
    assert_close(moments.mean, exact.mean(0))
    assert_close(moments.second_moment, exact.mT @ exact / len(rows))
    assert_close(moments.covariance, exact.mT.cov(correction=0).reshape(features, features))


@pytest.mark.parametrize("features", [255, 256, 257, 600])
def test_wide_second_moment_is_complete_and_exactly_symmetric(features):
    rows = torch.randn(20, features, generator=seeded(0))
    second_moment = moments_of(rows).second_moment
    assert torch.equal(second_moment, second_moment.mT)
    assert_close(second_moment, rows.double().mT @ rows.double() / 20)


def test_rows_beyond_the_conversion_buffer_all_count(monkeypatch):
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 10)
    rows = torch.randn(11, 3, generator=seeded(0), dtype=torch.float64)
    moments = moments_of(rows)
    assert moments.count == 11
    assert_close(moments.mean, rows.mean(0))
    assert_close(moments.second_moment, rows.mT @ rows / 11)


def test_merged_moments_are_those_of_both_and_leave_the_other_alone():
    rows = torch.randn(9, 4, generator=seeded(0), dtype=torch.float64)
    left, right = moments_of(rows[:3]), moments_of(rows[3:])
    left.merge(right)
    assert left.count == 9
    assert_close(left.mean, rows.mean(0))
    assert_close(left.second_moment, rows.mT @ rows / 9)
    assert right.count == 6
    assert_close(right.second_moment, rows[3:].mT @ rows[3:] / 6)


def test_autocast_does_not_round_the_products():
    rows = torch.randn(50, 8, generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        moments = moments_of(rows)
        second_moment = moments.second_moment
        covariance = moments.covariance
    exact = rows.double()
    assert_close(second_moment, exact.mT @ exact / 50)
    assert_close(covariance, exact.mT.cov(correction=0))


def test_covariance_survives_a_mean_far_from_zero():
    rows = 1e4 + torch.randn(500, 3, generator=seeded(0))
    expected = rows.double().mT.cov(correction=0)
    # Float32 products would be off by several units here.
    assert_close(moments_of(rows).covariance, expected, rtol=1e-6, atol=1e-6)


def test_rows_of_a_graph_leave_no_graph_behind():
    moments = moments_of(torch.randn(4, 2, requires_grad=True))
    assert not moments.second_moment.requires_grad
    assert not moments.mean.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_are_refused_and_nothing_is_added(bad):
    rows = torch.ones(5, 3)
    moments = moments_of(rows)
    rows[2, 1] = rows[4, 0] = bad
    with pytest.raises(DataError, match=r"2 of 5 rows.*row 2"):
        moments.update(rows)
    assert moments.count == 5
    assert_close(moments.second_moment, torch.ones(3, 3, dtype=torch.float64))


def test_rows_whose_sum_overflows_are_refused():
    with pytest.raises(DataError, match=r"2 rows is beyond float64"):
        moments_of(torch.full((2, 1), 1.7e308, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4, 2), (3,), (1, 4, 3)])
def test_rows_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=rf"\(n, 3\).*{shape[0]}"):
        SecondMoments(3).update(torch.ones(shape))


def test_moments_of_different_widths_do_not_merge():
    with pytest.raises(ValueError, match=r"5 features.*3 features"):
        SecondMoments(3).merge(SecondMoments(5))


def test_rows_must_have_features():
    with pytest.raises(ValueError, match="features=0"):
        SecondMoments(0)


@pytest.mark.parametrize("name", ["mean", "second_moment", "covariance"])
def test_moments_of_no_rows_are_an_error(name):
    moments = moments_of(torch.empty(0, 3))
    with pytest.raises(DataError, match="no rows of 3 features"):
        getattr(moments, name)


def test_reduce_without_processes_changes_nothing():
    moments = moments_of(torch.ones(4, 2))
    moments.reduce()
    assert moments.count == 4
    assert_close(moments.second_moment, torch.ones(2, 2, dtype=torch.float64))


def test_reduce_sums_over_processes(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(3))  # two more like this one
    rows = torch.randn(4, 2, generator=seeded(0), dtype=torch.float64)
    moments = moments_of(rows)
    moments.reduce()
    assert moments.count == 12
    assert_close(moments.mean, rows.mean(0))
    assert_close(moments.second_moment, rows.mT @ rows / 4)


@pytest.mark.slow
def test_reduce_gives_every_process_the_moments_of_all_rows(tmp_path):
    mp.spawn(check_reduced, args=(f"file://{tmp_path}/store",), nprocs=2)


def check_reduced(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    rows = torch.arange(15.0).reshape(5, 3)
    moments = moments_of(rows[:2] if rank == 0 else rows[2:])
    moments.reduce()
    dist.destroy_process_group()
    assert moments.count == 5
    assert_close(moments.mean, rows.double().mean(0))
    assert_close(moments.second_moment, rows.double().mT @ rows.double() / 5)


# --- input patches -------------------------------------------------------------------------------


def output_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """Outputs as rows, in the order of the patches: position by position, image by image."""
    return (output if isinstance(layer, nn.Linear) else output.movedim(1, -1)).flatten(0, -2)


def rebuilt_output_rows(layer: nn.Module, x: Tensor) -> Tensor:
    patches = input_patches(layer, x)
    out = len(layer.weight)
    weight = layer.weight.reshape(len(patches), out // len(patches), -1)
    rows = (patches @ weight.mT).transpose(0, 1).reshape(-1, out)
    return rows if layer.bias is None else rows + layer.bias


@st.composite
def convs(draw) -> tuple[nn.Module, Tensor]:
    axes = draw(st.integers(1, 3))
    kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][axes - 1]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    padding = draw(st.sampled_from(["same", "valid", "amounts", "one amount"]))
    groups = draw(st.integers(1, 3))
    torch.manual_seed(draw(SEEDS))
    layer = kind(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        each(1, 3),
        stride=1 if padding == "same" else each(1, 3),
        dilation=each(1, 2),
        groups=groups,
        padding={"amounts": each(0, 2), "one amount": 1}.get(padding, padding),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
        dtype=torch.float64,
    )
    x = torch.randn(draw(st.integers(1, 2)), layer.in_channels, *each(5, 7), dtype=torch.float64)
    return layer, x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(deadline=None, max_examples=150, print_blob=True)
@given(convs())
def test_patches_of_a_convolution_times_its_weight_are_its_output(case):
    layer, x = case
    assert_close(rebuilt_output_rows(layer, x), output_rows(layer, layer(x)))


@settings(deadline=None, max_examples=40, print_blob=True)
@given(
    seed=SEEDS,
    sizes=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 2),
    kind=st.sampled_from([Conv2dSame, Conv2dSameExport]),
)
def test_patches_follow_tensorflows_padding(seed, sizes, kernel, stride, dilation, kind):
    torch.manual_seed(seed)
    layer = kind(2, 3, (kernel, 3), stride=(stride, 2), dilation=dilation).double()
    x = torch.randn(2, 2, *sizes, dtype=torch.float64)
    assert_close(rebuilt_output_rows(layer, x), output_rows(layer, layer(x)))


@pytest.mark.parametrize("kind", [StdConv2dSame, ScaledStdConv2dSame])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (4, 1), (3, 1)])
def test_weight_standardised_convolutions_pad_like_their_plain_form(kind, kernel, stride):
    x = torch.randn(2, 2, 7, 8, generator=seeded(0))
    layer, plain = kind(2, 3, kernel, stride=stride), Conv2dSame(2, 3, kernel, stride=stride)
    assert layer.same_pad is ((kernel, stride) != (3, 1))  # the last one pads statically
    assert torch.equal(input_patches(layer, x), input_patches(plain, x))


@pytest.mark.parametrize("kind", [StdConv2dSame, ScaledStdConv2dSame])
def test_weight_standardised_convolutions_may_pad_by_fixed_amounts(kind):
    x = torch.randn(2, 2, 8, 8, generator=seeded(0))
    layer, plain = kind(2, 3, 3, stride=2, padding=""), nn.Conv2d(2, 3, 3, stride=2, padding=1)
    assert torch.equal(input_patches(layer, x), input_patches(plain, x))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 3, 4)])
def test_patches_of_a_linear_layer_are_its_inputs(leading):
    layer = nn.Linear(5, 2, dtype=torch.float64)
    x = torch.randn(*leading, 5, generator=seeded(0), dtype=torch.float64)
    assert_close(rebuilt_output_rows(layer, x), layer(x).reshape(-1, 2))


def test_an_image_without_batch_dimension_is_a_batch_of_one():
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 5, 5, generator=seeded(0))
    assert torch.equal(input_patches(layer, x), input_patches(layer, x[None]))


def test_patches_keep_dtype_and_carry_no_graph():
    x = torch.randn(1, 2, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    patches = input_patches(nn.Conv2d(2, 3, 3, padding=1), x)
    assert patches.dtype == torch.bfloat16
    assert not patches.requires_grad


def test_channels_last_input_gives_the_same_patches():
    layer, x = nn.Conv2d(4, 2, 3, padding=1), torch.randn(2, 4, 5, 6, generator=seeded(0))
    channels_last = x.to(memory_format=torch.channels_last)
    assert torch.equal(input_patches(layer, x), input_patches(layer, channels_last))


@settings(deadline=None, max_examples=60, print_blob=True)
@given(seed=SEEDS, max_rows=st.integers(1, 80))
def test_drawn_rows_are_distinct_patches_in_order(seed, max_rows):
    layer = nn.Conv2d(2, 2, 2, groups=2)
    x = torch.arange(2 * 2 * 5 * 6.0).reshape(2, 2, 5, 6)  # so that no two patches are equal
    patches = input_patches(layer, x)
    drawn = input_patches(layer, x, max_rows=max_rows, generator=seeded(seed))
    assert drawn.shape == (2, min(max_rows, 2 * 4 * 5), 4)
    same = (drawn[:, :, None] == patches[:, None]).all(-1).all(0)  # in both groups at once
    assert same.sum(1).tolist() == [1] * drawn.shape[1]
    positions = same.int().argmax(1)
    assert bool((positions.diff() > 0).all())


def test_generators_in_one_state_draw_the_same_positions_for_any_layer():
    x = torch.arange(60.0).reshape(3, 1, 4, 5)
    of_conv = input_patches(nn.Conv2d(1, 1, 1), x, max_rows=7, generator=seeded(3))
    of_linear = input_patches(nn.Linear(1, 1), x[..., None], max_rows=7, generator=seeded(3))
    other = input_patches(nn.Conv2d(1, 1, 1), x, max_rows=7, generator=seeded(4))
    assert torch.equal(of_conv, of_linear)
    assert not torch.equal(of_conv, other)


def test_drawing_a_few_rows_does_not_make_all_patches():
    x = torch.zeros(()).expand(4, 1024, 512, 512)  # 50176 numbers a patch: 200 GB altogether
    drawn = input_patches(nn.Conv2d(1024, 1, 7, device="meta"), x, max_rows=3)
    assert drawn.shape == (1, 3, 50176)


@pytest.mark.parametrize(
    ("layer", "shape", "facts"),
    [
        (nn.Conv2d(3, 4, 1), (2, 5, 6, 6), r"Conv2d.*3 channels.*\(2, 5, 6, 6\)"),
        (nn.Conv1d(3, 4, 1), (1, 2, 3, 6), r"Conv1d.*2 or 3 dim.*\(1, 2, 3, 6\)"),
        (nn.Linear(3, 4), (2, 5), r"Linear.*3 features.*\(2, 5\)"),
    ],
)
def test_an_input_that_does_not_fit_the_layer_is_refused(layer, shape, facts):
    with pytest.raises(ValueError, match=facts):
        input_patches(layer, torch.zeros(shape))


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.ConvTranspose2d(3, 3, 1)])
def test_layers_of_other_kinds_are_refused(layer):
    with pytest.raises(TypeError, match=type(layer).__name__):
        input_patches(layer, torch.zeros(1, 3, 4, 4))


def test_at_least_one_row_must_be_wanted():
    with pytest.raises(ValueError, match="got 0"):
        input_patches(nn.Linear(2, 2), torch.zeros(3, 2), max_rows=0)


# --- joint moments -------------------------------------------------------------------------------


def joint_moments_of(rows: Tensor, targets: Tensor) -> JointMoments:
    moments = JointMoments(rows.shape[0], rows.shape[2], targets.shape[2])
    moments.update(rows, targets)
    return moments


def random_pair(seed: int, groups: int, n: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    draws = torch.randn(groups, n, inputs + outputs, generator=seeded(seed), dtype=torch.float64)
    return draws[..., :inputs] + 0.5, draws[..., inputs:] - 0.5


def assert_moments_of(moments: JointMoments, x: Tensor, t: Tensor) -> None:
    """The definition, one sum at a time."""
    x, t, n = x.double(), t.double(), x.shape[1]
    assert moments.count == n
    assert_close(moments.input_mean, x.sum(1) / n)
    assert_close(moments.output_mean, t.sum(1) / n)
    assert_close(moments.input_moment, torch.einsum("gni,gnj->gij", x, x) / n)
    assert_close(moments.cross_moment, torch.einsum("gni,gno->gio", x, t) / n)
    assert_close(moments.output_square, (t**2).sum(1) / n)


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4))


@settings(deadline=None, max_examples=60, print_blob=True)
@given(
    seed=SEEDS,
    sizes=SIZES,
    chunks=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_joint_moments_of_batches_are_those_of_all_rows(seed, sizes, chunks, dtype):
    groups, inputs, outputs = sizes
    x, t = (part.to(dtype) for part in random_pair(seed, groups, sum(chunks), inputs, outputs))
    moments = JointMoments(groups, inputs, outputs)
    for rows, targets in zip(x.split(chunks, 1), t.split(chunks, 1), strict=True):
        moments.update(rows, targets)
    assert_moments_of(moments, x, t)


@settings(deadline=None, max_examples=30, print_blob=True)
@given(seed=SEEDS, sizes=SIZES, elements=st.integers(1, 40), columns=st.integers(1, 7))
def test_buffers_of_any_size_give_the_same_joint_moments(seed, sizes, elements, columns):
    groups, inputs, outputs = sizes
    x, t = random_pair(seed, groups, 9, inputs, outputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ELEMENTS_AT_ONCE", elements)
        patch.setattr(module, "_COLUMNS_AT_ONCE", columns)
        moments = joint_moments_of(x, t)
    assert_moments_of(moments, x, t)
    assert torch.equal(moments.input_moment, moments.input_moment.mT)


def test_merged_joint_moments_are_those_of_both_and_leave_the_other_alone():
    x, t = random_pair(0, 2, 9, 4, 3)
    left, right = joint_moments_of(x[:, :3], t[:, :3]), joint_moments_of(x[:, 3:], t[:, 3:])
    left.merge(right)
    assert_moments_of(left, x, t)
    assert_moments_of(right, x[:, 3:], t[:, 3:])


@given(seed=SEEDS, sizes=SIZES, most=st.integers(1, 5))
def test_thinned_moments_are_those_of_some_targets(seed, sizes, most):
    groups, inputs, outputs = sizes
    x, t = random_pair(seed, groups, 6, inputs, outputs)
    moments = joint_moments_of(x, t)
    thin = moments.thinned(most)
    some = t[..., :: math.ceil(outputs / most)]
    assert 1 <= thin.outputs == some.shape[2] <= most
    assert_moments_of(thin, x, some)
    assert_moments_of(moments, x, t)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["rows", "targets"])
def test_joint_rows_that_are_not_finite_are_refused_and_nothing_is_added(bad, place):
    x, t = random_pair(0, 2, 5, 3, 2)
    moments = joint_moments_of(x, t)
    broken = {"rows": x.clone(), "targets": t.clone()}
    broken[place][1, 4, 0] = bad
    with pytest.raises(DataError, match="NaN or infinity"):
        moments.update(**broken)
    assert_moments_of(moments, x, t)


@given(sizes=SIZES)
def test_the_size_of_joint_moments_is_what_their_sums_take(sizes):
    assert JointMoments.size(*sizes) == sum(part.nbytes for part in JointMoments(*sizes)._sums())


def test_joint_moments_carry_no_graph_and_autocast_does_not_round_them():
    x, t = (part.float().requires_grad_() for part in random_pair(0, 1, 50, 8, 2))
    with torch.autocast("cpu", torch.bfloat16):
        moments = joint_moments_of(x, t)
    assert_moments_of(moments, x.detach(), t.detach())
    assert not moments.cross_moment.requires_grad


def test_reduce_sums_joint_moments_over_processes(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(3))  # two more like this one
    x, t = random_pair(0, 2, 4, 3, 2)
    moments = joint_moments_of(x, t)
    moments.reduce()
    assert_moments_of(moments, *(part.repeat(1, 3, 1) for part in (x, t)))


# --- output rows ---------------------------------------------------------------------------------


def regression_of(layer: nn.Module, x: Tensor, **draw) -> tuple[Tensor, Tensor]:
    """Patches with a one behind each, and the layer's own output at the same positions."""
    seeds = [draw.pop("seed", 0)] * 2
    first, second = map(seeded, seeds)
    patches = input_patches(layer, x, generator=first, **draw)
    rows = module.output_rows(layer, layer(x).detach(), generator=second, **draw)
    ones = torch.ones(*patches.shape[:2], 1, dtype=x.dtype)
    targets = rows.reshape(len(rows), len(patches), -1).transpose(0, 1)
    return torch.cat([patches, ones], 2), targets


def kernel_by_least_squares(layer: nn.Module, design: Tensor, targets: Tensor) -> Tensor:
    solution = torch.linalg.lstsq(design, targets).solution
    return solution[:, :-1].mT.reshape(layer.weight.shape)


@settings(deadline=None, max_examples=60, print_blob=True)
@given(case=convs(), seed=SEEDS, max_rows=st.none() | st.integers(100, 300))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_regressing_output_rows_on_patches_recovers_a_kernel(case, seed, max_rows):
    layer, x = case
    x = torch.randn(40, *x.shape[1:], generator=seeded(seed), dtype=x.dtype)
    design, targets = regression_of(layer, x, max_rows=max_rows, seed=seed)
    # Mirrored borders may show two taps the same inputs everywhere.
    assume(bool((torch.linalg.matrix_rank(design) == design.shape[2]).all()))
    assert_close(kernel_by_least_squares(layer, design, targets), layer.weight.detach())


@pytest.mark.parametrize("leading", [(50,), (10, 7), (5, 4, 6)])
@pytest.mark.parametrize("max_rows", [None, 30])
def test_regressing_output_rows_on_inputs_recovers_a_linear_layer(leading, max_rows):
    layer = nn.Linear(5, 3, dtype=torch.float64)
    x = torch.randn(*leading, 5, generator=seeded(0), dtype=torch.float64)
    design, targets = regression_of(layer, x, max_rows=max_rows)
    assert design.shape[1] == (max_rows or math.prod(leading))
    assert_close(kernel_by_least_squares(layer, design, targets), layer.weight.detach())


def test_output_rows_of_more_channels_are_at_the_same_positions():
    layer, wide = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 8, 3)
    x = torch.randn(2, 2, 6, 6, generator=seeded(0))
    with torch.no_grad():
        wide.weight[2:5], wide.bias[2:5] = layer.weight, layer.bias
    rows, more = (
        module.output_rows(layer, y, max_rows=9, generator=seeded(1)) for y in (layer(x), wide(x))
    )
    assert more.shape == (9, 8)
    assert_close(more[:, 2:5], rows)
