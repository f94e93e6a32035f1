# SPDX-License-Identifier: MIT
"""Tests of neco.py and eval_seg.py, without GPU and network: `python -m pytest test_neco.py`.

Methods are compared with slow and obvious versions of them, which are written here."""

import csv
import errno
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import urllib.error
import zlib
from collections import deque
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GPUS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # for the tests that need one
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms
from torchvision.transforms import functional as tvf

import eval_seg
import neco

torch.set_num_threads(1)  # the order of sums, hence the last bit, depends on it
KINDS = ("bitonic", "odd_even")
both_kinds = pytest.mark.parametrize("kind", KINDS)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------- sorting


def sorts(network, inputs):
    """Whether a network sorts 0-1 inputs (K, n). A wire is an integer of K bits, one an input."""
    wires = [int.from_bytes(row.tobytes(), "big") for row in np.packbits(inputs, axis=0).T]
    for lo, hi in itertools.chain(*network):
        wires[lo], wires[hi] = wires[lo] & wires[hi], wires[lo] | wires[hi]
    return all(a & ~b == 0 for a, b in zip(wires, wires[1:]))


def binary_inputs(n):
    if n <= 12:
        return np.arange(2**n)[:, None] >> np.arange(n) & 1
    thresholds = np.tri(n + 1, n, -1, dtype=int)
    shuffled = np.random.default_rng(n).permuted(thresholds, axis=1)
    return np.concatenate([thresholds, thresholds[:, ::-1], shuffled])


@both_kinds
def test_network_sorts_for_every_n(kind):
    # A network that sorts all 0-1 inputs sorts everything (zero-one principle).
    for n in range(1, 257):
        assert sorts(neco.sorting_network(n, kind), binary_inputs(n)), n


@both_kinds
def test_layers_are_disjoint_pairs_of_rising_wires(kind):
    for n in range(1, 257):
        for layer in neco.sorting_network(n, kind):
            wires = list(itertools.chain(*layer))
            assert len(wires) == len(set(wires)) and set(wires) <= set(range(n))
            assert all(lo < hi for lo, hi in layer)


def test_number_of_layers():
    for n in range(1, 257):
        k = math.ceil(math.log2(n))
        assert len(neco.sorting_network(n)) == k * (k + 1) // 2
        assert len(neco.sorting_network(n, "odd_even")) == n
    assert len(neco.sorting_network(49)) == 21


@both_kinds
def test_a_steep_soft_sort_is_a_sort_for_every_n(kind):
    # Odd-even has n layers, so large n are slow: of those every 26th.
    sizes = [n for n in range(1, 257) if kind == "bitonic" or n <= 48 or n % 26 == 22]
    for n in sizes:
        x = torch.stack([torch.randperm(n).double(), -torch.arange(n).double()])
        values, permutation = neco.soft_sort(torch.cat([x, x % 2]), 1e15, kind)
        # A comparator of gap 1 leaks 1 / (pi s) of it; a value passes at most n of them.
        close = functools.partial(torch.testing.assert_close, atol=1e-9, rtol=0)
        close(values[:2], x.sort(-1).values)
        close(permutation[:2], F.one_hot(x.argsort(-1), n).double())
        assert torch.equal(values[2:].round(), (x % 2).sort(-1).values), n


def slow_soft_sort(x, steepness, kind):
    """The definition for one vector: comparator after comparator, on values and on the identity."""
    values, rows = list(x), list(torch.eye(len(x), dtype=x.dtype))
    for lo, hi in itertools.chain(*neco.sorting_network(len(x), kind)):
        alpha = 0.5 + torch.atan(steepness * (values[hi] - values[lo])) / math.pi
        for wires in (values, rows):
            a, b = wires[lo], wires[hi]
            wires[lo], wires[hi] = alpha * a + (1 - alpha) * b, (1 - alpha) * a + alpha * b
    return torch.stack(values), torch.stack(rows)


@both_kinds
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 12, 22, 33, 49])
def test_soft_sort_equals_the_definition_with_gradient(n, kind):
    x = normal(2, n, seed=n).requires_grad_()
    slow = [torch.stack(both) for both in zip(*(slow_soft_sort(row, 20.0, kind) for row in x))]
    fast = neco.soft_sort(x, 20.0, kind)
    weights = [normal(*output.shape, seed=1) for output in slow]
    gradients = [
        torch.autograd.grad(sum((w * y).sum() for w, y in zip(weights, outputs)), x)[0]
        for outputs in (slow, fast)
    ]
    for a, b in zip([*fast, gradients[1]], [*slow, gradients[0]]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)  # float64 over up to 49 layers


@both_kinds
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 8, 11])
def test_gradient_against_finite_differences(n, kind):
    x = normal(2, n, seed=n).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: neco.soft_sort(x, 3.0, kind), (x,))


@both_kinds
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_permutation_is_doubly_stochastic_and_gives_the_values(kind, dtype, tolerance):
    # Rounding adds up over n layers at most: 1e-16 or 6e-8, times 100.
    for n in (1, 2, 3, 22, 38, 43, 49, 54, 64, 100):
        x = normal(3, n, seed=n, dtype=dtype)
        values, permutation = neco.soft_sort(x, 10.0, kind)
        close = functools.partial(torch.testing.assert_close, rtol=0, atol=tolerance)
        for dim in (-1, -2):
            close(permutation.sum(dim), torch.ones(3, n, dtype=dtype))
        close(values, (permutation @ x[..., None])[..., 0])
        assert permutation.min() >= -tolerance


@both_kinds
@pytest.mark.parametrize("n", [49, 2, 4, 8, 16, 32, 64, 128])
def test_soft_sort_equals_diffsort(n, kind):
    diffsort = pytest.importorskip("diffsort")
    x = F.normalize(normal(4, n, seed=n, dtype=torch.float32), dim=-1).requires_grad_()
    theirs = diffsort.DiffSortNet(kind, n, steepness=100.0, distribution="cauchy")(x)
    values, permutation = neco.soft_sort(x, 100.0, kind)
    ours = values, permutation.transpose(1, 2)  # theirs is [item, rank]
    weights = [normal(*output.shape, seed=1, dtype=torch.float32) for output in ours]
    for a, b, w in zip(ours, theirs, weights):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)  # float32 over up to 128 layers
        gradients = [torch.autograd.grad((w * y).sum(), x, retain_graph=True)[0] for y in (a, b)]
        scale = gradients[1].abs().max().item()  # slopes reach steepness / pi
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-4 * scale)


def test_soft_sort_takes_any_leading_dimensions():
    x = normal(2, 3, 4, 5)
    values, permutation = neco.soft_sort(x, 10.0)
    assert values.shape == (2, 3, 4, 5) and permutation.shape == (2, 3, 4, 5, 5)
    for index in itertools.product(range(2), range(3), range(4)):
        for alone, together in zip(neco.soft_sort(x[index], 10.0), (values, permutation)):
            torch.testing.assert_close(alone, together[index])
    empty = normal(0, 7).requires_grad_()
    values, permutation = neco.soft_sort(empty)
    assert values.shape == (0, 7) and permutation.shape == (0, 7, 7)
    (values.sum() + permutation.sum()).backward()
    assert empty.grad.shape == (0, 7)


@both_kinds
def test_soft_sort_computes_in_float32_or_float64(kind):
    x = normal(6, 13)
    for dtype in (torch.float64, torch.float32):
        assert {y.dtype for y in neco.soft_sort(x.to(dtype), kind=kind)} == {dtype}
    half = x.bfloat16()
    expected = neco.soft_sort(half.float(), kind=kind)
    for y, z in zip(neco.soft_sort(half, kind=kind), expected):
        assert y.dtype == torch.float32 and torch.equal(y, z)
    with torch.autocast("cpu", torch.bfloat16):
        for y, z in zip(neco.soft_sort(half.float(), kind=kind), expected):
            assert y.dtype == torch.float32 and torch.equal(y, z)


@pytest.mark.parametrize(
    "call",
    [
        lambda: neco.sorting_network(0),
        lambda: neco.sorting_network(4, "quick"),
        lambda: neco.soft_sort(torch.tensor(1.0)),
        lambda: neco.soft_sort(torch.ones(3, 0)),
        lambda: neco.soft_sort(torch.ones(3), steepness=0),
        lambda: neco.soft_sort(torch.ones(3), steepness=math.nan),
        lambda: neco.soft_sort(torch.ones(3), kind="quick"),
    ],
)
def test_sorting_refuses_what_its_docstrings_name(call):
    with pytest.raises(ValueError):
        call()


# ---------------------------------------------------------------------------------------- loss


def slow_permutation(patch, references, steepness, kind):
    similarities = torch.stack([F.cosine_similarity(patch, r, dim=0) for r in references])
    return slow_soft_sort(similarities, steepness, kind)[1]


def slow_loss(
    student, teacher, references, steepness=100.0, teacher_steepness=None, kind="bitonic"
):
    """The definition, image by image and patch by patch."""
    losses = []
    for image_of_student, image_of_teacher, drawn in zip(student, teacher, references):
        for patch, other in zip(image_of_student, image_of_teacher):
            p = slow_permutation(patch, drawn, steepness, kind)
            q = slow_permutation(other, drawn, teacher_steepness or steepness, kind)
            losses.append(-(q * p.log()).sum(0).mean())
    return torch.stack(losses).mean()


def features(batch=2, patches=3, references=6, dim=5, dtype=torch.float64):
    """Features of student, teacher, alike but for noise, and references; none normalised."""
    student = 3 * normal(batch, patches, dim, seed=1)
    teacher = student + normal(batch, patches, dim, seed=2)
    return [t.to(dtype) for t in (student, teacher, normal(batch, references, dim, seed=3))]


@both_kinds
@pytest.mark.parametrize("size", [{}, {"references": 7}])
@pytest.mark.parametrize("steepness", [(100.0, None), (7.0, 30.0)])
def test_loss_equals_the_definition_with_gradient(kind, size, steepness):
    student, teacher, references = features(**size)
    student.requires_grad_()
    losses = [
        loss(student, teacher, references, *steepness, kind) for loss in (neco.neco_loss, slow_loss)
    ]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(3 * loss, student)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


@both_kinds
def test_loss_of_many_rows_is_the_mean_over_the_images(kind):
    # 700 rows are over two of the blocks that are computed together, 100 are less than one.
    student, teacher, references = features(batch=7, patches=100)
    student.requires_grad_()
    whole = neco.neco_loss(student, teacher, references, kind=kind)
    images = zip(student.split(1), teacher.split(1), references.split(1))
    mean = torch.stack([neco.neco_loss(*image, kind=kind) for image in images]).mean()
    torch.testing.assert_close(whole, mean)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (whole, mean)))


def test_loss_equals_diffsort_matrices_in_float32():
    diffsort = pytest.importorskip("diffsort")
    student, teacher, references = features(references=49, dim=32, dtype=torch.float32)
    rank = diffsort.DiffSortNet("bitonic", 49, steepness=100.0, distribution="cauchy")
    q, p = (
        rank(F.cosine_similarity(x[:, :, None], references[:, None], dim=-1).flatten(0, 1))[1]
        for x in (teacher, student)
    )
    expected = -(q * p.log()).sum(2).mean()
    loss = neco.neco_loss(student, teacher, references)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)  # log of float32 entries of 1e-7


def test_only_the_student_gets_a_gradient():
    student, teacher, references = (t.requires_grad_() for t in features())
    neco.neco_loss(student, teacher, references).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None and references.grad is None


def test_loss_does_not_depend_on_the_scale_of_features():
    student, teacher, references = features()
    scaled = neco.neco_loss(100 * student, 0.01 * teacher, 7 * references)
    torch.testing.assert_close(scaled, neco.neco_loss(student, teacher, references))


@both_kinds
def test_floor_is_the_entropy_of_the_teachers_ranking(kind):
    student, teacher, references = features()
    q = torch.stack(
        [slow_permutation(patch, r, 50.0, kind) for t, r in zip(teacher, references) for patch in t]
    )
    entropy = -(q * q.log()).sum(1).mean()
    floor = neco.neco_loss(teacher, teacher, references, 50.0, kind=kind)
    torch.testing.assert_close(floor, entropy)
    for steepness in (10.0, 50.0, 300.0):
        assert neco.neco_loss(student, teacher, references, steepness, 50.0, kind) > entropy
    student = teacher.clone().requires_grad_()
    neco.neco_loss(student, teacher, references, 50.0, kind=kind).backward()
    assert student.grad.abs().max() < 1e-10  # the minimum, to rounding


@pytest.mark.parametrize("count", [2, 8, 32])
def test_an_uninformed_student_costs_log_r(count):
    # A student at right angles to all references: all similarities are 0, and on a power of two
    # a bitonic network of comparators that all mix by halves makes every entry 1 / R.
    references = torch.cat([normal(2, count, 4), torch.zeros(2, count, 1).double()], dim=2)
    student = torch.tensor([0.0, 0, 0, 0, 2]).double().expand(2, 3, 5)
    loss = neco.neco_loss(student, normal(2, 3, 5, seed=1), references)
    assert loss.item() == pytest.approx(math.log(count), rel=1e-12)


def test_a_single_reference_costs_nothing():
    student, teacher, references = features(references=1)
    student.requires_grad_()
    loss = neco.neco_loss(student, teacher, references)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_loss_is_float32_under_autocast_and_for_half_precision():
    student, teacher, references = features(dtype=torch.float32)
    expected = neco.neco_loss(student, teacher, references)
    assert expected.dtype == torch.float32 and expected.shape == ()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(neco.neco_loss(student, teacher, references), expected)
    half = [t.bfloat16() for t in (student, teacher, references)]
    half[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = neco.neco_loss(*half)
    loss.backward()
    assert torch.equal(loss, neco.neco_loss(*(t.float() for t in half)))
    assert half[0].grad.dtype == torch.bfloat16 and half[0].grad.abs().sum() > 0


@both_kinds
def test_loss_in_float32_agrees_with_float64(kind):
    double = features(patches=20, references=49, dim=8)
    single = [t.float() for t in double]
    gradients = []
    for student, teacher, references in (double, single):
        student.requires_grad_()
        loss = neco.neco_loss(student, teacher, references, kind=kind)
        gradients.append(torch.autograd.grad(loss, student)[0].double())
    losses = [neco.neco_loss(*inputs, kind=kind).item() for inputs in (single, double)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # Entries of P near 1e-7 carry few digits of float32, and their log has a steep slope.
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert difference < 1e-2


@both_kinds
@pytest.mark.parametrize("steepness", [1e-6, 1e4, 1e8])
def test_loss_and_gradient_are_finite_at_any_steepness(kind, steepness):
    student, teacher, references = features(references=49, dtype=torch.float32)
    student.requires_grad_()
    loss = neco.neco_loss(student, teacher, references, steepness, kind=kind)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize(
    "shapes, options",
    [
        (((2, 3, 5), (2, 4, 5), (2, 6, 5)), {}),
        (((3, 5), (3, 5), (6, 5)), {}),
        (((2, 3, 5), (2, 3, 5), (6, 5)), {}),
        (((2, 3, 5), (2, 3, 5), (1, 6, 5)), {}),
        (((2, 3, 5), (2, 3, 5), (2, 6, 4)), {}),
        (((2, 3, 5), (2, 3, 5), (2, 6, 5)), {"steepness": 0}),
        (((2, 3, 5), (2, 3, 5), (2, 6, 5)), {"teacher_steepness": -1.0}),
        (((2, 3, 5), (2, 3, 5), (2, 6, 5)), {"kind": "quick"}),
    ],
)
def test_loss_refuses_what_its_docstring_names(shapes, options):
    with pytest.raises(ValueError):
        neco.neco_loss(*(normal(*shape) for shape in shapes), **options)


def test_agreement_is_the_rank_correlation():
    student, teacher, references = features(patches=4, references=9)
    expected = []
    for s, t, r in zip(student, teacher, references):
        ranks = [
            np.argsort(np.argsort(F.cosine_similarity(x[:, None], r[None], dim=-1).numpy()))
            for x in (s, t)
        ]
        expected += [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks)]
    agreement = neco.rank_agreement(student, teacher, references).item()
    assert agreement == pytest.approx(np.mean(expected), abs=1e-6)
    assert neco.rank_agreement(teacher, teacher, references) == 1
    assert neco.rank_agreement(-teacher, teacher, references) == -1


# --------------------------------------------------------------------------------------- views


def inside(box, width, height):
    left, top, right, bottom = box
    return 0 <= left < right <= width and 0 <= top < bottom <= height


def shared(a, b):
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    return sides[0] * sides[1] if min(sides) > 0 else 0


@pytest.mark.parametrize("size", [(640, 480), (333, 500)])
def test_boxes_overlap_and_keep_their_share_of_the_image(size):
    rng, area = random.Random(0), size[0] * size[1]
    for _ in range(300):
        boxes = neco.random_boxes(*size, 4, rng)
        assert len(boxes) == 6 and all(inside(box, *size) for box in boxes)
        for i, box in enumerate(boxes):
            w, h = box[2] - box[0], box[3] - box[1]
            low, high = (0.25, 1) if i < 2 else (0.05, 0.25)
            rounding = (w + h) / area  # half a pixel more or less on each side
            assert low - rounding <= w * h / area <= high + rounding
            assert (w + 0.5) / (h - 0.5) >= 3 / 4 and (w - 0.5) / (h + 0.5) <= 4 / 3
        assert shared(*boxes[:2]) > 0.02 * area
        for box in boxes[2:]:
            assert all(shared(box, other) > 0.01 * area for other in boxes[:2])


@pytest.mark.parametrize(
    "size", [(1000, 3), (3, 1000), (5000, 1), (1, 5000), (1, 1), (2, 1), (2, 2)]
)
def test_boxes_of_odd_images_end_and_overlap(size):
    rng = random.Random(0)
    for _ in range(30):
        boxes = neco.random_boxes(*size, 4, rng)
        assert len(boxes) == 6 and all(inside(box, *size) for box in boxes)
        assert all(shared(boxes[g], box) > 0 for g in (0, 1) for box in boxes)


def test_global_boxes_share_two_percent_of_the_image():
    rng = random.Random(0)
    shares = [shared(*neco.random_boxes(400, 300, 0, rng)) / 120_000 for _ in range(4000)]
    assert 0.02 < min(shares) < 0.03


def area_and_ratio(sizes):
    w, h = np.array(sizes, float).T
    return w * h, np.log(w / h)


@pytest.mark.parametrize("scale", [(0.25, 1.0), (0.05, 0.25)])
@pytest.mark.parametrize("size", [(640, 480), (300, 900)])
def test_a_random_box_is_distributed_as_torchvisions(scale, size):
    rng, image = random.Random(0), torch.empty(3, size[1], size[0])
    torch.manual_seed(0)
    ours = [neco.random_box(*size, scale, rng) for _ in range(2000)]
    theirs = [
        transforms.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        for _ in range(2000)
    ]
    tops, lefts, heights, widths = zip(*theirs)
    ours_of = [*area_and_ratio([(r - le, b - t) for le, t, r, b in ours])]
    theirs_of = [*area_and_ratio(list(zip(widths, heights)))]
    ours_of += [np.array([box[0] for box in ours]), np.array([box[1] for box in ours])]
    theirs_of += [np.array(lefts), np.array(tops)]
    for a, b in zip(ours_of, theirs_of):
        # Four standard errors of the difference of two means, and of two standard deviations.
        error = 4 * math.sqrt((a.var() + b.var()) / 2000)
        assert abs(a.mean() - b.mean()) < error
        assert abs(a.std() - b.std()) < error


def picture(width=120, height=90, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_views_have_their_shapes_and_follow_the_seed():
    views = neco.make_views(picture(), 56, 28, 3, random.Random(5))
    shapes = {name: (tuple(v.shape), v.dtype) for name, v in views.items()}
    assert shapes == {
        "global_crops": ((2, 3, 56, 56), torch.uint8),
        "local_crops": ((3, 3, 28, 28), torch.uint8),
        "boxes": ((5, 4), torch.float32),
        "colours": ((5, 10), torch.float32),
    }
    again = neco.make_views(picture(), 56, 28, 3, random.Random(5))
    other = neco.make_views(picture(), 56, 28, 3, random.Random(6))
    for name, value in views.items():
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name])
    assert neco.make_views(picture(), 56, 28, 0, random.Random(5))["boxes"].shape == (2, 4)
    tiny = neco.make_views(picture(1, 1), 56, 28, 2, random.Random(0))
    assert tiny["local_crops"].shape == (2, 3, 28, 28)


def test_crops_show_their_boxes():
    image = picture()
    views = neco.make_views(image, 56, 28, 2, random.Random(1))
    crops = [*views["global_crops"], *views["local_crops"]]
    for crop, box in zip(crops, views["boxes"].int().tolist()):
        expected = tvf.pil_to_tensor(image.crop(box).resize(crop.shape[:0:-1], Image.BILINEAR))
        assert torch.equal(crop, expected)


def test_aligned_views_read_the_same_place():
    # Pixel (x, y) of the picture has the colour (x, y, 0), so that features are places. Inside, a
    # cell is read from its place to a tenth of a patch (rounding to whole values of colour is most
    # of it); within half a patch of a crop's edge, RoI-align has no neighbour to read from, which
    # moves the place by up to half a patch.
    width, height, patch, grid = 256, 192, 14, 7
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
    rng, inner = random.Random(0), 0
    for _ in range(20):
        views = neco.make_views(image, 8 * patch, 4 * patch, 2, rng)
        boxes = views["boxes"]
        maps = [
            F.avg_pool2d(crop[None, :2].float() + 0.5, patch)
            for crop in (*views["global_crops"], *views["local_crops"])
        ]
        for g, v in itertools.product(range(2), range(4)):
            low = torch.maximum(boxes[g, :2], boxes[v, :2])
            high = torch.minimum(boxes[g, 2:], boxes[v, 2:])
            region = neco.intersect(boxes[g, None], boxes[v, None])
            assert torch.equal(region[0], torch.cat([low, high]))
            steps = (torch.arange(grid) + 0.5) / grid
            row, column = torch.meshgrid(steps, steps, indexing="ij")
            places = low + torch.stack([column, row], 2).flatten(0, 1) * (high - low)  # (49, 2)
            extent = (high - low) / grid / 2
            for k in (g, v):
                cells = neco.align(maps[k], boxes[k, None], region, grid)[0]
                assert cells.shape == (grid * grid, 2)
                side = (boxes[k, 2:] - boxes[k, :2]) / maps[k].shape[-1]  # of a patch, in pixels
                error = (cells - places).abs() / side
                rounding = 1 / side  # a crop of few pixels has coarse coordinates
                assert (error < 0.5 + rounding).all()
                margin = side / 2 + extent
                middle = (places > boxes[k, :2] + margin) & (places < boxes[k, 2:] - margin)
                inner += middle.sum().item()
                assert (error < 0.1 + 0.5 * rounding)[middle].all()
    assert inner > 1000


def test_align_reads_each_crop_of_a_batch_with_its_own_box():
    maps = normal(3, 4, 6, 6, dtype=torch.float32)
    crops = torch.tensor([[0, 0, 60, 60], [10, 20, 70, 50], [5, 5, 29, 41]]).float()
    regions = crops + torch.tensor([6.0, 3, -4, -8])
    together = neco.align(maps, crops, regions, 5)
    for i in range(3):
        alone = neco.align(maps[i, None], crops[i, None], regions[i, None], 5)
        assert torch.equal(together[i, None], alone)


def smooth(batch=1, size=32):
    """Random uint8 crops without fine grain."""
    coarse = normal(batch, 3, 5, 5, dtype=torch.float32).mul(70).add(128).clamp(0, 255)
    return F.interpolate(coarse, size, mode="bilinear").byte()


def colours(order=(0, 1, 2, 3), brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, **then):
    grey, sigma = then.get("grey", 0), then.get("sigma", 0)
    return torch.tensor([[*order, brightness, contrast, saturation, hue, grey, sigma]])


def changed(images, change):
    """Result of `change_colours`, before the normalisation."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (neco.MEAN, neco.STD))
    return neco.change_colours(images, change) * std + mean


def test_neutral_colours_only_normalise():
    images = smooth(2)
    expected = tvf.normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    result = neco.change_colours(images, colours().repeat(2, 1))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)  # float32, values up to 3


@pytest.mark.parametrize("factor", [0.2, 0.7, 1.8])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_equals_torchvisions(name, factor):
    images = smooth()
    expected = getattr(tvf, f"adjust_{name}")(images.float() / 255, factor)
    result = changed(images, colours(**{name: factor}))
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-4)  # luma weights of 3 or 4 digits
    assert (result - images / 255).abs().max() > 0.1


@pytest.mark.parametrize("shift", [-0.2, -0.05, 0.13, 0.2])
def test_hue_equals_torchvisions(shift):
    images = torch.cat([smooth(), torch.randint(0, 256, (1, 3, 32, 32)).byte()], dim=0)
    images[0, :, :4] = 77  # grey has no hue
    expected = tvf.adjust_hue(images.float() / 255, shift)
    result = changed(images, colours(hue=shift).repeat(2, 1))
    torch.testing.assert_close(result, expected, rtol=0, atol=2 / 255)


def test_jitters_come_in_their_order():
    images, values = smooth(), dict(brightness=1.6, contrast=0.4, saturation=1.7, hue=0.15)
    names = list(values)
    for order in itertools.permutations(range(4)):
        expected = images.float() / 255
        for kind in order:
            expected = getattr(tvf, f"adjust_{names[kind]}")(expected, values[names[kind]])
        result = changed(images, colours(order, **values))
        torch.testing.assert_close(result, expected, rtol=0, atol=3 / 255)


def test_grey_and_blur_equal_torchvisions():
    images = smooth(size=40)
    expected = tvf.rgb_to_grayscale(images.float() / 255, 3)
    torch.testing.assert_close(changed(images, colours(grey=1)), expected, rtol=0, atol=5e-4)
    noise = torch.randint(0, 256, (1, 3, 40, 40)).byte()
    for sigma in (0.1, 0.8, 2.0):
        expected = tvf.gaussian_blur(noise.float() / 255, [13, 13], [sigma, sigma])
        result = changed(noise, colours(sigma=sigma))
        inner = (..., slice(6, -6), slice(6, -6))  # at the edge the padding differs
        torch.testing.assert_close(result[inner], expected[inner], rtol=0, atol=1e-5)
        assert result.isfinite().all() and result.min() > -1e-5 and result.max() < 1 + 1e-5


def test_colours_of_a_batch_are_independent():
    rng = random.Random(0)
    images = torch.cat([smooth(12), torch.randint(0, 256, (12, 3, 32, 32)).byte()])
    changes = torch.tensor([neco.random_colours(rng) for _ in images])
    before = images.clone()
    together = neco.change_colours(images, changes)
    assert torch.equal(images, before)
    for i in range(len(images)):
        alone = neco.change_colours(images[i, None], changes[i, None])
        torch.testing.assert_close(together[i, None], alone, rtol=0, atol=1e-5)


def test_random_colours_are_the_recipes():
    rng, count = random.Random(0), 4000
    drawn = np.array([neco.random_colours(rng) for _ in range(count)], float)
    order, factors, hue, grey, sigma = np.split(drawn, [4, 7, 8, 9], axis=1)
    assert (np.sort(order, axis=1) == range(4)).all()
    assert len({tuple(row) for row in order}) == 24
    jittered = hue[:, 0] != 0
    for share, expected in ((jittered, 0.8), (grey == 1, 0.2), (sigma > 0, 0.5)):
        assert abs(share.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    assert (factors[~jittered] == 1).all() and (factors != 1).any(0).all()
    blurred = sigma[sigma > 0]
    for values, low, high in ((factors[jittered], 0.2, 1.8), (hue[jittered], -0.2, 0.2)):
        spread = (high - low) / 100
        assert (values.min(0) >= low).all() and (values.min(0) < low + spread).all()
        assert (values.max(0) <= high).all() and (values.max(0) > high - spread).all()
    assert 0.1 <= blurred.min() < 0.12 and 1.98 < blurred.max() <= 2


# ---------------------------------------------------------------------------------- references


def test_references_are_not_repeated():
    order = neco.reference_order(pairs=3, size=100, batch=8, count=12, seed=4)
    assert order.shape == (3, 8, 12) and order.min() >= 0 and order.max() < 100
    assert all(len(set(pair.flatten().tolist())) == 96 for pair in order)
    assert torch.equal(order, neco.reference_order(3, 100, 8, 12, 4))
    assert not torch.equal(order, neco.reference_order(3, 100, 8, 12, 5))
    assert not torch.equal(order[0], order[1])


@pytest.mark.parametrize("size, count", [(20, 12), (12, 12), (25, 7)])
def test_no_image_repeats_a_reference_when_there_are_few(size, count):
    order = neco.reference_order(pairs=2, size=size, batch=8, count=count, seed=4)
    assert order.min() >= 0 and order.max() < size
    assert all(len(set(image.tolist())) == count for image in order.flatten(0, 1))


def test_queue_is_first_in_first_out():
    length = 10
    queue = torch.empty(2, 0, 3)
    expected, counter = deque(maxlen=length), 1
    for count in [2, 1, 3, 7, 1, 10, 3, 25, 4, 13] * 2:
        numbers = torch.arange(counter, counter + count).float()
        counter += count
        patches = torch.stack([numbers, -numbers])[..., None].expand(2, count, 3)
        queue = neco.push(queue, patches, length)
        expected.extend(numbers.tolist())
        for patches, sign in zip(queue, (1, -1)):
            assert (sign * patches[:, 0]).tolist() == list(expected)
            assert (patches == patches[:, :1]).all()


# -------------------------------------------------------------------------- networks, schedules


def tiny_backbone(seed=0, **sizes):
    torch.manual_seed(seed)
    return neco.Backbone(neco.TinyViT(**({"embed_dim": 24, "depth": 3, "heads": 3} | sizes)))


def test_teacher_is_a_moving_average():
    nets = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    teacher, student = nets
    for buffer in student.buffers():
        buffer.add_(3)
    before = [[p.detach().clone() for p in net.parameters()] for net in nets]
    neco.update_teacher(teacher, student, 0.9)
    for mine, old, other in zip(teacher.parameters(), *before):
        torch.testing.assert_close(mine, 0.9 * old + 0.1 * other)
    assert all(torch.equal(*pair) for pair in zip(before[1], student.parameters()))
    assert all(torch.equal(*pair) for pair in zip(teacher.buffers(), student.buffers()))
    kept = [p.detach().clone() for p in teacher.parameters()]
    neco.update_teacher(teacher, student, 1.0)
    assert all(torch.equal(*pair) for pair in zip(kept, teacher.parameters()))


def test_schedule_is_half_a_cosine():
    for start, end in ((0.04, 0.5), (0.9995, 1.0), (1e-5, 0.0)):
        for progress, share in ((0, 0.0), (1 / 3, 0.25), (1 / 2, 0.5), (2 / 3, 0.75), (1, 1.0)):
            expected = start + (end - start) * share
            assert neco.cosine(start, end, progress) == pytest.approx(
                expected, rel=1e-12, abs=1e-20
            )


def test_biases_and_vectors_do_not_decay():
    backbone = tiny_backbone()
    backbone.model.bias = nn.Parameter(torch.zeros(2, 2))
    network = neco.Network(backbone, hidden=16, out=8)
    names = {p: name for name, p in network.named_parameters()}
    groups = {
        (group["base_lr"], group["decays"]): {names[p] for p in group["params"]}
        for group in neco.parameter_groups(network, 1e-5, 1e-4)
    }
    expected = {key: set() for key in itertools.product((1e-5, 1e-4), (True, False))}
    for name, p in network.named_parameters():
        vector = p.ndim <= 1 or name.endswith(".bias")
        expected[1e-5 if name.startswith("backbone.") else 1e-4, not vector].add(name)
    assert groups == expected and all(expected.values())


def test_head_gives_a_unit_vector_for_each_patch():
    network = neco.Network(tiny_backbone(), hidden=16, out=8)
    images = normal(2, 3, 28, 56, dtype=torch.float32)
    (embedded,) = network([images])
    tokens = network.head(network.backbone(images).permute(0, 2, 3, 1))
    expected = (tokens / tokens.norm(dim=-1, keepdim=True)).permute(0, 3, 1, 2)
    assert embedded.shape == (2, 8, 2, 4)
    torch.testing.assert_close(embedded, expected)
    kinds = [type(layer) for layer in network.head]
    assert kinds == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    shapes = [tuple(layer.weight.shape) for layer in neco.Network(tiny_backbone()).head[::2]]
    assert shapes == [(2048, 24), (2048, 2048), (256, 2048)]


def test_drop_path_drops_by_depth_and_keeps_the_expectation():
    backbone, depth, images = tiny_backbone(), 3, 1000
    tokens = normal(1, 4, 24, dtype=torch.float32).expand(images, 4, 24)
    branches = [b for block in backbone.model.blocks for b in (block.attn, block.mlp)]
    plain = [branch(tokens) for branch in branches]
    assert neco.add_drop_path(backbone, rate=0.2) == 2 * depth
    backbone.noise = ((torch.arange(images) + 0.5) / images).repeat(2 * depth, 1)
    for k, (branch, before) in enumerate(zip(branches, plain)):
        rate = 0.2 * (k // 2) / (depth - 1)
        dropped = (branch(tokens) == 0).all(2).all(1)
        assert dropped.sum() == round(rate * images)
        assert torch.equal(dropped, backbone.noise[k] < rate)
        torch.testing.assert_close(branch(tokens)[~dropped], before[~dropped] / (1 - rate))
        torch.testing.assert_close(branch(tokens).mean(0), before[0])
    backbone.eval()
    assert all(torch.equal(branch(tokens), before) for branch, before in zip(branches, plain))
    backbone.train().noise = None
    assert all(torch.equal(branch(tokens), before) for branch, before in zip(branches, plain))


def test_drop_path_of_attention_that_returns_its_weights():
    class Attention(nn.Identity):
        def forward(self, x):
            return x, "weights"

    block = nn.Module()
    block.attn, block.mlp = Attention(), nn.Identity()
    first = nn.Module()
    first.attn, first.mlp = Attention(), nn.Identity()
    backbone = nn.Module()
    backbone.model = nn.Module()
    backbone.model.blocks = nn.ModuleList([first, block])
    assert neco.add_drop_path(backbone, rate=0.5) == 4
    backbone.noise = torch.tensor([0.1, 0.9]).repeat(4, 1)
    x = torch.ones(2, 3, 4)
    output, weights = block.attn(x)
    assert weights == "weights" and torch.equal(output[:, 0, 0], torch.tensor([0.0, 2.0]))
    assert torch.equal(first.attn(x)[0], x)


def test_a_backbone_without_blocks_drops_nothing():
    backbone = nn.Module()
    backbone.model = nn.Linear(2, 2)
    assert neco.add_drop_path(backbone) == 0
    backbone.model.blocks = nn.ModuleList([nn.Linear(2, 2)])  # of a convolutional network
    assert neco.add_drop_path(backbone) == 0


# ------------------------------------------------------------------------------------ backbone

HUB = """
import urllib.error

import torch
from torch import nn
from torch.nn import functional as F

dependencies = ["torch"]


class Means(nn.Module):
    # Tokens are the mean colours of patches of 4 x 4 pixels, plus a bias.
    def __init__(self):
        super().__init__()
        self.patch_size, self.embed_dim = 4, 3
        self.bias = nn.Parameter(torch.zeros(3))
        self.scale = nn.Parameter(torch.ones(1, 3))

    def tokens(self, x):
        patches = F.avg_pool2d(x, 4).flatten(2).transpose(1, 2) * self.scale + self.bias
        return torch.cat([torch.full_like(patches[:, :1], 1e3), patches], dim=1)


class DinoV2(Means):
    def forward_features(self, x):
        tokens = self.tokens(x)
        return {"x_norm_clstoken": tokens[:, 0], "x_norm_patchtokens": tokens[:, 1:]}


class Dino(Means):
    def __init__(self):
        super().__init__()
        del self.patch_size
        self.patch_embed = nn.Module()
        self.patch_embed.patch_size = 4

    def get_intermediate_layers(self, x, n=1):
        return [self.tokens(x)] * n


def build(kind, pretrained):
    model = kind()
    model.bias.data.fill_(7.0 if pretrained else 0.0)
    return model


def dinov2_style(pretrained=True):
    return build(DinoV2, pretrained)


def dino_style(pretrained=True):
    return build(Dino, pretrained)


def without_argument():
    return build(DinoV2, True)


def offline(pretrained=True):
    raise urllib.error.URLError("no route to host")


def broken(pretrained=True):
    raise RuntimeError("out of order")


def headless(pretrained=True):
    return nn.Linear(2, 2)
"""
STYLES = pytest.mark.parametrize("style", ["dinov2_style", "dino_style"])


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(HUB)
    return str(tmp_path / "hub")


def coordinates(height, width):
    """An image (1, 3, height, width) whose colours are row, column and 0."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, 0 * rows])[None].float()


@STYLES
def test_hub_model_gives_the_patches_in_their_places(hub, style):
    backbone = neco.load_backbone(style, hub)
    assert (backbone.patch_size, backbone.embed_dim) == (4, 3)
    image = coordinates(12, 20)
    expected = F.avg_pool2d(image, 4) + 7  # 7: the bias of the hub's own weights
    assert torch.equal(backbone(image), expected)
    assert torch.equal(backbone(image.repeat(2, 1, 1, 1)), expected.repeat(2, 1, 1, 1))


def test_hub_model_without_the_argument_pretrained(hub, tmp_path):
    assert neco.load_backbone("without_argument", hub).model.bias[0] == 7
    torch.save({"bias": torch.ones(3), "scale": torch.ones(1, 3)}, tmp_path / "w.pth")
    backbone = neco.load_backbone("without_argument", hub, str(tmp_path / "w.pth"))
    assert backbone.model.bias[0] == 1


STATE = {"bias": torch.arange(3.0), "scale": torch.full((1, 3), 2.0)}
HEADS = {"projection_head.0.weight": torch.ones(2, 2), "projection_head.0.bias": torch.ones(2)}


@STYLES
@pytest.mark.parametrize(
    "content", [STATE, {"state_dict": STATE}, STATE | HEADS, {"state_dict": STATE | HEADS}]
)
def test_weights_file_is_loaded(hub, tmp_path, capsys, style, content):
    torch.save(content, tmp_path / "weights.pth")
    backbone = neco.load_backbone(style, hub, str(tmp_path / "weights.pth"))
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, STATE[name])
    notes = capsys.readouterr().err
    dropped = "projection_head.0.weight" in content.get("state_dict", content)
    assert ("dropped" in notes and "head" in notes) if dropped else notes == ""


class Code:
    def __reduce__(self):
        return os.mkdir, ("pickled-code-ran",)


@pytest.mark.parametrize(
    "content, named",
    [
        ({"bias": STATE["bias"]}, "scale"),
        (STATE | {"blocks.0.weight": torch.ones(2)}, "blocks.0.weight"),
        (STATE | {"scale": torch.ones(1, 4)}, "scale"),
        ({}, "bias"),
        ([1, 2], "state dict"),
        ({"epoch": 3, "bias": STATE["bias"]}, "state dict"),
        ({1: torch.ones(3)}, "weights.pth"),
        ({"state_dict": {"bias": 3}}, "state dict"),
        (STATE | {"code": Code()}, "weights.pth"),
    ],
)
def test_unfitting_weights_are_refused(hub, tmp_path, monkeypatch, content, named):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(neco.InputError) as caught:
        neco.load_backbone("dinov2_style", hub, str(tmp_path / "weights.pth"))
    assert named in str(caught.value) and "weights.pth" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("pickled-code-ran").exists()


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", b"PK\x03\x04 half a zip file"])
def test_unreadable_weights_are_refused(hub, tmp_path, content):
    if content is not None:
        (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(neco.InputError, match="weights.pth"):
        neco.load_backbone("dinov2_style", hub, str(tmp_path / "weights.pth"))


def test_unknown_backbones_are_refused(hub, tmp_path):
    with pytest.raises(neco.InputError) as caught:
        neco.load_backbone("dinov3")
    known = [f"dinov2_vit{size}14{reg}" for size in "sblg" for reg in ("", "_reg")]
    for name in [*known, "tiny", "dino_vits16"]:
        assert name in str(caught.value)
    for name, folder, said in (
        ("no_such_model", hub, "no_such_model"),
        ("broken", hub, "out of order"),
        ("headless", hub, "headless"),
        ("dinov2_style", str(tmp_path), "hubconf.py"),
        ("dinov2_style", str(tmp_path / "nowhere"), "nowhere"),
    ):
        with pytest.raises(neco.InputError, match=said):
            neco.load_backbone(name, folder)


def assert_tells_the_way_out(error):
    assert "--hub" in str(error) and "--weights" in str(error) and "local" in str(error)


def test_weights_out_of_reach_tell_the_way_out(hub):
    with pytest.raises(neco.InputError, match="no route to host") as caught:
        neco.load_backbone("offline", hub)
    assert_tells_the_way_out(caught.value)


@pytest.mark.parametrize("repository", [None, "facebookresearch/dinov2", "someone/dinov2:main"])
def test_hub_out_of_reach_tells_the_way_out(tmp_path, monkeypatch, repository):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    with pytest.raises(neco.InputError) as caught:
        neco.load_backbone("dinov2_vits14_reg", repository)
    assert_tells_the_way_out(caught.value)


def test_tiny_takes_images_of_any_shape():
    backbone = neco.load_backbone("tiny")
    assert backbone.patch_size == 14
    images = normal(2, 3, 42, 70, dtype=torch.float32)
    maps = backbone(images)
    assert maps.shape == (2, backbone.embed_dim, 3, 5)
    tokens = backbone.model.forward_features(images)["x_norm_patchtokens"]
    assert torch.equal(maps[:, :, 1, 3], tokens[:, 1 * 5 + 3])
    assert not torch.allclose(maps[0], maps[1], atol=1e-3)
    alike = backbone(torch.zeros(1, 3, 42, 70)).flatten(2)  # positions differ, in both directions
    assert torch.cdist(alike[0].T, alike[0].T).fill_diagonal_(1).min() > 1e-3


# -------------------------------------------------------------------------------------- images

RAMP = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def write_modes(folder):
    """Write a ramp of greys in each mode; return what each must be read as, (8, 8) or (8, 8, 3)."""
    grey = Image.fromarray(RAMP)
    colour = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)
    rgba = np.concatenate([colour, np.full((8, 8, 1), 99, np.uint8)], axis=2)
    palette = Image.fromarray(colour[:, :, :3]).quantize(256)
    cmyk = np.stack([255 - colour[..., 0], 255 - colour[..., 1], 255 - colour[..., 2]], axis=2)
    cmyk = np.concatenate([cmyk, np.zeros((8, 8, 1), np.uint8)], axis=2)
    wide = RAMP.astype(np.uint16) * 257
    files = {
        "grey.png": (grey, RAMP),
        "palette.png": (palette, np.array(palette.convert("RGB"))),
        "rgba.png": (Image.fromarray(rgba), colour),
        "la.png": (Image.merge("LA", [grey, Image.fromarray(255 - RAMP)]), RAMP),
        "one.png": (grey.point(lambda v: 255 * (v > 99)).convert("1"), 255 * (RAMP > 99)),
        "cmyk.tif": (Image.fromarray(cmyk, mode="CMYK"), colour),
        "wide.png": (Image.fromarray(wide), RAMP),
        "wide.tif": (Image.fromarray(wide), RAMP),
        "rgb.bmp": (Image.fromarray(colour), colour),
    }
    for name, (image, _) in files.items():
        image.save(folder / name)
    return {name: expected for name, (_, expected) in files.items()}


def test_images_of_all_modes_become_rgb(tmp_path):
    for name, expected in write_modes(tmp_path).items():
        image = neco.load_image(str(tmp_path / name))
        assert image.mode == "RGB" and image.size == (8, 8), name
        expected = expected if expected.ndim == 3 else np.stack([expected] * 3, axis=2)
        assert np.abs(np.array(image).astype(int) - expected).max() <= 1, name
    with Image.open(tmp_path / "wide.png") as image:
        assert image.mode.startswith("I")
    with Image.open(tmp_path / "palette.png") as image:
        assert image.mode == "P"


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "dark.png")
    assert np.array(neco.load_image(str(tmp_path / "dark.png"))).max() <= 1


def test_images_are_found_sorted_at_any_depth(tmp_path):
    names = ["b/ü é.JPG", "b/c/x.jpeg", "a.PNG", "z.webp", "B.bmp", "b/c/日本.tif", "b.Tiff"]
    others = ["notes.txt", "b/labels.json", "jpg", "c.jpg.part", "b/c/.png.swp"]
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in names + others:
        (tmp_path / name).write_bytes(b"")
    found = [os.fsdecode(name) for name in neco.find_images(str(tmp_path))]
    assert found == sorted(names, key=os.fsencode)
    assert len(neco.find_images(str(tmp_path / "b" / "c"))) == 2


def test_links_are_followed_but_not_in_circles(tmp_path):
    for folder in ("data", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "image.png").write_bytes(b"")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    found = neco.find_images(str(tmp_path / "data")).tolist()
    assert found == [b"image.png", b"linked/image.png"]


# -------------------------------------------------------------------------------- command line
# Runs are made short by a small head. They happen in this process, but for those that get killed:
# these are forked from a server that has imported neco, which takes most of a short run's time.

RUN = shlex.split(
    "--backbone tiny --global-size 56 --local-size 28 --local-crops 2 --batch-size 4 --steps 6 "
    "--grid 3 --queue 100 --hidden 32 --log-every 1 --save-every 2 --workers 0 --device cpu"
)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        picture(seed=i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # if neco does not catch it
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def command(capsys):
    """Run the command line in this process: arguments -> exit status, stdout, stderr."""

    def call(*arguments):
        capsys.readouterr()
        try:
            status = neco.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        message = ""
        if isinstance(status, str):
            status, message = 1, status
        captured = capsys.readouterr()
        return status, captured.out, captured.err + message

    return call


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def results(folder):
    """The bytes of a run's files, but for temporary ones."""
    names = ("student.pth", "teacher.pth", "checkpoint.pth", "log.csv")
    return {name: (folder / name).read_bytes() for name in names}


def read_log(folder):
    with open(folder / "log.csv") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def assert_same_run(a, b):
    for (name, mine), other in zip(results(a).items(), results(b).values()):
        assert mine == other, f"{name} differs"


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, images):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert neco.main(["--data", str(images), "--out", str(out), *RUN]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return out


def test_a_run_leaves_a_backbone_and_a_log(whole_run):
    torch.manual_seed(1)
    other = neco.TinyViT()
    states = [torch.load(whole_run / f"{name}.pth") for name in ("student", "teacher")]
    for state in states:
        other.load_state_dict(state, strict=True)
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    rows = read_log(whole_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["floor"] <= row["loss"] and -1 <= row["agreement"] <= 1
    for i, row in enumerate(rows):
        assert row["lr"] == pytest.approx(1e-5 * (1 + math.cos(math.pi * i / 6)) / 2, rel=1e-5)
        decay = 0.5 - 0.46 * (1 + math.cos(math.pi * i / 6)) / 2
        assert row["weight_decay"] == pytest.approx(decay, rel=1e-5)
    assert not list(whole_run.glob("*.tmp"))


def test_teacher_follows_by_the_momentum(command, images, tmp_path):
    # One step at momentum m: teacher = start + (1 - m) (student - start).
    status, _, _ = command(
        "--data", images, "--out", tmp_path, *RUN, "--steps", 1, "--momentum", 0.75, "--lr", 0.1
    )
    assert status == 0
    torch.manual_seed(0)
    start = neco.load_backbone("tiny").model.state_dict()
    student, teacher = (torch.load(tmp_path / f"{name}.pth") for name in ("student", "teacher"))
    moved = 0.0
    for key, value in start.items():
        expected = value + 0.25 * (student[key] - value)
        torch.testing.assert_close(teacher[key], expected, rtol=1e-5, atol=1e-6)
        moved = max(moved, (student[key] - value).abs().max().item())
    assert moved == pytest.approx(0.1, rel=0.1)  # Adam's first step is the learning rate


def test_local_crops_take_part_at_their_size(command, images, tmp_path, whole_run):
    # The same boxes, read at twice the resolution: another loss.
    run = (*RUN, "--steps", 1, "--local-size", 56)
    assert command("--data", images, "--out", tmp_path, *run)[0] == 0
    losses = [read_log(folder)[0]["loss"] for folder in (tmp_path, whole_run)]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert read_log(tmp_path)[0]["floor"] == read_log(whole_run)[0]["floor"]


def test_references_come_from_the_patches_of_former_steps(command, images, tmp_path):
    # A step stores 10 patches of each of 4 images. In step 2 a queue of 40 has forgotten step 1.
    run = ("--data", images, *RUN, "--steps", 2, "--queue")
    for length, filled in ((40, 40), (500, 80)):
        assert command(*run, length, "--out", tmp_path / str(length))[0] == 0
        queue = torch.load(tmp_path / str(length) / "checkpoint.pth", weights_only=True)["queue"]
        assert queue.untyped_storage().nbytes() == queue.nbytes  # nothing else is in the file
        torch.testing.assert_close(queue.norm(dim=-1), torch.ones(2, filled))
    first, second = zip(*(read_log(tmp_path / name)[:2] for name in ("40", "500")))
    assert first[0]["floor"] == first[1]["floor"]
    assert abs(second[0]["floor"] - second[1]["floor"]) > 1e-3


def test_training_teaches_the_teachers_ranking(command, images, tmp_path):
    # With seeds 0 to 4, agreement rises from 0.10 at most to 0.25 at least.
    options = shlex.split("--steps 80 --hidden 256 --batch-size 8 --lr 3e-4 --head-lr 3e-3")
    options += ["--momentum", 1, "--local-crops", 0, "--grid", 5, "--queue", 400]
    status, _, _ = command("--data", images, "--out", tmp_path, *RUN, *options)
    rows = read_log(tmp_path)
    excess = [row["loss"] - row["floor"] for row in rows]
    agreement = [row["agreement"] for row in rows]
    assert status == 0
    assert np.mean(excess[-20:]) < 0.8 * np.mean(excess[:5])
    assert np.mean(agreement[-20:]) > max(0.2, np.mean(agreement[:5]) + 0.1)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_keeps_the_loss(command, images, tmp_path, whole_run, parts):
    status, _, _ = command("--data", images, "--out", tmp_path, *RUN, "--accumulate", parts)
    assert status == 0
    for row, expected in zip(read_log(tmp_path), read_log(whole_run), strict=True):
        for name in ("loss", "floor", "agreement"):
            # Six digits are logged, and sums are rounded in another order.
            assert row[name] == pytest.approx(expected[name], rel=1e-5), (row["step"], name)


def test_the_seed_decides(command, images, tmp_path, whole_run):
    assert command("--data", images, "--out", tmp_path / "0", *RUN, "--seed", 0)[0] == 0
    assert_same_run(tmp_path / "0", whole_run)
    assert command("--data", images, "--out", tmp_path / "1", *RUN, "--seed", 1)[0] == 0
    assert read_log(tmp_path / "1")[0]["loss"] != read_log(whole_run)[0]["loss"]


def strike(module, name, call, number):
    """Send this process a signal in the given call of a function; 0 for never."""
    calls, original = itertools.count(1), getattr(module, name)

    def struck(*arguments, **options):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(module, name, struck)


def run_struck(argv, log, place, call, number):
    """Run neco in a process of its own group until a signal strikes it at a given place."""
    multiprocessing.set_start_method("fork", force=True)  # of the workers; here it is the server's
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    if place == "fsync":
        strike(os, "fsync", call, number)
    else:
        strike(neco, place, call, number)
    sys.exit(neco.main(argv))


@pytest.fixture(scope="session")
def start_process():
    """Start `run_struck` in a forked process and return its exit status, -N for signal N."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(neco.__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["neco"])

    def start(*arguments):
        process = context.Process(target=run_struck, args=arguments)
        process.start()
        process.join(300)
        assert process.exitcode is not None, "the process hangs"
        return process.exitcode

    return start


@pytest.mark.parametrize("workers", [(0, 2, 0, 2, 0), (2, 0, 2, 0, 2)])
def test_a_killed_run_ends_bit_for_bit_as_a_whole_one(
    start_process, images, tmp_path, whole_run, workers
):
    # Killed in step 2, before anything was saved; when step 4's checkpoint is about to get its
    # name; after step 4's checkpoint was renamed, and before the backbones were; in step 6.
    places = [("update_teacher", 2), ("fsync", 5), ("fsync", 3), ("update_teacher", 2)]
    places.append(("update_teacher", 0))
    log, out = tmp_path / "output", tmp_path / "out"
    for (place, call), count in zip(places, workers):
        argv = ["--data", str(images), "--out", str(out), *RUN, "--workers", str(count)]
        status = start_process(argv, str(log), place, call, signal.SIGKILL)
        assert status == (-signal.SIGKILL if call else 0), log.read_text()
    assert_same_run(out, whole_run)
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(
    command, images, tmp_path, whole_run, monkeypatch, number, status
):
    with monkeypatch.context() as patch:
        patch.setattr(neco, "update_teacher", neco.update_teacher)  # undone at the end of the block
        strike(neco, "update_teacher", 3, number)
        code, out, _ = command("--data", images, "--out", tmp_path, *RUN)
    assert code == status
    assert re.search(r"stopped.*step 3", out) and "checkpoint.pth" in out
    assert len(read_log(tmp_path)) == 3
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 3
    assert command("--data", images, "--out", tmp_path, *RUN)[0] == 0
    assert_same_run(tmp_path, whole_run)


def test_ctrl_c_reaches_workers_too_and_saves(start_process, images, tmp_path, whole_run):
    def interrupt(call):
        argv = ["--data", str(images), "--out", str(tmp_path / "out"), *RUN, "--workers", "2"]
        return start_process(argv, str(tmp_path / "log"), "update_teacher", call, signal.SIGINT)

    assert interrupt(2) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert interrupt(0) == 0
    assert_same_run(tmp_path / "out", whole_run)


def test_a_corrupt_image_is_named_once_and_left_out(command, images, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in images.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "cut.png").write_bytes((images / "0.png").read_bytes()[:3000])
    (data / "empty.jpg").write_bytes(b"")
    status, out, err = command("--data", data, "--out", tmp_path / "out", *RUN, "--steps", 8)
    assert status == 0 and len(read_log(tmp_path / "out")) == 8
    lines = err.splitlines()  # 8 steps of 4 images are over three rounds
    assert len(lines) == 2 and all(
        any(n in line for line in lines) for n in ("cut.png", "empty.jpg")
    )
    assert re.search(r"\b2 (images|files)", out + err)


def test_resume_with_another_setting_names_it(command, images, tmp_path, whole_run):
    run = ("--data", images, "--out", whole_run, *RUN)
    before = contents(whole_run)
    for name, value in (("lr", "2e-5"), ("seed", "1"), ("steps", "12"), ("accumulate", "2")):
        status, _, err = command(*run, f"--{name}", value)
        assert_refused(status, err)
        assert name in err and value.split("e")[0] in err
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(images.iterdir())[:7]:
        (fewer / path.name).write_bytes(path.read_bytes())
    status, _, err = command("--data", fewer, *run[2:])
    assert_refused(status, err)
    assert "images" in err
    assert contents(whole_run) == before


def test_a_finished_run_stays_as_it_is(command, images, tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path / "out")
    assert command("--data", images, "--out", tmp_path / "out", *RUN)[0] == 0
    assert_same_run(tmp_path / "out", whole_run)


def test_a_loss_that_is_not_finite_stops_before_the_weights_take_it(
    command, images, tmp_path, whole_run, monkeypatch
):
    original, calls = neco.neco_loss, itertools.count(1)

    def poisoned(*arguments, **options):
        loss = original(*arguments, **options)
        return loss * math.nan if next(calls) >= 9 else loss  # two calls a step: loss and floor

    with monkeypatch.context() as patch:
        patch.setattr(neco, "neco_loss", poisoned)
        status, _, err = command("--data", images, "--out", tmp_path, *RUN)
    assert status == 1 and "not finite at step 5" in err
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 4
    assert command("--data", images, "--out", tmp_path, *RUN)[0] == 0
    assert_same_run(tmp_path, whole_run)


def test_a_diverging_run_stops_with_a_sentence(command, images, tmp_path):
    run = (*RUN, "--lr", 1e30, "--head-lr", 1e30, "--save-every", 100)
    status, _, err = command("--data", images, "--out", tmp_path, *run)
    assert status == 1
    assert re.search(r"neco\.py: .*not finite at step \d", err) and err.count("\n") <= 1
    assert not (tmp_path / "student.pth").exists()


@pytest.mark.parametrize("call", [2, 5, 6, 7])
def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(
    command, images, tmp_path, whole_run, monkeypatch, call
):
    calls, original = itertools.count(1), os.fsync

    def full(file):
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, _, err = command("--data", images, "--out", tmp_path, *RUN)
    assert status not in (0, None)
    assert err.startswith("neco.py: ") and "No space left" in err and "\n" not in err.strip()
    assert not list(tmp_path.glob("*.tmp"))
    if call > 2:  # 2: the first checkpoint
        assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] in (2, 4)
    assert command("--data", images, "--out", tmp_path, *RUN)[0] == 0
    assert_same_run(tmp_path, whole_run)


def test_a_failed_write_of_the_log_ends_the_run_with_a_sentence(
    command, images, tmp_path, whole_run, monkeypatch
):
    real = open

    class FullFile:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", *arguments, **options):
        file = real(path, mode, *arguments, **options)
        return FullFile(file) if "a" in mode and str(path).endswith("log.csv") else file

    with monkeypatch.context() as patch:
        patch.setattr(neco, "open", opened, raising=False)
        status, _, err = command("--data", images, "--out", tmp_path, *RUN)
    assert status not in (0, None) and "No space left" in err and "log.csv" in err
    assert command("--data", images, "--out", tmp_path, *RUN)[0] == 0
    assert_same_run(tmp_path, whole_run)


def test_flat_rankings_are_warned_of_once(command, images, tmp_path):
    # At a very low steepness all comparators mix by halves.
    run = (*RUN, "--grid", 2, "--steepness", 1e-3)
    status, _, err = command("--data", images, "--out", tmp_path, *run)
    assert status == 0 and err.count("warning") == 1 and "collaps" in err


def test_help_has_every_flag_with_a_line(command):
    status, out, _ = command("--help")
    assert status == 0 and out.count("neco.py --data") >= 2 and "neco.py --demo" in out
    flags = shlex.split(
        "data out demo backbone hub weights epochs steps batch-size accumulate global-size "
        "local-size local-crops grid queue lr head-lr weight-decay momentum steepness "
        "teacher-steepness sorting workers device precision seed log-every save-every"
    )
    for flag in flags:
        assert re.search(rf"^ +--{flag}( +[A-Z\[].*)?\s+\S.*\S", out, re.MULTILINE), flag


def test_the_script_passes_its_status_on(images, tmp_path):
    def script(*arguments):
        call = [sys.executable, neco.__file__, *map(str, arguments), *RUN, "--workers", "1"]
        return subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)

    run = script("--data", images)
    assert run.returncode == 0 and run.stderr == ""
    assert "8 images" in run.stdout and "step 6/6" in run.stdout and "teacher.pth" in run.stdout
    assert len(results(tmp_path / "runs" / "neco")) == 4
    wrong = script("--data", tmp_path / "nowhere")
    assert_refused(wrong.returncode, wrong.stderr)


DEMO = shlex.split(
    "--demo --steps 2 --batch-size 2 --global-size 56 --local-size 28 --hidden 32 --log-every 1"
)


def test_the_demo_writes_its_images_and_trains(command, refused, tmp_path):
    status, out, _ = command(*DEMO, "--out", tmp_path)
    assert status == 0 and "eval_seg.py" in out
    assert len(read_log(tmp_path)) == 2
    for split in ("train", "val"):
        (folder,) = tmp_path.rglob(split)
        pairs = [sorted((folder / kind).glob("*.png")) for kind in ("images", "masks")]
        assert [p.name for p in pairs[0]] == [p.name for p in pairs[1]] and len(pairs[0]) >= 20
        classes = set()
        for image, mask in zip(*pairs):
            with Image.open(image) as pixels, Image.open(mask) as labels:
                assert pixels.mode == "RGB" and labels.mode in "LP" and pixels.size == labels.size
                classes |= set(np.unique(np.array(labels)).tolist())
        assert classes == {0, 1, 2, 3, 4}
    assert "seed" in refused(*DEMO, "--out", tmp_path, "--seed", 1)
    refused(*DEMO, "--out", tmp_path, "--data", tmp_path)


# ------------------------------------------------------------------------------------- devices


class Creations(TorchFunctionMode):
    """Remembers the calls that copy numbers from Python to a device, for which a host waits."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "new_tensor" or (name in ("tensor", "as_tensor") and "device" in (kwargs or {})):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_does_not_wait_for_copies_to_the_device(command, images, tmp_path, monkeypatch):
    counts, step = [], neco.Trainer.train_step

    def watched(*arguments):
        with Creations() as creations:
            measures = step(*arguments)
        counts.append(len(creations.names))
        return measures

    neco.per_channel.cache_clear()
    neco.network_steps.cache_clear()
    monkeypatch.setattr(neco.Trainer, "train_step", watched)
    assert command("--data", images, "--out", tmp_path, *RUN)[0] == 0
    assert counts[0] > 0 and len(counts) == 6  # constants are copied once
    # a kind of colour change may be drawn for the first time in a later step, with its constant
    assert sum(counts) <= counts[0] + 2 and counts[-2:] == [0, 0]


GPU_SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch, neco
if not torch.cuda.is_available():
    sys.exit("no GPU")

def gradient(device):
    generator = torch.Generator().manual_seed(0)
    x, y, r = (torch.randn(2, n, 16, generator=generator).to(device) for n in (30, 30, 49))
    x.requires_grad_()
    loss = neco.neco_loss(x, y, r)
    loss.backward()
    return loss.detach().cpu(), x.grad.cpu()

for ours, other in zip(gradient("cuda"), gradient("cpu")):
    torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-5)

def waits_nowhere(trainer, *arguments, step=neco.Trainer.train_step):
    torch.cuda.set_sync_debug_mode("error" if trainer.step >= 4 else "default")
    try:
        return step(trainer, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")

neco.Trainer.train_step = waits_nowhere
sys.exit(neco.main(sys.argv[1:]))
"""


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_on_a_gpu_the_loss_is_that_of_a_cpu_and_no_step_waits(images, tmp_path, precision):
    script = tmp_path / "gpu.py"
    script.write_text(GPU_SCRIPT.format(root=str(Path(neco.__file__).parent)))
    flags = (*RUN, "--device", "cuda", "--precision", precision, "--log-every", "100")
    call = [sys.executable, script, "--data", images, "--out", tmp_path / "out", *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ["GPUS"]}
    done = subprocess.run(
        [str(part) for part in call], env=environment, capture_output=True, text=True, timeout=120
    )
    if done.stderr.strip().endswith("no GPU"):
        pytest.skip("needs a GPU")
    assert done.returncode == 0, done.stderr
    assert all(math.isfinite(row["loss"]) for row in read_log(tmp_path / "out"))


# --------------------------------------------------------------------------------- distributed

RANK_SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, neco
stop, die, *arguments = sys.argv[1:]

class Trainer(neco.Trainer):
    def __init__(self, *args):
        super().__init__(*args)
        Trainer.last = self

    def train_step(self, *args):
        if self.step == int(die) and self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.step == int(stop) - 1 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step(*args)

neco.Trainer = Trainer
status = neco.main(arguments)
out = arguments[arguments.index("--out") + 1]
torch.save(Trainer.last.student.state_dict(), f"{{out}}/rank{{os.environ['RANK']}}.pth")
sys.exit(status)
"""


@pytest.fixture
def torchrun(tmp_path):
    """Train in two processes; rank 1 gets SIGTERM in step `stop`, or kills itself in step `die`."""
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT.format(root=str(Path(neco.__file__).parent)))

    def run(arguments, stop=-1, die=-1):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launch, "--nproc-per-node", "2", script, stop, die, *arguments]
        return subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=120
        )

    return run


def states(folder, *names):
    return [torch.load(folder / name, weights_only=True) for name in names]


def assert_close_runs(one, other):
    """AdamW divides by the root of tiny second moments, which magnifies the last bit of sums."""
    for name in ("student.pth", "teacher.pth"):
        for a, b in zip(*(states(folder, name)[0].values() for folder in (one, other))):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * a.abs().max().item() + 1e-5)
    rows = [np.loadtxt(f / "log.csv", delimiter=",", skiprows=1) for f in (one, other)]
    np.testing.assert_allclose(*rows, rtol=2e-4)


def test_two_processes_train_as_one(command, torchrun, images, tmp_path):
    arguments = ["--data", images, *RUN, "--steps", 10]
    assert command(*arguments, "--out", tmp_path / "one")[0] == 0
    result = torchrun([*arguments, "--accumulate", 2, "--out", tmp_path / "two"])
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout and result.stdout.count("step 10/10") == 1
    ranks = states(tmp_path / "two", "rank0.pth", "rank1.pth")
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_a_stopped_run_goes_on_with_another_number_of_processes(
    command, torchrun, images, tmp_path
):
    arguments = ["--data", images, *RUN, "--steps", 6]
    assert command(*arguments, "--out", tmp_path / "one")[0] == 0
    result = torchrun([*arguments, "--out", tmp_path / "two"], stop=3)
    assert result.returncode != 0 and "stopped at step 3" in result.stdout
    assert len(read_log(tmp_path / "two")) == 3
    assert command(*arguments, "--out", tmp_path / "two")[0] == 0
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def test_a_process_that_dies_ends_the_run_and_leaves_a_checkpoint(
    command, torchrun, images, tmp_path
):
    arguments = ["--data", images, *RUN, "--steps", 6, "--save-every", 1, "--out", tmp_path]
    result = torchrun(arguments, die=3)
    assert result.returncode != 0 and "Signal 9 (SIGKILL)" in result.stderr
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 3
    assert command(*arguments)[0] == 0 and len(read_log(tmp_path)) == 6


# ----------------------------------------------------------------------------------- bad input


def assert_refused(status, err):
    assert status == 2
    assert err.startswith("neco.py: error: ") and err.endswith("\n") and err.count("\n") == 1, err


@pytest.fixture
def refused(command, tmp_path):
    """Check that arguments are refused and no file changes; return what is said of it."""

    def check(*arguments):
        before = contents(tmp_path)
        status, _, err = command(*arguments)
        assert_refused(status, err)
        after = contents(tmp_path)  # named, as pytest takes minutes to show two long dictionaries
        changed = [str(path) for path in before | after if before.get(path) != after.get(path)]
        assert not changed
        return err

    return check


@pytest.mark.parametrize(
    "arguments",
    [
        "--epochs 0",
        "--steps 0",
        "--steps 2.5",
        "--steps many",
        "--batch-size 0",
        "--batch-size -4",
        "--accumulate 0",
        "--accumulate 3",
        "--global-size 0",
        "--global-size 57",
        "--local-size 29",
        "--local-size -28",
        "--local-crops -1",
        "--grid 1",
        "--queue 0",
        "--queue 8",
        "--queue 99999999999999",
        "--global-size 14",
        "--global-size 14000000000",
        "--steps 999999999999999999999999999999",
        f"--local-crops 1{400 * '0'}",
        "--lr 0",
        "--lr -1e-5",
        "--lr nan",
        "--head-lr inf",
        "--weight-decay -0.1 0.5",
        "--weight-decay 0.04",
        "--momentum 1.5",
        "--momentum -0.1",
        "--momentum nan",
        "--steepness 0",
        "--steepness inf",
        "--teacher-steepness -1",
        "--sorting quick",
        "--workers -1",
        "--device abacus",
        "--device cuda",
        "--precision fp8",
        "--seed -1",
        "--seed 36893488147419103232",
        "--log-every 0",
        "--save-every 0",
    ],
)
def test_values_out_of_range_are_refused(refused, images, tmp_path, arguments):
    err = refused("--data", images, "--out", tmp_path / "out", *RUN, *arguments.split())
    assert arguments.split()[0] in err


def test_unknown_and_missing_flags_are_refused(refused, images, tmp_path):
    assert "--data" in refused("--out", tmp_path / "out", *RUN)
    assert "--colour" in refused("--data", images, "--out", tmp_path / "out", *RUN, "--colour", 3)


def test_a_demo_of_several_processes_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused("--demo", "--out", tmp_path / "out")


def test_a_run_without_local_crops_does_not_ask_for_their_size(command, images, tmp_path):
    run = ("--data", images, *RUN, "--local-crops", 0, "--local-size", 29, "--steps", 1)
    assert command(*run, "--out", tmp_path)[0] == 0


def test_folders_without_images_are_refused(refused, images, tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    data = tmp_path / "data"
    run = ("--out", tmp_path / "out", *RUN)
    assert "nowhere" in refused("--data", tmp_path / "nowhere", *run)
    assert "nowhere" in refused("--data", images / "0.png" / "nowhere", *run)
    assert "0.png" in refused("--data", images / "0.png", *run)
    (data / "notes.txt").write_text("no image")
    assert "no image" in refused("--data", data, *run)
    for i in range(6):
        (data / "deep" / f"{i}.jpg").write_bytes(b"no image either")
    assert re.search("none .*6", refused("--data", data, *run))
    err = refused("--data", images, *run, "--batch-size", 9)
    assert "8" in err and "batch" in err


def test_backbones_that_cannot_be_built_are_refused(refused, images, hub, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    run = ("--data", images, "--out", tmp_path / "out", *RUN, "--backbone")
    err = refused(*run, "dinov3")
    assert "dinov2_vits14_reg" in err and "tiny" in err
    assert_tells_the_way_out(refused(*run, "dinov2_vits14"))
    assert_tells_the_way_out(refused(*run, "offline", "--hub", hub))
    assert "no_such_model" in refused(*run, "no_such_model", "--hub", hub)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "hubconf.py").write_text("def no python")
    assert str(tmp_path / "wrong") in refused(*run, "any", "--hub", tmp_path / "wrong")
    torch.save(STATE, tmp_path / "other.pth")
    err = refused(*run, "tiny", "--weights", tmp_path / "other.pth")
    assert "patch_embed" in err and "other.pth" in err
    assert "none.pth" in refused(*run, "tiny", "--weights", tmp_path / "none.pth")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no checkpoint",
        "half",
        {"model": torch.ones(3)},
        {"settings": 3, "student": {}, "queue": {}},
        torch.ones(3),
        {"settings": {}, "student": {}, "queue": {}},
        {"settings": {}, "student": Code(), "queue": {}},
    ],
)
def test_broken_and_foreign_checkpoints_are_refused(
    refused, images, tmp_path, whole_run, monkeypatch, content
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "out" / "checkpoint.pth"
    path.parent.mkdir()
    if content == "half":
        content = (whole_run / "checkpoint.pth").read_bytes()[:100_000]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert "checkpoint.pth" in refused("--data", images, "--out", path.parent, *RUN)
    assert not Path("pickled-code-ran").exists()


def test_an_out_that_cannot_be_written_is_refused(refused, images, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(out) in refused("--data", images, "--out", out, *RUN)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_out_is_refused(refused, images, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    assert "out" in refused("--data", images, "--out", tmp_path / "out", *RUN)


def test_a_demo_that_cannot_start_writes_nothing(refused, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert str(tmp_path / "file") in refused(*DEMO, "--out", tmp_path / "file")
    assert "--local-size" in refused(*DEMO, "--out", tmp_path / "out", "--local-size", 29)


# ------------------------------------------------------------------------------------ eval_seg.py


class MeanColour(torch.nn.Module):
    """A backbone whose patch feature is its mean colour, so that the answers are known."""

    def __init__(self, patch: int = 4):
        super().__init__()
        self.patch_size, self.embed_dim = patch, 3
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return torch.nn.functional.avg_pool2d(images, self.patch_size)


def save(path: Path, array, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def read_bytes(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def blank(height: int = 8, width: int = 8, value: int = 90) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def grid(*values: int) -> np.ndarray:
    """A mask (8, 8) whose columns cycle through the values."""
    return np.resize(np.array(values, np.uint8), (8, 8))


def write_voc(root: Path) -> None:
    for name in ("a", "b", "c"):
        save(root / f"JPEGImages/{name}.jpg", blank())
        save(root / f"SegmentationClass/{name}.png", grid(0, 20, 255, 7), "P")
        save(root / f"SegmentationClassAug/{name}.png", grid(0, 15))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for name, stems in {"train": "a\n", "trainaug": "a\nb\n", "val": "c\n"}.items():
        (lists / f"{name}.txt").write_text(stems)


def write_ade20k(root: Path) -> None:
    for split, stems in {"training": "ab", "validation": "c"}.items():
        for stem in stems:
            save(root / f"images/{split}/{stem}.jpg", blank())
            save(root / f"annotations/{split}/{stem}.png", grid(0, 1, 150, 2))
    names = "".join(f"{n}\t0.1\t{n}\t7\tthing {chr(97 + n % 26)}, alias\n" for n in range(1, 151))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + names)


def write_coco(root: Path) -> None:
    """Both annotations; one panoptic id needs more than 16 bits."""
    categories = [
        {"id": 1, "supercategory": "person", "isthing": 1},
        {"id": 2, "supercategory": "vehicle", "isthing": 1},
        {"id": 17, "supercategory": "animal", "isthing": 1},
        {"id": 149, "supercategory": "ground", "isthing": 0},
    ]
    stuff = [
        {"id": 92, "supercategory": "textile"},
        {"id": 149, "supercategory": "ground"},
        {"id": 183, "supercategory": "other"},
    ]
    ids = {70000: 1, 300: 2, 5: 17, 6: 149, 0: None}
    for split, stems in {"train": [f"{n:012}" for n in range(20)], "val": ["000000000099"]}.items():
        annotations = []
        for stem in stems:
            save(root / f"{split}2017/{stem}.jpg", blank(4, 5))
            row = np.array([[i % 256, i // 256 % 256, i // 65536] for i in ids], np.uint8)
            save(root / f"annotations/panoptic_{split}2017/{stem}.png", np.tile(row, (4, 1, 1)))
            info = [{"id": i, "category_id": c} for i, c in ids.items() if c]
            annotations.append({"file_name": f"{stem}.png", "segments_info": info})
            save(root / f"stuff_{split}2017_pixelmaps/{stem}.png", [[0, 92, 149, 183, 149]] * 4)
        content = {"annotations": annotations, "categories": categories}
        (root / f"annotations/panoptic_{split}2017.json").write_text(json.dumps(content))
    (root / "annotations/stuff_val2017.json").write_text(json.dumps({"categories": stuff}))


def write_folder(root: Path, side: int = 56, images: int = 4) -> None:
    """Two classes of opposite colour, left and right, at a border that differs between images."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for n in range(images):
            mask = np.zeros((side, side), np.uint8)
            mask[:, rng.integers(side // 4, 3 * side // 4) :] = 1
            image = np.where(mask[..., None] == 1, [220, 40, 40], [40, 40, 220])
            mask[:2] = 255
            save(root / f"{split}/images/{n}.png", image + rng.integers(-30, 30, image.shape))
            save(root / f"{split}/masks/{n}.png", mask)


LAYOUTS = {
    "voc": (write_voc, 21, 2, [0, 15, 0, 15], [0, 20, 255, 7]),
    "ade20k": (write_ade20k, 150, 2, [255, 0, 149, 1], [255, 0, 149, 1]),
    "coco-things": (write_coco, 3, 20, [1, 2, 0, 255, 255], [1, 2, 0, 255, 255]),
    "coco-stuff": (write_coco, 2, 20, [255, 1, 0, 255, 0], [255, 1, 0, 255, 0]),
    "folder": (write_folder, 2, 4, None, None),
}


@pytest.mark.parametrize("level", ["here", "above", "below"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_give_classes_and_pairs(tmp_path, name, level):
    write, classes, train, first, first_val = LAYOUTS[name]
    root = tmp_path / "outer" / "data"
    write(root)
    inner = next(path for path in sorted(root.iterdir()) if path.is_dir())
    data = eval_seg.DATASETS[name]({"here": root, "above": root.parent, "below": inner}[level])
    assert (len(data.classes), len(data.train), len(data.val)) == (
        classes,
        train,
        4 if name == "folder" else 1,
    )
    for image, mask in data.train + data.val:
        assert image.stem == mask.stem and image.exists() and mask.exists()
    if first:
        assert data.read_mask(data.train[0][1])[0, : len(first)].tolist() == first
        assert data.read_mask(data.val[0][1])[0, : len(first)].tolist() == first_val
    if name == "coco-things":
        assert data.classes == ["animal", "person", "vehicle"]
    if name == "coco-stuff":
        assert data.classes == ["ground", "textile"]
    if name == "ade20k":
        assert data.classes[0] == "thing b" and data.classes[149] == "thing u"
    if name == "voc":
        assert [[image.stem for image, _ in pairs] for pairs in data[:2]] == [["a", "b"], ["c"]]
        assert data.classes[7] == "car" and data.classes[15] == "person"


def test_voc_without_the_augmented_masks_trains_on_train(tmp_path):
    write_voc(tmp_path / "VOCdevkit/VOC2012")
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt").unlink()
    data = eval_seg.load_voc(tmp_path)
    assert [mask.parent.name for _, mask in data.train] == ["SegmentationClass"]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "folder"])
def test_a_missing_part_is_named_with_its_download(tmp_path, name):
    LAYOUTS[name][0](tmp_path)
    part, download = {
        "voc": ("ImageSets/Segmentation/val.txt", "VOCtrainval"),
        "ade20k": ("objectInfo150.txt", "ADEChallengeData2016.zip"),
        "coco-things": ("annotations/panoptic_val2017.json", "panoptic_annotations"),
        "coco-stuff": ("annotations/stuff_val2017.json", "stuff_annotations"),
    }[name]
    (tmp_path / part).unlink()
    with pytest.raises(eval_seg.InputError, match=f"{Path(part).name}.*{download}"):
        eval_seg.DATASETS[name](tmp_path)


def test_folder_takes_names_from_classes_txt(tmp_path):
    write_folder(tmp_path)
    assert eval_seg.load_folder(tmp_path).classes == ["class 0", "class 1"]
    (tmp_path / "classes.txt").write_text("ground\nsky\nnowhere\n")
    assert eval_seg.load_folder(tmp_path).classes == ["ground", "sky", "nowhere"]


def test_the_last_epoch_is_the_result():
    best, last = torch.tensor([[9, 1], [0, 10]]), torch.tensor([[4, 6], [3, 7]])
    result = eval_seg.summary([best, last], ["a", "b"])
    assert result["miou"] == result["miou_per_epoch"][1] < result["miou_per_epoch"][0]
    assert result["iou"] == pytest.approx({"a": 400 / 13, "b": 700 / 16})


def test_defaults_are_those_of_the_protocols():
    args = eval_seg.parse_arguments(["--data", "here", "--device", "cpu"])
    assert (args.neighbours, args.temperature, args.memory) == (30, 0.02, 10_240_000)
    assert (args.epochs, args.lr, args.batch_size, args.size) == (25, 0.01, 128, None)
    assert [eval_seg.METHODS[name][1] for name in ("in-context", "linear")] == [518, 448]


def test_of_two_data_sets_one_must_be_named(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        write_voc(tmp_path / "VOCdevkit" / year)
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        with pytest.raises(eval_seg.InputError, match="several such data sets"):
            eval_seg.load_voc(root)
    data = eval_seg.load_voc(tmp_path / "VOCdevkit/VOC2012")
    assert "VOC2012" in str(data.val[0][0])


def test_annotations_of_another_kind_are_named(tmp_path):
    for layout, load in (
        ("coco-things", eval_seg.load_coco_things),
        ("coco-stuff", eval_seg.load_coco_stuff),
    ):
        LAYOUTS[layout][0](tmp_path / layout)
        for file in (tmp_path / layout).rglob("*.json"):
            content = json.loads(file.read_text())
            content["categories"] = [{"id": 1, "name": "person"}]
            file.write_text(json.dumps(content))
        with pytest.raises(eval_seg.InputError, match="2017.json is no annotation file"):
            load(tmp_path / layout)


def test_classes_of_one_name_keep_their_rows(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("a\na\n")
    arguments = f"--data {tmp_path} --backbone tiny --size 56 --workers 0 --out {tmp_path}/out"
    linear = "--method linear --epochs 1 --memory 3"  # which is a flag of the other method
    assert eval_seg.main([*arguments.split(), *linear.split()]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["linear"]["none"]["iou"]) == ["a", "a (1)"]


def test_bounded_memory_is_drawn_by_the_seed(tmp_path):
    write_folder(tmp_path)
    data = eval_seg.load_folder(tmp_path)
    one, same, other = (
        eval_seg.build_memory(MeanColour(), data, 32, 30, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_images_of_any_mode_become_rgb(tmp_path):
    grey = np.full((2, 2), 40, np.uint8)
    palette = Image.fromarray(grey * 0)
    palette.putpalette([10, 20, 30])
    pictures = {
        "16.png": (Image.fromarray(grey.astype(np.uint16) * 257), (40, 40, 40)),
        "cmyk.tif": (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        "alpha.png": (Image.new("RGBA", (2, 2), (1, 2, 3, 255)), (1, 2, 3)),
        "la.png": (Image.new("LA", (2, 2), (9, 255)), (9, 9, 9)),
        "palette.png": (palette, (10, 20, 30)),
    }
    for name, (image, colour) in pictures.items():
        image.save(tmp_path / name)
        assert eval_seg.read_image(tmp_path / name).getpixel((1, 1)) == colour, name


def test_masks_and_images_stay_in_step_through_random_crops(tmp_path):
    """Pixels hold their coordinates, in image and mask: after any crop they must agree."""
    y, x = np.mgrid[:120, :100]
    save(tmp_path / "image.png", np.stack([2 * x, 2 * y, 0 * x], -1))
    save(tmp_path / "x.png", x)
    save(tmp_path / "y.png", y)
    mean, std = [0.485, 0.456], [0.229, 0.224]
    boxes = set()
    for epoch in range(12):
        for axis, name in enumerate("xy"):
            pairs = [(tmp_path / "image.png", tmp_path / f"{name}.png")]
            images = eval_seg.ImagesAndMasks(pairs, read_bytes, 80, 80, (3, epoch))
            image, mask = images[0]
            seen = 255 * (image[axis] * std[axis] + mean[axis]) / 2
            assert (seen - mask).abs().max() < 1.6, (epoch, name)
            again = images[0]
            assert torch.equal(image, again[0]) and torch.equal(mask, again[1])
            boxes.add((name, int(mask[0, 0]), int(mask[-1, -1])))
    lefts = [(a, b) for name, a, b in boxes if name == "x"]
    assert any(a > b for a, b in lefts) and any(a < b for a, b in lefts)  # flipped and not
    assert len(boxes) > 12  # crops differ from epoch to epoch
    assert all(abs(a - b) >= 0.68 * 100 for a, b in lefts)  # and are large
    whole, _ = eval_seg.ImagesAndMasks(pairs, read_bytes, 80, 80)[0]
    assert abs(255 * (whole[1, -1, 0] * std[1] + mean[1]) / 2 - 119) < 1.5


def test_miou_against_a_brute_force_count():
    rng = np.random.default_rng(0)
    mask, prediction = rng.integers(0, 4, (2, 3, 20, 20))
    mask[mask == 3] = 255
    prediction[prediction == 3] = 4  # class 4 is predicted and never true; class 3 is neither
    confusion = sum(
        eval_seg.confusion_matrix(torch.tensor(p), torch.tensor(m), 5)
        for p, m in zip(prediction, mask, strict=True)
    )
    assert confusion.dtype == torch.int64 and confusion.sum() == (mask != 255).sum()
    expected = []
    for n in range(5):
        truth, found = (mask == n), (prediction == n) & (mask != 255)
        union = (truth | found).sum()
        expected.append((truth & found).sum() / union if union else np.nan)
    np.testing.assert_allclose(eval_seg.class_iou(confusion).numpy(), expected)
    assert eval_seg.mean_iou(confusion) == pytest.approx(100 * np.nanmean(expected))
    summary = eval_seg.summary([confusion], list("abcde"))
    assert summary["classes_counted"] == 4 and summary["iou"]["d"] is None


@pytest.mark.parametrize("n", [30, 77, 600, 5000, 40_003])
@pytest.mark.parametrize("block_bytes", [2**12, 2**28])
def test_search_finds_the_neighbours_of_a_full_sort(n, block_bytes):
    generator = torch.Generator().manual_seed(n)
    memory = torch.randn(n, 8, generator=generator)
    memory[n // 2 :] *= 1.5  # the best lie crowded in a few groups
    queries = torch.randn(70, 8, generator=generator)
    values, indices = eval_seg.search(queries, memory, 30, block_bytes)
    expected = (queries @ memory.T).topk(30)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices.sort().values, expected.indices.sort().values)


class LargestResult(TorchDispatchMode):
    """Remembers the size in bytes of the largest tensor that an operation returned."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_search_holds_no_full_matrix():
    memory, queries = torch.randn(20_000, 4), torch.randn(2_000, 4)
    with LargestResult() as largest:
        eval_seg.search(queries, memory, 5, 2**20)
    assert 0 < largest.bytes <= 2**20  # the matrix would take 160 MB


def test_patch_labels_are_frequencies_and_ignored_pixels_do_not_vote():
    mask = torch.tensor([[0, 0, 1, 255], [0, 2, 255, 255], [255, 255, 2, 2], [255, 255, 2, 2]])
    labels = eval_seg.patch_labels(mask[None].byte(), 3, 2)[0]
    expected = [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    torch.testing.assert_close(labels, torch.tensor(expected))


def test_bounded_memory_keeps_the_rare_class():
    labels = torch.zeros(100, 3)
    labels[:90, 0] = 1
    labels[90:92, 1] = 1  # rare; 92 to 99 have no label
    for seed in range(30):
        uniform = torch.rand(100, generator=torch.Generator().manual_seed(seed))
        chosen = eval_seg.choose_patches(labels, 12, uniform)
        assert len(chosen.unique()) == 12 and {90, 91} <= set(chosen.tolist())
        assert chosen.max() < 92
    assert len(eval_seg.choose_patches(labels, 99, uniform)) == 92
    mixed = torch.tensor([[1.0, 0], [1, 0], [0.5, 0.5], [0, 1]])  # scores u * 3, 3, 5, 2
    chosen = eval_seg.choose_patches(mixed, 2, torch.tensor([0.5, 0.6, 0.28, 0.9]))
    assert chosen.tolist() == [0, 2]


def test_in_context_against_a_plain_loop_over_neighbours(tmp_path):
    """Memory, neighbours, votes and pixels, counted one by one in plain NumPy."""
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for n in range(3):
            image = rng.integers(0, 256, (16, 16, 3)).repeat(2, 0).repeat(2, 1)
            mask = np.where(image[..., 0] > 128, 1, 0)
            mask[rng.random(mask.shape) < 0.4] = 255
            if n == 0:
                mask[:8, :16] = 255  # eight patches without a label
            save(tmp_path / f"{split}/images/{n}.png", image)
            save(tmp_path / f"{split}/masks/{n}.png", mask)
    data, side, k, temperature = eval_seg.load_folder(tmp_path), 8, 5, 0.003

    def read(pair):
        image = np.asarray(Image.open(pair[0]), np.float64) / 255
        image = (image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        cells = image.reshape(side, 4, side, 4, 3).mean((1, 3)).reshape(-1, 3)
        mask = np.asarray(Image.open(pair[1])).astype(int)
        parts = mask.reshape(side, 4, side, 4).swapaxes(1, 2).reshape(-1, 16)
        return cells / np.linalg.norm(cells, axis=1, keepdims=True), parts, mask

    memory, labels = [], []
    for pair in data.train:
        for cell, part in zip(*read(pair)[:2], strict=True):
            part = part[part != 255]
            if len(part):
                memory.append(cell)
                labels.append([(part == 0).mean(), (part == 1).mean()])
    confusion = np.zeros((2, 2), int)
    for pair in data.val:
        cells, _, mask = read(pair)
        votes = []
        for cell in cells:
            similarity = np.array([cell @ other for other in memory])
            nearest = np.argsort(-similarity)[:k]
            weights = np.exp(similarity[nearest] / temperature)
            votes.append((weights / weights.sum()) @ np.array(labels)[nearest])
        votes = torch.tensor(np.array(votes)).T.view(1, 2, side, side)
        maps = torch.nn.functional.interpolate(votes, (32, 32), mode="bilinear")[0]
        for truth, found in zip(mask.ravel(), maps.argmax(0).numpy().ravel(), strict=True):
            if truth != 255:
                confusion[truth, found] += 1

    bank, _ = eval_seg.build_memory(MeanColour(), data, 32, 10**6)
    assert len(bank) == len(memory) < 3 * 64
    history, kept = eval_seg.in_context(MeanColour(), data, 32, k, temperature, keep=[1])
    assert np.abs(history[0].numpy() - confusion).sum() <= 2  # a tie may fall either way
    assert list(kept) == [1] and kept[1].shape == (32, 32)
    bank, labels = eval_seg.build_memory(MeanColour(), data, 32, 30)
    assert len(bank) == len(labels) == 30 and (labels.sum(1) - 1).abs().max() < 1e-5


def write_stripes(root: Path, informative: bool) -> eval_seg.Segmentation:
    """Three classes in blocks; the colour tells the class, or nothing."""
    rng = np.random.default_rng(0)
    colours = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250]])
    for split in ("train", "val"):
        for n in range(8):
            mask = rng.integers(0, 3, (6, 6))
            shown = mask if informative else rng.integers(0, 3, (6, 6))
            save(root / f"{split}/images/{n}.png", colours[shown].repeat(8, 0).repeat(8, 1))
            save(root / f"{split}/masks/{n}.png", mask.repeat(8, 0).repeat(8, 1))
    return eval_seg.load_folder(root)


def test_linear_probe_separates_separable_features(tmp_path):
    data = write_stripes(tmp_path, informative=True)
    history, _ = eval_seg.linear(MeanColour(), data, 48, epochs=20, lr=1.0, batch_size=4)
    assert len(history) == 20 and eval_seg.mean_iou(history[-1]) > 80
    again, _ = eval_seg.linear(MeanColour(), data, 48, epochs=2, lr=1.0, batch_size=4, workers=2)
    one, _ = eval_seg.linear(MeanColour(), data, 48, epochs=2, lr=1.0, batch_size=4)
    assert all(map(torch.equal, again, one))  # whatever the number of workers


def test_linear_probe_stays_at_chance_on_noise(tmp_path):
    data = write_stripes(tmp_path, informative=False)
    history, _ = eval_seg.linear(MeanColour(), data, 48, epochs=10, lr=0.1, batch_size=4)
    accuracy = history[-1].diagonal().sum() / history[-1].sum()
    assert abs(accuracy - 1 / 3) < 0.08 and eval_seg.mean_iou(history[-1]) < 25


def test_train_is_learned_from_and_val_is_only_looked_at(tmp_path):
    data, read = write_stripes(tmp_path, informative=True), []
    spy = data._replace(read_mask=lambda path: read.append(path) or data.read_mask(path))
    expected = sorted(mask for _, mask in data.train), sorted(mask for _, mask in data.val)
    for run in (
        lambda: eval_seg.linear(MeanColour(), spy, 48, epochs=1),
        lambda: eval_seg.in_context(MeanColour(), spy, 48),
    ):
        read.clear()
        run()
        assert (sorted(read[:8]), sorted(read[8:])) == expected


def test_probe_upsamples_scores_as_it_would_features():
    probe, features = torch.nn.Conv2d(5, 3, 1), torch.randn(2, 5, 7, 7)
    slow = probe(torch.nn.functional.interpolate(features, (100, 100), mode="bilinear"))
    torch.testing.assert_close(eval_seg.probe_logits(probe, features), slow)


def test_probe_loss_leaves_out_ignored_pixels():
    logits, masks = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 255], [2, 255]]])
    expected = torch.nn.functional.cross_entropy(logits[0, :, :, 0].T, torch.tensor([0, 2]))
    torch.testing.assert_close(eval_seg.probe_loss(logits, masks), expected)
    assert eval_seg.probe_loss(logits, torch.full_like(masks, 255)) == 0


def test_feature_colours_follow_the_main_directions_of_variance():
    features = torch.zeros(2, 5, 3, 3)
    features[1, 2], features[:, 4, 0] = 9.0, 1.0  # image against image; first row against others
    colours = eval_seg.feature_colours(features)
    assert colours.shape == (2, 3, 3, 3) and colours.dtype == np.uint8
    assert (colours[0, ..., 0] == 0).all() and (colours[1, ..., 0] >= 254).all()
    assert (colours[:, 0, :, 1] >= 254).all() and (colours[:, 1:, :, 1] == 0).all()


def write_grey_png(path: Path, bits: int) -> None:
    """A black grey PNG of 56 x 56 pixels and few bits, which Pillow itself does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 56, 56, bits, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 56 * bits // 8) * 56)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def save_broken_weights(root: Path) -> None:
    state = neco.TinyViT().state_dict()
    torch.save({key: value * math.nan for key, value in state.items()}, root / "nan.pth")


# Each row: what is wrong, how the folder is broken, further arguments, and words of the sentence.
BAD_INPUT = {
    "grey of few bits": (
        lambda r: write_grey_png(r / "train/masks/1.png", 4),
        [],
        "masks/1.png is a grey PNG of 4 bits",
    ),
    "class names": (
        lambda r: (r / "classes.txt").write_bytes(b"sky\n\xff\xfe"),
        [],
        "classes.txt is not text",
    ),
    "no labels for the probe": (
        lambda r: [
            (r / "classes.txt").write_text("a\nb"),
            *(save(path, np.full((56, 56), 255)) for path in (r / "train/masks").iterdir()),
        ],
        ["--method", "linear"],
        "training images hold no labelled pixel",
    ),
    "rate too high": (
        lambda r: None,
        ["--method", "linear", "--lr", "1e6", "--epochs", "40"],
        "--lr 1000000.0: the loss of the probe is not finite",
    ),
    "weights that are no numbers": (
        save_broken_weights,
        ["--weights", "{root}/nan.pth"],
        "features are not finite",
    ),
    "meta device": (lambda r: None, ["--device", "meta"], "--device meta"),
    "sizes differ": (
        lambda r: save(r / "val/masks/1.png", grid(0, 1)),
        [],
        "val/images/1.png.*8 x 8",
    ),
    "value outside": (
        lambda r: [
            (r / "classes.txt").write_text("a\nb"),
            save(r / "train/masks/2.png", np.full((56, 56), 9)),
        ],
        [],
        "train/masks/2.png holds the value 9",
    ),
    "no mask": (lambda r: (r / "val/masks/0.png").unlink(), [], "val/images/0.png has no mask"),
    "empty split": (
        lambda r: [path.unlink() for path in (r / "val/images").iterdir()],
        [],
        "val/images has no image",
    ),
    "rgb mask": (lambda r: save(r / "train/masks/1.png", blank(56, 56)), [], "masks/1.png.*RGB"),
    "broken image": (
        lambda r: (r / "val/images/3.png").write_bytes(b"nothing"),
        [],
        "val/images/3.png cannot be read",
    ),
    "one class": (
        lambda r: [
            save(path, np.zeros((56, 56)))
            for s in ("train", "val")
            for path in (r / s / "masks").iterdir()
        ],
        [],
        "1 classes",
    ),
    "no labels": (
        lambda r: [
            (r / "classes.txt").write_text("a\nb"),
            *(save(path, np.full((56, 56), 255)) for path in (r / "train/masks").iterdir()),
        ],
        [],
        "no labelled pixel",
    ),
    "no labels in val": (
        lambda r: [save(path, np.full((56, 56), 255)) for path in (r / "val/masks").iterdir()],
        [],
        "no labelled pixel",
    ),
    "missing split": (lambda r: (r / "val").rename(r / "test"), [], "val/images is not there"),
    "no folder": (lambda r: r.rename(r.with_name("gone")), [], "is not a folder"),
    "wrong data set": (lambda r: None, ["--dataset", "imagenet"], "invalid choice.*imagenet"),
    "foreign layout": (lambda r: None, ["--dataset", "voc"], "VOCtrainval"),
    "foreign weights": (
        lambda r: torch.save({"a": torch.zeros(1)}, r / "other.pth"),
        ["--weights", "{root}/other.pth"],
        "other.pth",
    ),
    "missing weights": (lambda r: None, ["--weights", "none", "{root}/gone.pth"], "gone.pth"),
    "same weights": (lambda r: None, ["--weights", "none", "none"], "same entry twice"),
    "size": (lambda r: None, ["--size", "57"], "--size 57 is no multiple of the patch size, 14"),
    "backbone": (lambda r: None, ["--backbone", "resnet"], "resnet"),
    "out": (lambda r: (r / "file").touch(), ["--out", "{root}/file"], "file"),
    "memory": (lambda r: None, ["--memory", "3"], "--memory 3"),
    "neighbours": (lambda r: None, ["--neighbours", "0"], "--neighbours 0"),
    "temperature": (lambda r: None, ["--temperature", "nan"], "--temperature nan"),
    "epochs": (lambda r: None, ["--epochs", "-1"], "--epochs -1"),
    "lr": (lambda r: None, ["--lr", "0"], "--lr 0"),
    "batch size": (lambda r: None, ["--batch-size", "0"], "--batch-size 0"),
    "workers": (lambda r: None, ["--workers", "-2"], "--workers -2"),
    "device": (lambda r: None, ["--device", "abacus"], "--device abacus"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_to_eval_is_one_sentence_and_status_2(tmp_path, capsys, case):
    spoil, extra, words = BAD_INPUT[case]
    root = tmp_path / "data"
    write_folder(root)
    spoil(root)
    arguments = (
        f"--data {root} --backbone tiny --size 56 --epochs 1 --workers 0 --out {tmp_path}/out"
    )
    extra = [text.format(root=root) for text in extra]
    if case == "broken image":
        extra = ["--workers", "2"]  # from a worker process, too, it is a sentence
    try:
        status = eval_seg.main([*arguments.split(), *extra])
    except SystemExit as stop:  # argparse
        status = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert lines[-1].startswith("eval_seg.py: error: ")
    assert "invalid choice" in lines[-1] or len(lines) == 1
    assert re.search(words, lines[-1]), lines[-1]
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_cuda_where_there_is_none(tmp_path, capsys):
    assert eval_seg.main(["--data", str(tmp_path), "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_eval_command_line_end_to_end(tmp_path):
    write_folder(tmp_path / "data")
    (tmp_path / "data/classes.txt").write_text("sea\nfire\n")
    torch.manual_seed(5)
    weights = tmp_path / "other.pth"
    torch.save(eval_seg.load_backbone("tiny").model.state_dict(), weights)
    command = [sys.executable, eval_seg.__file__, "--data", tmp_path / "data", "--backbone", "tiny"]
    command += ["--weights", "none", weights, "--size", "56", "--epochs", "3", "--lr", "0.1"]
    command += ["--batch-size", "2", "--pictures", "2", "--workers", "1"]
    done = subprocess.run([*command, "--out", tmp_path / "a"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = [*map(str, command[2:]), "--out", str(tmp_path / "b"), "--workers", "0"]
    assert eval_seg.main(again) == 0
    outputs = [json.loads((tmp_path / out / "results.json").read_text()) for out in "ab"]
    assert outputs[0] == outputs[1]
    for method in ("in-context", "linear"):
        none, other = outputs[0][method]["none"], outputs[0][method]["other.pth"]
        change = f"{other['miou'] - none['miou']:+.2f}"
        row = f"{none['miou']:.2f}", f"{other['miou']:.2f}", change
        assert any(line.split() == ["mIoU", *row] for line in done.stdout.splitlines())
        assert set(none["iou"]) == {"sea", "fire"} and none["classes_counted"] == 2
    assert outputs[0]["in-context"]["none"]["miou"] > 70  # two plain colours
    assert len(outputs[0]["linear"]["none"]["miou_per_epoch"]) == 3
    for text in ("neighbours 30", "temperature 0.02", "fire", "epoch 3/3"):
        assert text in done.stdout
    picture = Image.open(tmp_path / "a/picture.png")
    assert picture.width > 6 * 250 and picture.height > 2 * 250
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 100


def test_eval_demo_reads_what_the_demo_left(tmp_path, capsys):
    write_folder(tmp_path / "data", side=42, images=2)
    for name in ("start", "teacher"):
        torch.manual_seed(len(name))
        torch.save(eval_seg.load_backbone("tiny").model.state_dict(), tmp_path / f"{name}.pth")
    assert (
        eval_seg.main(["--demo", "--data", str(tmp_path), "--epochs", "1", "--workers", "0"]) == 0
    )
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert list(results["in-context"]) == ["start.pth", "teacher.pth"]
    assert (tmp_path / "eval/picture.png").exists() and "change" in capsys.readouterr().out


def test_eval_demo_says_what_to_run_first(tmp_path, capsys):
    assert eval_seg.main(["--demo", "--data", str(tmp_path / "demo")]) == 2
    assert "python neco.py --demo" in capsys.readouterr().err


def test_default_size_is_rounded_to_the_patch():
    assert eval_seg.input_size(None, 518, 14) == 518 and eval_seg.input_size(None, 518, 16) == 512
    assert eval_seg.input_size(98, 518, 14) == 98


def test_coco_probe_trains_on_a_tenth(tmp_path, capsys):
    write_coco(tmp_path)
    arguments = f"--data {tmp_path} --dataset coco-stuff --backbone tiny --size 28 --epochs 1"
    assert eval_seg.main(f"{arguments} --workers 0 --out {tmp_path}/out".split()) == 0
    settings = json.loads((tmp_path / "out/results.json").read_text())["settings"]
    assert (settings["linear"]["train"], settings["in-context"]["train"]) == (2, 20)
