# SPDX-License-Identifier: MIT
"""Tests of neco.py and eval_seg.py, without GPU and network: `python -m pytest test_neco.py`.

Methods are tested against slow and obvious versions of them; trainings and evaluations run on the
command line, on made-up images.
"""

import argparse
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision import transforms
from torchvision.transforms import functional as tvf

import eval_seg
import neco

torch.set_num_threads(1)  # the order of sums, hence the last bit, depends on it
exact = {"rtol": 1e-9, "atol": 1e-9}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient(outputs, x):
    """Gradient of a fixed random sum of the outputs."""
    total = sum((normal(*y.shape, seed=1).to(y.dtype) * y).sum() for y in outputs)
    return torch.autograd.grad(total, x, retain_graph=True)[0]


# ----------------------------------------------------------------------------- sorting and loss


def comparators(size):
    """The bitonic network of 2^k wires: compare mirror images, then merge, block by block."""
    for block in (2**k for k in range(1, size.bit_length())):
        for start in range(0, size, block):
            for i in range(block // 2):
                yield start + i, start + block - 1 - i
        for half in (2**k for k in reversed(range(block.bit_length() - 2))):
            for i in range(size):
                if i % (2 * half) < half:
                    yield i, i + half


def slow_sort(x, steepness):
    """The definition for one vector: comparator after comparator, on values and on the identity."""
    virtual = [None] * (2 ** math.ceil(math.log2(len(x))) - len(x))  # smallest, in front already
    values = virtual + list(x)
    rows = virtual + list(torch.eye(len(x), dtype=x.dtype))
    for lo, hi in comparators(len(values)):
        if values[lo] is not None:
            alpha = 0.5 + torch.atan(steepness * (values[hi] - values[lo])) / math.pi
            for wires in (values, rows):
                a, b = wires[lo], wires[hi]
                wires[lo] = alpha * a + (1 - alpha) * b
                wires[hi] = (1 - alpha) * a + alpha * b
    return torch.stack(values[len(virtual) :]), torch.stack(rows[len(virtual) :])


def test_a_steep_soft_sort_is_a_sort_for_every_n():
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 257):
        x = torch.rand(3 + 64 // n, n, generator=generator).argsort(-1).double()
        expected = x.sort(-1).values, F.one_hot(x.argsort(-1), n).double()
        assert_close(neco.soft_sort(x, 1e15), expected, **exact)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 22, 32, 38, 43, 49, 54, 64])
def test_soft_sort_equals_the_definition_and_diffsort_with_gradient(n):
    x = normal(2, n, seed=n).requires_grad_()
    values, permutation = fast = neco.soft_sort(x, 20.0)
    ours = [*fast, gradient(fast, x)]
    slow = [torch.stack(both) for both in zip(*(slow_sort(row, 20.0) for row in x))]
    assert_close(ours, [*slow, gradient(slow, x)], **exact)
    for dim in (-1, -2):
        assert_close(permutation.sum(dim), torch.ones(2, n).double(), **exact)
    assert_close(values, (permutation @ x[..., None])[..., 0], **exact)
    if n < 6:
        assert torch.autograd.gradgradcheck(lambda x: neco.soft_sort(x, 3.0), x)
    if n in (2, 4, 8, 16, 32, 49, 64):
        network = pytest.importorskip("diffsort").DiffSortNet("bitonic", n, steepness=20.0)
        values, permutation = network(x)
        theirs = values, permutation.mT  # which is [item, rank]
        assert_close(ours, [*theirs, gradient(theirs, x)], **exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    with torch.inference_mode():
        neco.soft_sort(normal(300))  # what it keeps of that has to serve for training
    x = normal(2, 3, 300, dtype=dtype).requires_grad_()
    inputs = [y.requires_grad_() for y in features(dtype=dtype)]
    expected = *neco.soft_sort(x.float()), neco.neco_loss(*(y.float() for y in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        results = *neco.soft_sort(x), neco.neco_loss(*inputs)
    assert_close(results, expected, rtol=0, atol=0)  # which are float32
    assert gradient(results[:2], x).any()
    assert gradient(results[2:], inputs[0]).any()


def features(batch=2, patches=3, references=6, dim=5, dtype=torch.float64):
    """Features of student, teacher, alike but for noise, and references; none normalised."""
    student = 3 * normal(batch, patches, dim, seed=1)
    teacher = student + normal(batch, patches, dim, seed=2)
    return [t.to(dtype) for t in (student, teacher, normal(batch, references, dim, seed=3))]


def slow_loss(student, teacher, references, steepness=100.0, teacher_steepness=None):
    """The definition, image by image and patch by patch."""
    losses = []
    for image_of_student, image_of_teacher, drawn in zip(student, teacher, references):
        for patch, other in zip(image_of_student, image_of_teacher):
            x, y = (F.cosine_similarity(z[None], drawn) for z in (patch, other))
            _, p = slow_sort(x, steepness)
            _, q = slow_sort(y, teacher_steepness or steepness)
            losses.append(-(q * p.log()).sum(0).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("references", [2, 6, 7])
@pytest.mark.parametrize("steepness", [(), (7.0,), (7.0, 30.0)])
def test_loss_equals_the_definition_with_gradient(references, steepness):
    student, teacher, drawn = (x.requires_grad_() for x in features(references=references))
    loss = neco.neco_loss(student, teacher, drawn, *steepness)
    expected = slow_loss(student, teacher, drawn, *steepness)
    (3 * loss).backward()
    right = torch.autograd.grad(3 * expected, student)[0]
    assert_close([loss, student.grad], [expected, right], **exact)
    assert teacher.grad is None
    assert drawn.grad is None
    assert_close(neco.neco_loss(100 * student, 0.01 * teacher, 7 * drawn, *steepness), loss)
    with pytest.raises(ValueError, match="teacher"):
        neco.neco_loss(student, teacher[:, :2], drawn)


@pytest.mark.parametrize("steepness", [1e-6, 100.0, 1e30])
def test_loss_of_many_rows_is_their_mean_in_both_precisions(steepness):
    # computed in blocks of rows, of which these 700 are several
    student, teacher, drawn = features(batch=7, patches=100, references=49, dim=8)
    student.requires_grad_()
    loss = neco.neco_loss(student, teacher, drawn, steepness)
    single = neco.neco_loss(student.float(), teacher.float(), drawn.float(), steepness)
    right, grad = (torch.autograd.grad(x, student)[0] for x in (loss, single))
    assert loss.isfinite() and single.isfinite() and grad.isfinite().all()
    if steepness == 100:
        x, y = (F.cosine_similarity(z[:, :, None], drawn[:, None], -1) for z in (student, teacher))
        plain = -(neco.soft_sort(y)[1] * neco.soft_sort(x)[1].log()).sum(-2).mean()
        assert_close([loss, right], [plain, torch.autograd.grad(plain, student)[0]], **exact)
        assert_close(single.double(), loss, rtol=1e-5, atol=0)
        assert (grad - right).norm() < 1e-3 * right.norm()  # P near 1e-7 has few digits


def test_floor_is_the_entropy_of_the_teachers_ranking_and_ignorance_costs_log_r():
    student, teacher, references = features()
    entropy = slow_loss(teacher, teacher, references, 50.0)
    loss, floor = neco.neco_loss(student, teacher, references, 10.0, 50.0, with_floor=True)
    assert_close(floor, entropy)
    assert loss > floor and not floor.requires_grad
    student = teacher.clone().requires_grad_()
    floor = neco.neco_loss(student, teacher, references, 50.0)
    assert_close(floor, entropy)
    assert torch.autograd.grad(floor, student)[0].abs().max() < 1e-10
    # At right angles to all references, comparators mix by halves: every entry of P is 1 / R.
    for count in (1, 2, 8, 32):
        student = F.pad(torch.zeros(2, 3, 4).double(), (0, 1), value=2.0)
        loss = neco.neco_loss(student, teacher, F.pad(normal(2, count, 4), (0, 1)))
        assert loss.item() == pytest.approx(math.log(count), rel=1e-12)


# --------------------------------------------------------------------------------------- views

GLOBAL = neco.CropKind(2, 56, (0.25, 1.0), 0.02)
LOCAL = neco.CropKind(4, 28, (0.05, 0.25), 0.01)


def picture(width=96, height=72, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


def area(boxes):
    """Of boxes (..., 4), 0 if they are turned over."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def draw_boxes(width, height, times, monkeypatch):
    """Boxes (times, 6, 4) of 2 global and 4 local crops, without their pixels."""
    with monkeypatch.context() as patch:
        patch.setattr(neco, "change_colours", lambda crop: crop)
        kinds = [GLOBAL._replace(size=8), LOCAL._replace(size=8)]
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        return torch.stack([neco.make_views(image, kinds)["boxes"] for _ in range(times)])


def test_boxes_overlap_and_keep_their_share_of_the_image(monkeypatch):
    torch.manual_seed(0)
    for width, height in ((640, 480), (450, 600)):
        boxes = draw_boxes(width, height, 300, monkeypatch)
        low, high = boxes[..., :2].amin((0, 1)), boxes[..., 2:].amax((0, 1))
        assert [*low.tolist(), *high.tolist()] == [0, 0, width, height]
        w, h = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)  # rounded to whole pixels
        assert ((w + 0.5) / (h - 0.5)).min() >= 3 / 4
        assert ((w - 0.5) / (h + 0.5)).max() <= 4 / 3
        whole = width * height
        for drawn, kind in ((boxes[:, :2], GLOBAL), (boxes[:, 2:], LOCAL)):
            least, most = (area(drawn) / whole).aminmax()
            edge = (kind.share[1] - kind.share[0]) / 10
            assert kind.share[0] - 0.003 < least < kind.share[0] + edge
            assert kind.share[1] - edge < most < kind.share[1] + 0.003
        shared = neco.intersection(boxes[:, :2, None], boxes[:, None])
        assert area(shared).min() > 0.01 * whole
        assert 0.02 * whole < area(shared)[:, 0, 1].min() < 0.2 * whole
    for width, height in ((3, 1000), (1000, 3), (5000, 1), (1, 1), (1, 2), (2, 2)):  # it ends
        boxes = draw_boxes(width, height, 1, monkeypatch)[0]
        assert (area(neco.intersection(boxes[:2, None], boxes)) > 0).all()
    shares = area(draw_boxes(1000, 100, 9, monkeypatch)[:, :2]) / 1e5
    assert (shares.round(decimals=2) == 0.13).all()


def test_views_show_their_boxes_and_follow_the_seed(monkeypatch):
    def views(seed, image, *kinds):
        torch.manual_seed(seed)
        made = neco.make_views(image, kinds)
        return *itertools.chain(*made["crops"]), made["boxes"]

    coloured, again, other = (views(seed, picture(), GLOBAL, LOCAL) for seed in (5, 5, 6))
    for a, b, c in zip(coloured, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    monkeypatch.setattr(neco, "change_colours", lambda crop: crop)
    third, none = neco.CropKind(1, 42, (0.1, 0.4), 0.01), LOCAL._replace(count=0)
    cases = [(picture(), 4, LOCAL), (picture(), 0, none), (picture(1, 1), 4, LOCAL, third)]
    assert not torch.equal(coloured[0], views(5, picture(), GLOBAL, LOCAL)[0])
    for image, small, *others in cases:
        *crops, boxes = views(5, image, GLOBAL, *others)
        sizes = [56, 56] + [28] * small + [42] * (len(others) - 1)
        assert [crop.shape[1] for crop in crops] == sizes
        for crop, (left, top, right, bottom) in zip(crops, boxes.int().tolist(), strict=True):
            expected = tvf.to_pil_image(image[:, top:bottom, left:right])
            expected = tvf.pil_to_tensor(expected.resize(crop.shape[1:], Image.BILINEAR))
            assert crop.dtype == torch.uint8 and (crop.int() - expected.int()).abs().max() <= 2


def test_align_reads_the_same_places_from_both_crops(monkeypatch):
    def places(low, high, n):
        steps = (torch.arange(n).double() + 0.5) / n
        return low + torch.cartesian_prod(steps, steps).flip(1) * (high - low)  # (n * n, 2)

    # Feature maps hold the places of their patches in the image. RoI-align interpolates, and has
    # no neighbour to read from within half a patch of a crop's edge.
    torch.manual_seed(0)
    for boxes in draw_boxes(256, 192, 20, monkeypatch).double()[:, [0, 2]]:
        region = neco.intersection(*boxes)
        low, high = region[:2], region[2:]
        expected = places(low, high, 7)
        for box in boxes:
            maps, patch = places(box[:2], box[2:], 8).T.view(1, 2, 8, 8), (box[2:] - box[:2]) / 8
            error = (neco.align(maps, box[None], region[None], 7)[0] - expected).abs()
            margin = patch / 2 + (high - low) / 14
            inside = (expected > box[:2] + margin) & (expected < box[2:] - margin)
            assert (error < patch / 2 + 1e-9).all()
            assert inside.any() and error[inside].max() < 1e-9


def test_colours_change_as_torchvisions():
    jitter = transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
    blur = transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], 0.5)
    public = transforms.Compose([jitter, transforms.RandomGrayscale(0.2), blur])
    image, measured = tvf.to_pil_image(picture(6, 6) // 2 + 64).resize((24, 24)), []
    for change in (neco.change_colours, public):
        torch.manual_seed(0)
        x = torch.stack([tvf.pil_to_tensor(change(image)) for _ in range(800)]) / 255
        chroma, same = x.amax(1) - x.amin(1), x == x.mode(0).values
        parts = x, x[:, 0], (x - 0.5) ** 2, chroma, x.diff(dim=2).abs(), chroma == 0, same
        measured.append(torch.stack([part.float().flatten(1).mean(1) for part in parts]))
    error = 4 * (sum(rows.var(1) for rows in measured) / 800).sqrt()
    for statistic in (torch.mean, torch.std):
        ours, theirs = (statistic(rows, dim=1) for rows in measured)
        assert ((ours - theirs).abs() < error).all()


def test_images_of_all_modes_become_rgb(tmp_path):
    ramp = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    colour, greys = np.stack([ramp, ramp[::-1], ramp.T], axis=2), np.stack([ramp] * 3, axis=2)
    grey, image = Image.fromarray(ramp), Image.fromarray(colour)
    palette, turn = image.quantize(256), Image.Exif()
    turn[0x0112] = 6  # orientation: turn it by a quarter, clockwise
    stretched = greys * (255 / 252)  # from the image's own minimum to its maximum
    for name, saved, expected in (
        ("palette.png", palette, np.array(palette.convert("RGB"))),
        ("rgba.png", Image.merge("RGBA", [*image.split(), grey]), colour),
        ("one.png", grey.point(lambda v: 255 * (v > 99)).convert("1"), 255 * (greys > 99)),
        ("cmyk.tif", image.convert("CMYK"), colour),
        ("12 of 16 bits.png", Image.fromarray(ramp.astype(np.uint16) * 16), stretched),
        ("32 bits.tif", Image.fromarray(ramp.astype(np.int32) * 9999 - 7), stretched),
        ("0 to 1.tif", Image.fromarray(ramp.astype(np.float32) / 255), stretched),
        ("constant.tif", Image.fromarray(np.full((8, 8), 0.5, np.float32)), 0 * greys),
        ("turned.png", image, np.rot90(colour, -1)),
    ):
        saved.save(tmp_path / name, exif=turn if name == "turned.png" else Image.Exif())
        result = neco.read_image(tmp_path / name).permute(1, 2, 0).numpy()
        assert result.dtype == np.uint8 and result.shape == (8, 8, 3), name
        assert np.abs(result.astype(int) - expected).max() <= 1, name


def test_images_are_found_once_at_any_depth(tmp_path):
    names = ["b/ü é.JPG", "b/c/x.jpeg", "a.PNG", "z.webp", "B.bmp", "b/c/日本.tif", "b.Tiff"]
    others = ["notes.txt", "b/labels.json", "jpg", "c.jpg.part", "../elsewhere/x.png"]
    data = tmp_path / "data"
    for name in names + others:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "b/up").symlink_to(data)  # two links that lead round in a circle
    (data / "b/c/up").symlink_to(data / "b")
    found = [os.path.relpath(os.fsdecode(name), data) for name in neco.find_images(str(data))]
    assert found == sorted([*names, "linked/x.png"], key=os.fsencode)


# ------------------------------------------------------------------------------------- training

HUB = """
import torch
from torch import nn
from torchvision.models import resnet18

class Patches(nn.Module):  # tokens are the mean colours of patches of 4 x 4 pixels, plus a bias
    embed_dim = 3
    def __init__(self, pretrained, drop_path_rate=0.0):
        super().__init__()
        self.bias, self.rate = nn.Parameter(torch.full((3,), 7.0 * pretrained)), drop_path_rate
    def tokens(self, images):
        patches = nn.functional.avg_pool2d(images, 4).flatten(2).mT + self.bias
        return torch.cat([patches[:, :1] + 1e3, patches], dim=1)  # a class token in front

class DinoV2(Patches):
    patch_size = 4
    def get_intermediate_layers(self, x, n=1, reshape=False): return (self.tokens(x)[:, 1:],)

class DinoV3(Patches):
    patch_size = 4
    def get_intermediate_layers(self, x, *, n=1, reshape=False): return (self.tokens(x)[:, 1:],)

class Dino(Patches):
    patch_embed = type("", (), {"patch_size": 4})
    def get_intermediate_layers(self, x, n=1): return [self.tokens(x)]

class ConvNeXt(DinoV2): patch_size = None

def dinov2_small(*, pretrained=True, weights="", **kwargs): return DinoV2(pretrained, **kwargs)
def dinov3_small(*, pretrained=True, weights="", **kwargs):
    return DinoV3(pretrained, drop_path_rate=0.0, **kwargs)
def dino_small(pretrained=True, **kwargs): return Dino(pretrained, **kwargs)
def other(pretrained=True): return DinoV2(pretrained)
def large_patches(**options): return type("", (DinoV2,), {"patch_size": 16})(**options)
def dino_resnet(pretrained=True, **kwargs): return resnet18(weights=None, **kwargs)
def classifier(pretrained=True): return nn.Sequential(nn.Flatten(), nn.LazyLinear(9))
def convnext(pretrained=True): return ConvNeXt(pretrained)
def raising(**options): raise RuntimeError("out\\nof order")
"""
RUN = """--backbone tiny --global-size 56 --local-size 28 --local-crops 2 --batch-size 4 --epochs 3
    --grid 3 --queue 64 --hidden 32 --log-every 1 --save-every 2 --workers 0 --device cpu"""
STATE = {"bias": torch.arange(3.0)}
HEADS = {f"{part}head.0.weight": torch.ones(2, 2) for part in ("", "projection_", "dino_", "ibot_")}


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder of images, a hub, a finished run, and things that no run should take."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("images", "empty", "unreadable", "torn", "code"):
        (folder / name).mkdir()
    for i in range(8):
        tvf.to_pil_image(picture(seed=i)).save(folder / "images" / f"{i}.png")
        (folder / "unreadable" / f"{i}.jpg").write_bytes(b"no image")
    (folder / "hubconf.py").write_text(HUB)
    assert neco.main(f"--data {folder}/images --out {folder}/run {RUN}".split()) == 0
    code = {"a pickle can name any function": os.getcwd}
    torch.save({"state_dict": load(folder / "run", "student")} | code, folder / "code.pth")
    torch.save(load(folder / "run", "checkpoint") | code, folder / "code" / "checkpoint.pth")
    torch.save(STATE, folder / "other.pth")
    (folder / "torn" / "checkpoint.pth").write_bytes((folder / "code.pth").read_bytes()[:9999])
    return folder


@pytest.mark.parametrize("name", ["dinov2_small", "dinov3_small", "dino_small", "other"])
def test_hub_models_give_the_patches_in_their_places(place, tmp_path, monkeypatch, name):
    backbone, image = neco.load_backbone(name, str(place)), picture(20, 12)[None].float()
    assert torch.equal(backbone(image), F.avg_pool2d(image, 4) + 7)  # 7: the hub's own weights
    assert (backbone.patch_size, backbone.embed_dim, backbone.training) == (4, 3, True)
    assert backbone.model.rate == (0.1 if name in ("dinov2_small", "dino_small") else 0)
    # Files of one name in two folders, as authors publish them: each URL is a file of its own.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for run, state in {"a": STATE | HEADS, "b": {"bias": 2 * STATE["bias"]}}.items():
        (tmp_path / run).mkdir()
        torch.save({"state_dict": state}, tmp_path / run / "student.ckpt")
        for source in ("", "file://"):
            weights = f"{source}{tmp_path}/{run}/student.ckpt"
            patches = neco.load_backbone(name, str(place), weights)(image)
            assert torch.equal(patches, F.avg_pool2d(image, 4) + state["bias"].view(3, 1, 1))


def test_a_hub_can_be_pinned_to_a_commit(place, tmp_path, monkeypatch):
    def download(url, dst, hash_prefix=None, progress=True):
        assert url == f"https://github.com/owner/repo/zipball/{'0' * 40}"
        with zipfile.ZipFile(dst, "w") as archive:
            archive.writestr("repo-0/", "")
            archive.writestr("repo-0/hubconf.py", HUB)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_: 1 / 0)  # it would ask for the branches
    backbone = neco.load_backbone("dinov2_small", f"owner/repo:{'0' * 40}")
    assert backbone.model.rate == 0.1


@pytest.fixture
def command(capfd, place):
    """Run the command line in this process: flags, later ones count -> exit status and stderr."""

    def call(out, flags="", data=place / "images"):
        try:
            status, message = neco.main(f"--data {data} --out {out} {RUN} {flags}".split()), ""
        except SystemExit as stop:  # Python prints a message, and exits with status 1
            status, message = (1, stop.code) if isinstance(stop.code, str) else (stop.code, "")
        return status, capfd.readouterr().err + message

    return call


def load(folder, name):
    """A file of a run; "log" has rows of step, loss, floor, learning rate, weight decay."""
    if name == "log":
        return np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1, ndmin=2)
    return torch.load(folder / f"{name}.pth", weights_only=True)


def assert_same_run(a, b):
    """Bit for bit."""
    for name in ("student", "teacher", "checkpoint", "log"):
        for x, y in zip(*(tree_leaves(load(run, name)) for run in (a, b)), strict=True):
            assert np.array_equal(x, y), name


def spy(name, patch, module=neco, action=lambda calls: None):
    """Collect the arguments of the calls of a function, by name, and act before each call."""
    function, calls = getattr(module, name), []

    def wrapper(*arguments, **options):
        calls.append(inspect.signature(function).bind(*arguments, **options).arguments)
        action(calls)
        return function(*arguments, **options)

    patch(module, name, wrapper)
    return calls


def test_a_run_leaves_backbones_and_a_log(place):
    for name in ("student", "teacher"):
        neco.TinyViT().load_state_dict(load(place / "run", name), strict=True)
    step, loss, floor, rate, decay = load(place / "run", "log").T
    left = (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
    assert step.tolist() == [1, 2, 3, 4, 5, 6]
    assert (floor > 0).all() and (floor < loss).all()
    assert rate == pytest.approx(1e-5 * left, rel=1e-5)
    assert decay == pytest.approx(0.5 - 0.46 * left, rel=1e-5)


def public_loss(student_maps, teacher_maps, boxes, grid, references, *steepness):
    """Loss of a step as the public code has it: for each pair, then for each global crop."""
    losses = []
    for g, v in ((g, v) for g in range(2) for v in range(len(student_maps)) if v != g):
        a, b = boxes[:, g], boxes[:, v]
        shared = torch.cat([a[:, :2].maximum(b[:, :2]), a[:, 2:].minimum(b[:, 2:])], dim=1)
        cells = neco.align(student_maps[v], b, shared, grid)
        targets = neco.align(teacher_maps[g], a, shared, grid)
        losses.append(slow_loss(cells, targets, references[len(losses)], *steepness))
    return torch.stack(losses).view(2, -1).mean(1).mean()


def test_a_step_has_the_loss_of_the_public_code(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        aligned, compared = (spy(name, patch.setattr) for name in ("align_pairs", "neco_loss"))
        convolved = spy("forward", patch.setattr, torch.nn.Conv2d)
        flags = "--steepness 30 --teacher-steepness 60 --accumulate 2 --steps 1"
        assert command(tmp_path, flags)[0] == 0
    losses, steps = [], [call["references"] for call in compared]
    for pair in zip(aligned, steps, strict=True):
        maps, references = tree_map_only(torch.Tensor, lambda x: x.detach().double(), pair)
        cells, targets = neco.align_pairs(**maps)
        loss = neco.neco_loss(cells, targets, references, 30.0, 60.0)
        assert_close(loss, public_loss(*maps.values(), references, 30.0, 60.0), **exact)
        assert len(maps["student_maps"]) == 4 and len(maps["teacher_maps"]) == 2
        losses.append([loss, neco.neco_loss(targets, targets, references, 60.0)])
    assert load(tmp_path, "log")[0, 1:3] == pytest.approx(np.mean(losses, axis=0), rel=1e-5)
    std, mean = torch.tensor([[0.229, 0.224, 0.225], [0.485, 0.456, 0.406]])[..., None, None]
    crops = [call["input"] for call in convolved if call["input"].shape[1] == 3]
    for x in (255 * (x * std + mean) for x in crops[1:]):  # but the trial when it was loaded
        assert (x - x.round()).abs().max() < 1e-3  # whole numbers, before they were normalised
        assert x.min() > -0.1 and 100 < x.max() < 255.1


def test_references_are_drawn_from_a_queue_without_repetition(command, tmp_path, monkeypatch):
    # The teacher stands still. A step adds 10 patches of each of 4 images for each global crop.
    calls, views = (spy(name, monkeypatch.setattr) for name in ("neco_loss", "make_views"))

    def drawn(queue):
        """References of each of four steps and two global crops: pairs * images, sets of 9."""
        calls.clear()
        flags = f"--queue {queue} --seed {queue} --steps 4 --momentum 1"
        assert command(tmp_path / str(queue), flags)[0] == 0
        halves = [call["references"].flatten(1, 2).unflatten(0, (2, -1)) for call in calls]
        sets = [[half.flatten(0, 1).unflatten(0, (-1, 9)).tolist() for half in x] for x in halves]
        return [[[{*map(tuple, image)} for image in half] for half in step] for step in sets]

    drawings = drawn(64)
    assert all(len(image) == 9 for step in drawings for half in step for image in half)
    steps = [[set().union(*half) for half in step] for step in drawings]
    assert not steps[0][0] & steps[0][1]
    for g in (0, 1):
        first, second, third, _ = (step[g] for step in steps)
        assert len(first) <= 40 and first & second and not first & third
        assert all(abs(np.linalg.norm(patch) - 1) < 1e-5 for patch in third)
    assert all(image == half[0] for half in drawn(9)[0] for image in half)  # all of the queue
    seen = [call["image"].sum().item() for call in views]
    epochs = {tuple(seen[i : i + 8]) for i in range(0, 32, 8)}  # two of each of two seeds
    assert len(epochs) == 4 and all(len(set(epoch)) == 8 for epoch in epochs)


def test_rates_decay_and_momentum_move_what_they_should(command, tmp_path, monkeypatch, place):
    start = load(place / "run", "student")

    def moved(out, flags, status=0):
        flags = f"--weights {place}/run/student.pth --momentum 0.75 --head-lr 1e-3 {flags}"
        assert command(tmp_path / out, flags)[0] == status
        states = (load(tmp_path / out, name) for name in ("student", "teacher"))
        return ({key: x - start[key] for key, x in state.items()} for state in states)

    # Interrupted after the first of two steps: the teacher follows by 1/4, then by 1/8.
    fast = "--lr 1e-2 --weight-decay 0 0 --steps 2"
    with monkeypatch.context() as patch:
        spy("neco_loss", patch.setattr, action=lambda _: os.kill(os.getpid(), signal.SIGINT))
        student, teacher = moved("run", fast, 130)
    later, last = moved("run", fast)
    decayed, _ = moved("decay", "--lr 1e-2 --weight-decay 5 9 --steps 1")
    for key, value in start.items():
        assert student[key].abs().median() == pytest.approx(1e-2, rel=0.02)  # Adam's first step
        assert_close(teacher[key], 0.25 * student[key], rtol=1e-3, atol=1e-6)
        follows = teacher[key] + 0.125 * (later[key] - teacher[key])
        assert_close(last[key], follows, rtol=1e-3, atol=1e-6)
        shrunk = -5e-2 * value if value.ndim > 1 else 0 * value  # biases do not decay
        assert_close(decayed[key] - student[key], shrunk, rtol=1e-3, atol=1e-5)
    list(moved("still", "--lr 0 --head-lr 0 --weight-decay 0 0 --steps 1"))
    run = load(tmp_path / "still", "checkpoint")["run"]  # both start alike, with their heads
    assert all(torch.equal(run[key], run[key.replace("student", "teacher")]) for key in run)


def test_training_learns_and_leaves_out_files_that_cannot_be_read(command, tmp_path, place):
    data = shutil.copytree(place / "images", tmp_path / "data")
    (data / "cut.png").write_bytes((data / "0.png").read_bytes()[:3000])
    (data / "zzz.jpg").touch()
    flags = "--steps 30 --hidden 64 --batch-size 8 --momentum 1 --local-crops 0 --grid 4"
    flags += " --queue 400 --steepness 50 --workers 2"
    status, err = command(tmp_path / "out", f"{flags} --lr 3e-4 --head-lr 3e-4", data)
    assert status == 0 and all("skipped" in line for line in err.splitlines()), err
    assert str(data / "cut.png") in err and str(data / "zzz.jpg") in err
    assert command(tmp_path / "still", f"{flags} --lr 0 --head-lr 0", data)[0] == 0
    logs = (load(tmp_path / out, "log").T for out in ("out", "still"))
    learned, still = ((loss - floor)[-10:].mean() for _, loss, floor, *_ in logs)
    assert learned < 0.8 * still
    status, err = command(tmp_path / "flat", "--grid 2 --steepness 1e-3 --steps 1")
    assert status == 0 and "warning" in err and "flat" in err


def run_struck(argv, log, environment, where, call, number):
    """Run neco in a session of its own until a signal strikes it before a call of a function.

    It is forked from a server that has imported neco, as that takes some seconds. Signal 0 limits
    the size of files instead, as a full disk does.
    """
    multiprocessing.set_start_method("fork", force=True)  # of the workers; here it is the server's
    os.setsid()
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    module = {"replace": os, "step": torch.optim.AdamW}.get(where, neco)

    def strike(calls):
        time.sleep(0.2 * (where == "make_views"))  # so that the main process waits for it
        if len(calls) == call:
            os.killpg(0, number)

    if number == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (call, call))
    else:
        spy(where, setattr, module, strike)
    sys.exit(neco.main(argv.split()))


def start_processes(argv, log, environments=({},), strikes=(("replace", 99, signal.SIGKILL),)):
    """Run `run_struck` for each environment and strike; return exit statuses, -N for signal N."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["neco", "pytest"])
    processes = []
    for environment, strike in zip(environments, itertools.cycle(strikes)):
        arguments = argv, log, environment, *strike
        processes.append(context.Process(target=run_struck, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


INTERRUPTIONS = [  # before which call of what, by which signal; exit status; workers, and later
    (("neco_loss", 4, signal.SIGKILL), -9, (0, 2)),  # in step 4, of which 2 are saved
    (("replace", 1, signal.SIGKILL), -9, (1, 0)),  # the folder is claimed, and nothing written
    (("replace", 8, signal.SIGKILL), -9, (2, 0)),  # checkpoint of step 4, backbone of step 2
    (("replace", 12, signal.SIGKILL), -9, (0, 0)),  # the same, of the last step
    (("neco_loss", 3, signal.SIGTERM), 143, (0, 2)),
    (("neco_loss", 3, signal.SIGINT), 130, (2, 1)),
    (("make_views", 9, signal.SIGINT), 130, (1, 2)),  # while the worker reads for step 3
]


@pytest.mark.parametrize("strike, status, workers", INTERRUPTIONS)
def test_an_interrupted_run_ends_as_a_whole_one(command, tmp_path, place, strike, status, workers):
    log, out = tmp_path / "log", tmp_path / "out"
    argv = f"--data {place}/images --out {out} {RUN} --workers {workers[0]}"
    statuses, text = start_processes(argv, log, strikes=[strike]), log.read_text()
    assert statuses == [status] and "Traceback" not in text, text
    assert strike[0] != "neco_loss" or status < 0 or len(load(out, "log")) == 3
    assert command(out, f"--workers {workers[1]}")[0] == 0
    assert_same_run(out, place / "run")
    assert not list(out.glob("*.tmp"))


def test_one_of_two_runs_that_start_together_gets_the_folder(tmp_path, place):
    for attempt in range(3):
        argv = f"--data {place}/images --out {tmp_path}/{attempt} {RUN} --steps 2"
        context = multiprocessing.get_context("forkserver")
        strike = "replace", 99, signal.SIGKILL
        runs = []
        for rate in ("1e-5", "2e-5"):
            arguments = f"{argv} --lr {rate}", tmp_path / "log", {}, *strike
            runs.append(context.Process(target=run_struck, args=arguments))
        for run in runs:
            run.start()
        for run in runs:
            run.join(60)
        assert sorted(run.exitcode for run in runs) == [0, 2]
    assert (tmp_path / "log").read_text().count("set it so, or take another folder") == 3


def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(tmp_path, place):
    argv = f"--data {place}/images --out {tmp_path}/out {RUN}"
    assert start_processes(argv, tmp_path / "log", strikes=[("", 100_000, 0)]) == [2]
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert re.search("--out: .*/out/checkpoint.pth.tmp cannot be written", last)
    assert "step 1" not in (tmp_path / "log").read_text()


def start_two_ranks(argv, log, strikes):
    port = str(20000 + os.getpid() % 10000)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # as by torchrun
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return start_processes(argv, log, ranks, strikes)


def test_processes_and_accumulation_train_as_one(command, tmp_path, place):
    flags = f"--weights {place}/run/student.pth --steps 4 --lr 1e-3 --momentum 0.5 --seed 1"
    assert command(tmp_path / "one", flags)[0] == 0
    assert command(tmp_path / "parts", f"{flags} --accumulate 4")[0] == 0
    argv = f"--data {place}/images --out {tmp_path}/two {RUN} {flags} --accumulate 2"
    # The second process is killed between the optimiser's step and the end of step 3. What is
    # saved is step 2, and the run goes on from there.
    never = "replace", 99, signal.SIGKILL
    statuses = start_two_ranks(argv, tmp_path / "log", [never, ("step", 3, signal.SIGKILL)])
    assert statuses[0] != 0 and statuses[1] == -9
    assert load(tmp_path / "two", "checkpoint")["step"] == 2
    assert start_two_ranks(argv, tmp_path / "log", [never]) == [0, 0]
    assert (tmp_path / "log").read_text().count("step 4/4") == 1
    for other, name in itertools.product(("parts", "two"), ("student", "teacher")):
        logs = [load(tmp_path / run, "log") for run in (other, "one")]
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)
        for key, start in load(place / "run", "student").items():
            moved, right = (load(tmp_path / x, name)[key] - start for x in (other, "one"))
            if key.endswith("in_proj_bias"):  # keys: their gradient is 0, Adam moves by rounding
                moved, right = (x.view(3, -1)[[0, 2]] for x in (moved, right))
            assert (moved - right).norm() < 1e-3 * right.norm(), (other, name, key)


def test_what_was_computed_before_a_failure_is_kept(command, tmp_path, place, monkeypatch):
    out, data = tmp_path / "out", shutil.copytree(place / "images", tmp_path / "data")

    def spoil(calls):
        if len(calls) == 4:  # step 4 is saved, if it is finite
            calls[-1]["student"].data.fill_(math.nan)

    def vanish(calls):
        if len(calls) == 2:
            shutil.rmtree(data)

    def fill(calls):
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for action, status, saved, words in (
        (spoil, 1, 2, "not finite after step 4"),
        (fill, 2, 2, "--accumulate"),
        (vanish, 2, 4, "cannot be read"),
    ):
        with monkeypatch.context() as patch:
            spy("neco_loss", patch.setattr, action=action)
            found, err = command(out, data=data)
        assert found == status and words in err.splitlines()[-1], err
        assert load(out, "checkpoint")["step"] == saved
    assert command(out, "--workers 1")[0] == 0
    assert_same_run(out, place / "run")
    assert command(out, "--accumulate 2")[0] == 0  # as on a smaller card
    # One step of this size is finite, but the weights that it leaves are worth nothing.
    status, err = command(tmp_path / "huge", "--lr 1e38 --head-lr 1e38 --save-every 1")
    assert status == 1 and "not finite after step 1" in err
    assert load(tmp_path / "huge", "checkpoint")["step"] == 0


# ------------------------------------------------------------------- command line and bad input

RECIPE = """--out runs/neco --backbone dinov2_vits14_reg --epochs 25 --batch-size 64 --accumulate 1
--local-crops 4 --grid 7 --queue 8192 --hidden 2048 --lr 1e-05 --head-lr 0.0001
--weight-decay [0.04, 0.5] --momentum 0.9995 --steepness 100.0 --seed 0 --log-every 50
--save-every 250"""


def test_defaults_are_the_recipes_and_help_explains_each(monkeypatch, capsys):
    monkeypatch.setattr(neco, "prepare", vars)
    flags = neco.main(["--data", "here"])
    assert flags.pop("workers") == min(16, os.cpu_count())
    for name in ("data", "device", "precision"):
        flags.pop(name)
    given = {f"--{name.replace('_', '-')} {x}" for name, x in flags.items() if x is not None}
    assert given == set(re.findall(r"--\S+ (?:\[.*\]|\S+)", RECIPE))
    with pytest.raises(SystemExit, match="0"):
        neco.main(["--help"])
    text = capsys.readouterr().out
    for name in flags:
        flag = name.replace("_", "-")
        assert re.search(rf"^ +--{flag} [A-Z{{].*\s+[a-zA-Z0-9].*[a-z]{{2}}", text, re.MULTILINE)
    with pytest.raises(SystemExit, match="2"):
        neco.main(RUN.split())
    assert "--data" in capsys.readouterr().err.splitlines()[-1]


def test_default_crops_are_the_recipes(place, tmp_path, monkeypatch):
    calls = spy("Views", monkeypatch.setattr, action=lambda calls: 1 / 0)
    for flags in ("--backbone tiny", f"--backbone large_patches --hub {place}"):
        argv = f"--data {place}/images --out {tmp_path}/{len(calls)} --batch-size 8 {flags}"
        with pytest.raises(ZeroDivisionError):
            neco.main(argv.split())
    for call, sizes in zip(calls, [(518, 98), (512, 96)], strict=True):
        assert call["kinds"] == [
            (2, sizes[0], (0.25, 1.0), 0.02),
            (4, sizes[1], (0.05, 0.25), 0.01),
        ]


# Refused, and in the last line of stderr stands what follows "says", else the flags themselves.
REFUSED = """--data HERE/nowhere says --data HERE/nowhere not there; --data HERE/other.pth;
--data HERE/empty says --data HERE/empty .jpg;
--data HERE/unreadable says --data cannot HERE/unreadable/;
--data HERE/unreadable --workers 2 says --data cannot HERE/unreadable/;
--batch-size 9 says --data 8 9; --batch-size 4 --accumulate 3 says --batch-size 4 3;
--global-size 57 says --global-size 57 14; --local-size 29 says --local-size 29 14;
--queue 8 says --queue 8 9 --grid; --weight-decay 0.04 says --weight-decay 2;
--steps 2.5; --steps -3; --steps 0; --epochs 0; --batch-size 0; --accumulate -1; --grid 0;
--local-crops -1; --workers -1; --hidden 0; --log-every 0; --save-every 0; --global-size 0;
--steepness 0; --steepness nan; --teacher-steepness -1; --lr -1; --lr nan; --head-lr x;
--momentum 2; --weight-decay -1 1 says --weight-decay; --seed 99999999999999999999;
--precision fp8 says --precision fp8 bf16 fp32;
--device cuda:99; --backbone dinov5 says --backbone dinov5 dinov2_ dinov3_ dino_ tiny;
--backbone x --hub HERE/empty says --hub HERE/empty hubconf.py;
--backbone absent --hub HERE; --backbone dino_resnet --hub HERE; --backbone convnext --hub HERE;
--backbone classifier --hub HERE says classifier HERE vision transformer;
--backbone raising --hub HERE says --hub HERE raising out of order;
--backbone dinov2_vits14 says --hub facebookresearch/dinov2 --weights; --weights HERE/nowhere.pth;
--weights file://HERE/nowhere.pth; --weights HERE/code.pth;
--weights HERE/other.pth says --weights HERE/other.pth stem;
--out HERE/other.pth says HERE/other.pth; --out HERE/torn says --out HERE/torn/checkpoint.pth;
--out HERE/code says --out HERE/code/checkpoint.pth;
--out HERE/run --lr 2e-5 says --out HERE/run lr 1e-05 2e-05;
--out HERE/run --steps 12 says --out HERE/run steps 6 12"""


@pytest.mark.parametrize("case", REFUSED.replace("\n", " ").split("; "))
def test_bad_input_is_named_and_nothing_written_over(command, place, tmp_path, monkeypatch, case):
    def contents():
        return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}

    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = contents()
    flags, _, words = case.replace("HERE", str(place)).partition(" says ")
    status, err = command(tmp_path / "out", flags)
    assert status == 2 and "Traceback" not in err, err
    (last,) = re.findall("^neco.py: error: .*", err, re.MULTILINE)
    assert [word for word in (words or flags).split() if word not in last] == [], last
    assert contents() == before


def test_the_readmes_example_runs():
    readme = Path(__file__).with_name("README.md")
    text = readme.read_text() if readme.exists() else pytest.skip("no README.md here")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, names := {})
    assert names["loss"].isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(command, tmp_path):
    results = []
    for device in ("cpu", "cuda"):
        inputs = features(30, 30, 49, 16, dtype=torch.float32)
        student, *others = (x.to(device).requires_grad_() for x in inputs)
        loss = neco.neco_loss(student, *others)
        results.append([x.cpu() for x in (loss, *torch.autograd.grad(loss, student))])
    assert_close(*results, rtol=1e-3, atol=1e-5)
    assert command(tmp_path, "--device cuda --precision bf16 --steps 3")[0] == 0
    assert (load(tmp_path, "log")[:, 1] < 9).all()
    assert all(x.device.type == "cpu" for x in load(tmp_path, "student").values())


# ------------------------------------------------------------------------------------ eval_seg.py


class MeanColour(torch.nn.Module):
    """A backbone whose patch feature is its mean colour, so that the answers are known."""

    patch_size, embed_dim = 4, 3

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)  # which evaluation mode switches off
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.drop(F.avg_pool2d(images, self.patch_size))


def write_image(path: Path, pixels, palette: bool = False):
    """Write an image; or bytes, which are none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, bytes):
        return path.write_bytes(pixels)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if palette:
        image.putpalette(list(range(256)) * 3)
    return image.save(path)


def stripes(*values: int) -> np.ndarray:
    """A mask (8, 8) whose columns cycle through the values."""
    return np.resize(np.array(values, np.uint8), (8, 8))


GREY = np.full((8, 8, 3), 90)


def write_voc(root: Path) -> None:
    for name in "abc":
        write_image(root / f"JPEGImages/{name}.jpg", GREY)
        write_image(root / f"SegmentationClass/{name}.png", stripes(0, 20, 255, 7), palette=True)
        write_image(root / f"SegmentationClassAug/{name}.png", stripes(0, 15))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split, names in {
        "train": "a",
        "trainaug": "a\n/JPEGImages/b.jpg /SegmentationClassAug/b.png\n",
        "val": "c",
    }.items():
        (lists / f"{split}.txt").write_text(names)


def write_ade20k(root: Path) -> None:
    for name in ("training/a", "training/b", "validation/c"):
        write_image(root / f"images/{name}.jpg", GREY)
        write_image(root / f"annotations/{name}.png", stripes(0, 1, 150, 2))
    rows = [f"{n}\t0.1\t{n}\t7\tthing {n}, alias\n" for n in range(1, 151)]
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))


def write_coco(root: Path) -> None:
    """Both kinds of annotations; one panoptic id needs more than 16 bits."""
    names = {1: "person", 2: "vehicle", 17: "animal", 92: "textile", 149: "ground", 183: "other"}
    categories = [{"id": i, "supercategory": n, "isthing": i < 92} for i, n in names.items()]
    segments, folder = {70000: 1, 300: 2, 5: 17, 6: 149}, root / "annotations"
    info = [{"id": i, "category_id": category} for i, category in segments.items()]
    pixels = [[i % 256, i // 256 % 256, i // 65536] for i in [*segments, 0]]
    pixels = np.resize(np.array(pixels, np.uint8), (8, 8, 3))
    for split, count in {"train2017": 20, "val2017": 1}.items():
        files = [f"{split}{n}" for n in range(count)]
        for file in files:
            write_image(root / split / f"{file}.jpg", GREY)
            write_image(folder / f"panoptic_{split}/{file}.png", pixels)
            write_image(folder / f"stuff_{split}_pixelmaps/{file}.png", stripes(0, 92, 149, 183))
        annotations = [{"file_name": f"{file}.png", "segments_info": info} for file in files]
        content = {"categories": categories, "annotations": annotations}
        (folder / f"panoptic_{split}.json").write_text(json.dumps(content))
    (folder / "stuff_val2017.json").write_text(json.dumps({"categories": categories[3:]}))


def write_folder(root: Path) -> None:
    """Two colours, classes 0 and 3, left and right of a border that differs between images."""
    rng = np.random.default_rng(0)
    for name in [f"{split}/images/{n}.png" for split in ("train", "val") for n in range(4)]:
        mask = np.where(np.arange(56) < rng.integers(14, 42), 0, np.full((56, 56), 3))
        image = np.where(mask[..., None] == 3, [220, 40, 40], [40, 40, 220])
        mask[:2] = 255
        write_image(root / name, image + rng.integers(-30, 30, image.shape))
        write_image(root / name.replace("images", "masks"), mask)


# How to write it, its number of classes, items to learn from and to predict, the classes in the
# first row of the first and the last mask, and those that occur in the masks to predict.
VOC = ["background", "car", "tvmonitor"]
LAYOUTS = {
    "voc": (write_voc, 21, 2, 1, [0, 15, 0], [0, 20, 255, 7], VOC),
    "ade20k": (write_ade20k, 150, 2, 1, *[[255, 0, 149]] * 2, ["thing 1", "thing 2", "thing 150"]),
    "coco-things": (write_coco, 3, 20, 1, *[[1, 2, 0, 255]] * 2, ["animal", "person", "vehicle"]),
    "coco-stuff": (write_coco, 2, 20, 1, *[[255, 1, 0, 255]] * 2, ["ground", "textile"]),
    "folder": (write_folder, 2, 4, 4, [255, 255], [255, 255], ["class 0", "class 3"]),
}


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run the command line on tmp_path/data; return status, results.json, stdout and stderr."""

    def run(*flags: str) -> tuple[int, dict, str, str]:
        argv = f"--data {tmp_path}/data --backbone tiny --size 56 --workers 0 --epochs 1".split()
        try:
            status = eval_seg.main([*argv, "--out", f"{tmp_path}/out", *flags])
        except SystemExit as stop:
            status = stop.code
        file = tmp_path / "out/results.json"
        return status, json.loads(file.read_text()) if file.exists() else {}, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_listed_and_evaluated(tmp_path, evaluate, name):
    write, *counts, first, last, labels = LAYOUTS[name]
    write(tmp_path / "data")
    train, val, classes = eval_seg.load_dataset(name, tmp_path / "data")
    assert [len(classes), len(train), len(val)] == counts
    assert not {image for image, *_ in train} & {image for image, *_ in val}
    for (image, mask, values), expected in ((train[0], first), (val[-1], last)):
        assert image.stem == mask.stem
        assert eval_seg.read_mask(mask, values)[0, : len(expected)].tolist() == expected

    status, results, out, _ = evaluate("--dataset", name, "--pictures", "1")
    assert status == 0 and f"{counts[0]} classes, {counts[1]} images" in out
    for method in eval_seg.PROTOCOLS:
        scores = results[method]["none"]
        assert list(scores) == [*labels, "mIoU"]
        assert scores.pop("mIoU") == pytest.approx(sum(scores.values()) / len(scores))
    assert "trainaug" not in out
    picture = Image.open(tmp_path / "out/picture.png").convert("RGB")
    assert picture.size == (4 * 286 + 6, 24 + 292 + 24)
    legend = {picture.getpixel((14 + 140 * n, 326)) for n in range(len(labels))}
    assert len(legend) == len(labels) and (255, 255, 255) not in legend


@pytest.mark.parametrize("name", ["ade20k", "coco-things", "coco-stuff"])
def test_a_folder_of_masks_is_listed_once(tmp_path, monkeypatch, name):
    LAYOUTS[name][0](tmp_path)
    monkeypatch.setattr(Path, "stat", lambda path: None)  # not of every file
    listings = [spy(how, monkeypatch.setattr, Path) for how in ("iterdir", "glob")]
    eval_seg.load_dataset(name, tmp_path)
    assert sum(map(len, listings)) <= 2  # for 20 images


def test_voc_without_trainaug_says_what_is_missing(tmp_path, capsys):
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").unlink()
    train, *_ = eval_seg.load_dataset("voc", tmp_path)
    assert [mask.parent.name for _, mask, _ in train] == ["SegmentationClass"]
    out = capsys.readouterr().out
    assert all(word in out for word in ("1,464", "SBD", "SegmentationClassAug.zip", "trainaug.txt"))


def test_masks_and_images_stay_in_step_through_random_crops(tmp_path):
    """Pixels hold their coordinates, in image and mask: after any crop they must agree."""
    y, x = np.mgrid[:120, :100]
    write_image(tmp_path / "image.png", np.stack([2 * x, 2 * y, 0 * x], -1))
    lefts, item = set(), (tmp_path / "image.png", tmp_path / "mask.png", {n: n for n in range(256)})
    for axis, pixels in enumerate((y, x), 1):
        write_image(tmp_path / "mask.png", pixels)
        images, masks = eval_seg.read_batch([item], 80, 60, crop=False)
        assert images.shape == (1, 3, 80, 80) and images[0, 2 - axis].max() >= 2 * pixels.max() - 2
        rows = (np.arange(60) + 0.5) * (pixels.max() + 1) / 60  # the nearest of the whole mask
        assert masks[0].unique().tolist() == rows.astype(int).tolist()
        torch.manual_seed(3)
        images, masks = eval_seg.read_batch([item] * 16, 80, 80, crop=True)
        assert (images[:, 2 - axis] / 2 - masks).abs().max() < 1.6
    lefts = [(mask[0, 0].item(), mask[0, -1].item()) for mask in masks.int()]
    assert any(a > b for a, b in lefts) and any(a < b for a, b in lefts)  # flipped and not
    assert len(set(lefts)) > 8 and all(abs(a - b) >= 0.68 * 100 for a, b in lefts)  # all large


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_those_of_normalised_images_in_evaluation_mode(precision):
    images = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    features = eval_seg.features_of(MeanColour().train(), images, precision)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert features.shape == (1, 3, 2, 2) and features.dtype == torch.float32
    assert features[0, :, 0, 1].tolist() == pytest.approx(expected, rel=0.01)


def test_iou_against_a_slow_count():
    rng = np.random.default_rng(0)
    masks, predictions = rng.integers(0, 4, (2, 3, 20, 20))
    masks[masks == 3] = 255
    predictions[predictions == 3] = 4  # class 4 is predicted and never true; class 3 is neither
    batches = [(torch.tensor(predictions[i:][:2]), torch.tensor(masks[i:][:2])) for i in (0, 2)]
    expected = {}
    for n, name in enumerate("abc"):
        true, predicted = masks == n, (predictions == n) & (masks != 255)
        expected[name] = 100 * (true & predicted).sum() / (true | predicted).sum()
    expected["mIoU"] = sum(expected.values()) / 3
    found = eval_seg.evaluate(lambda features: features, batches, list("abcde"))
    assert found == pytest.approx(expected)


class LargestResult(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("n, chunk", [(30, 64), (64, 64), (77, 8), (5000, 600), (5000, 2**14)])
def test_search_finds_the_neighbours_of_a_full_sort(n, chunk):
    generator = torch.Generator().manual_seed(n)
    memory, queries = (torch.randn(rows, 8, generator=generator) for rows in (n, 70))
    memory[n // 2 :] *= 1.5  # the best lie crowded
    with LargestResult() as largest:
        values, indices = eval_seg.search(queries, memory, 30, chunk)
    order = (queries @ memory.T).sort(descending=True)
    torch.testing.assert_close(values, order.values[:, :30])
    assert torch.equal(indices, order.indices[:, :30])
    assert largest.elements <= max(70 * (chunk + 60), memory.numel())  # never all products


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
    assert sorted(chosen.tolist()) == [0, 2]


def learn(method: str, train: list, size: int, **more):
    """What a protocol learns from items by MeanColour, for two classes."""
    args = dict(dataset="folder", memory=10**6, seed=0, epochs=1, workers=0, precision="fp32")
    args = argparse.Namespace(**args | {"device": "cpu"} | more)
    return eval_seg.PROTOCOLS[method][0](MeanColour(), train, 2, size, args)


def test_memory_is_bounded_and_drawn_by_the_seed(tmp_path):
    write_folder(tmp_path)
    train, *_ = eval_seg.load_dataset("folder", tmp_path)
    found = [learn("in-context", train, 56, memory=30, seed=seed) for seed in (0, 0, 1)]
    one, same, other = (predict.keywords["memory"] for predict in found)
    assert one.shape == (4 * 7, 3) and torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_is_not_held_twice():
    def resident(field):
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1e3

    batches = ((torch.randn(2, 1024, 8, 8), torch.zeros(2, 32, 32)) for _ in range(120))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    features, _ = eval_seg.collect_patches(batches, 240, 2, 10**6)
    assert features.numel() * 4 / 1e6 == pytest.approx(63, abs=1)
    assert resident("VmHWM") - before < 90


def test_in_context_against_a_plain_loop_over_neighbours(tmp_path):
    """Memory, neighbours, votes and pixels, counted one by one in plain NumPy."""
    rng, side, k = np.random.default_rng(1), 8, 30
    for name in [f"{split}/images/{n}.png" for split in ("train", "val") for n in range(3)]:
        image = rng.integers(0, 256, (16, 16, 3)).repeat(2, 0).repeat(2, 1)
        mask = np.where(image[..., 0] > 128, 1, 0)
        mask[rng.random(mask.shape) < 0.4] = 255
        mask[:8, :16] = 255  # eight patches without a label
        write_image(tmp_path / name, image)
        write_image(tmp_path / name.replace("images", "masks"), mask)
    train, val, _ = eval_seg.load_dataset("folder", tmp_path)

    def read(item):
        image = (np.asarray(Image.open(item[0])) / 255 - neco.MEAN) / neco.STD
        cells = image.reshape(side, 4, side, 4, 3).mean((1, 3)).reshape(-1, 3)
        parts = np.asarray(Image.open(item[1])).reshape(side, 4, side, 4).swapaxes(1, 2)
        return cells / np.linalg.norm(cells, axis=1, keepdims=True), parts.reshape(-1, 16)

    memory, labels, expected = [], [], []
    for item in train:
        for cell, part in zip(*read(item), strict=True):
            part = part[part != 255]
            if len(part):
                memory.append(cell)
                labels.append([(part == 0).mean(), (part == 1).mean()])
    for item in val:
        votes = []
        for cell in read(item)[0]:
            similarity = np.array([cell @ other for other in memory])
            nearest = np.argsort(-similarity)[:k]
            weights = np.exp(similarity[nearest] / 0.02)
            votes.append((weights / weights.sum()) @ np.array(labels)[nearest])
        votes = torch.tensor(np.array(votes)).T.view(1, 2, side, side)
        expected.append(F.interpolate(votes, (32, 32), mode="bilinear")[0].argmax(0))

    predict = learn("in-context", train, 32)
    args = argparse.Namespace(workers=0, precision="fp32")
    ((features, _),) = eval_seg.patch_features(MeanColour(), val, 32, 32, "", args)
    found = torch.stack([*predict(features)])
    assert (found == torch.stack(expected)).float().mean() > 0.999  # but for ties


@pytest.mark.parametrize("steps", [1, 4, 5, 7, 25])
def test_sgd_probe_against_a_plain_loop(steps):
    generator = torch.Generator().manual_seed(steps)
    features = torch.randn(steps, 2, 3, 4, 4, generator=generator)
    masks = torch.randint(4, (steps, 2, 4, 4), generator=generator)
    masks[masks == 3] = 255
    probe = torch.nn.Conv2d(3, 3, 1)
    weight, bias = probe.weight[:, :, 0, 0].detach().double(), probe.bias.detach().double()
    eval_seg.train_probe(probe, zip(features, masks), steps)
    slow, slow_bias = torch.zeros(3, 3).double(), torch.zeros(3).double()  # the momentum
    for step, (x, y) in enumerate(zip(features.movedim(2, -1).double(), masks)):
        x, y = x[y != 255], y[y != 255]
        error = ((x @ weight.T + bias).softmax(1) - F.one_hot(y, 3)) / len(y)
        slow = 0.9 * slow + error.T @ x + 1e-4 * weight
        slow_bias = 0.9 * slow_bias + error.sum(0) + 1e-4 * bias
        rate = 0.01 if step < 0.8 * steps else 0.001
        weight, bias = weight - rate * slow, bias - rate * slow_bias
    torch.testing.assert_close(probe.weight[:, :, 0, 0].double(), weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(probe.bias.double(), bias, rtol=0, atol=1e-6)


def test_solved_probe_leaves_nothing_to_learn():
    """The gradient vanishes at its end, and scale and shift of the features do not matter."""
    generator = torch.Generator().manual_seed(0)
    x, mix = (torch.randn(*shape, generator=generator) for shape in ((20_000, 12), (12, 12)))
    x, scores = x @ mix, []  # correlated, so that it takes many iterations
    labels = (x[:, :3] + 2 * x[:, 3:6]).softmax(1).round(decimals=1)
    for seen in (x, x * torch.logspace(-3, 2, 12) + torch.arange(12)):
        layer = torch.nn.Conv2d(12, 3, 1)
        eval_seg.solve_probe(layer, seen, labels)
        scores.append(layer(seen[:, :, None, None])[:, :, 0, 0].softmax(1))
    gradient = x.T @ (labels.sum(1, keepdim=True) * scores[0] - labels) / len(x)
    assert gradient.abs().max() < 1e-4
    torch.testing.assert_close(*scores, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dataset", ["folder", "voc"])
def test_probe_reads_upsampled_features(tmp_path, dataset, monkeypatch):
    write_folder(tmp_path)
    train, *_ = eval_seg.load_dataset("folder", tmp_path)
    made, conv = [], torch.nn.Conv2d
    monkeypatch.setattr(
        torch.nn, "Conv2d", lambda *sizes, **more: made.append(conv(*sizes)) or made[0]
    )
    predict = learn("linear", train, 56, dataset=dataset)
    features = torch.randn(2, 3, 7, 7)
    scores = made[0](F.interpolate(features, (100, 100), mode="bilinear"))
    assert (predict(features) == scores.argmax(1)).float().mean() > 0.999  # but for ties


def test_train_is_learned_from_and_val_is_only_predicted(tmp_path, evaluate, monkeypatch):
    read, original = [], eval_seg.patch_features

    def note(backbone, items, size, mask_size, label, args, crop=False):
        read.append((len(items), items[0][0].parent.name, size, mask_size, crop))
        return original(backbone, items, size, mask_size, label, args, crop)

    monkeypatch.setattr(eval_seg, "patch_features", note)
    write_coco(tmp_path / "data")
    evaluate("--dataset", "coco-stuff", "--epochs", "2", "--pictures", "0")
    in_context = [(20, "train2017", 56, 56, False), (1, "val2017", 56, 56, False)]
    epoch = (2, "train2017", 56, 100, True)  # a tenth of the images, at random
    assert read == [*in_context, epoch, epoch, (1, "val2017", 56, 100, False)]


def test_feature_colours_follow_the_main_directions_of_variance():
    features = torch.zeros(2, 5, 3, 3)
    features[1, 2], features[:, 4, 0] = 9.0, 1.0  # image against image; first row against others
    colours = eval_seg.feature_colours(features).int()
    assert (colours[0, 0] - colours[1, 0]).abs().min() >= 254
    assert (colours[:, 1, 0] - colours[:, 1, 1]).abs().min() >= 254
    assert torch.equal(colours[:, 1, 1], colours[:, 1, 2])


def test_defaults_are_those_of_the_protocols(monkeypatch):
    monkeypatch.setattr(eval_seg, "compare", vars)
    args = eval_seg.main(["--data", "here"])
    assert (args["memory"], args["epochs"], args["size"]) == (10_240_000, 25, None)
    sizes = {name: sizes for name, (_, *sizes) in eval_seg.PROTOCOLS.items()}
    assert sizes == {"in-context": [518, None], "linear": [448, 100]}
    assert eval_seg.retrieve.__defaults__ == (30, 0.02)


def test_classes_have_colours_of_their_own():
    colours = np.array([eval_seg.colour(n) for n in range(150)])
    apart = np.abs(colours[:, None] - colours).sum(-1)
    assert apart[~np.eye(150, dtype=bool)].min() > 4
    assert np.diagonal(apart, 1).min() > 100  # neighbours


def test_similarity_is_to_the_middle_patch_of_this_map_and_in_the_next():
    maps = normal(3, 5, 4, 6).float()
    here, there = eval_seg.similarities(maps)
    for n in range(3):
        both = torch.stack([maps[n], maps[(n + 1) % 3]]).movedim(1, -1)
        cosines = F.cosine_similarity(both, maps[n, :, 2, 3], dim=-1)
        expected = (cosines - cosines.min()) / (1 - cosines.min())
        assert_close([here[n], there[n]], [*expected])
    assert (here[:, 2, 3] > 0.999).all()
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    cold, hot = (eval_seg.heat(torch.full((2, 2), x), image) for x in (0.0, 1.0))
    assert cold.max() == 0 and hot.min() == 178


def test_photographs_without_masks_become_a_picture(tmp_path, evaluate):
    for n, (width, height) in enumerate([(90, 60), (60, 90), (900, 3), (50, 50), (64, 64)]):
        write_image(tmp_path / f"data/deep/{n}.jpg", np.full((height, width, 3), 40 * n))
    old = write_image(tmp_path / "out/results.json", b"{}")
    weights = str(tmp_path / "other.pth")
    torch.save(neco.load_backbone("tiny").model.state_dict(), weights)
    status, results, out, _ = evaluate("--weights", "none", weights, "--pictures", "3")
    assert status == 0 and not results and not (tmp_path / "out/results.json").exists(), old
    picture = Image.open(tmp_path / "out/picture.png").convert("L")
    assert picture.size == (7 * 286 + 6, 24 + 3 * 286 + 6)
    middles = [picture.getpixel((146, 24 + 146 + 286 * row)) for row in range(3)]
    assert np.abs(np.array(middles) - [0, 40, 120]).max() < 3  # spread over the folder


def test_results_of_the_first_method_outlive_the_second(tmp_path, evaluate, monkeypatch):
    write_folder(tmp_path / "data")
    monkeypatch.setattr(eval_seg, "solve_probe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert "in-context" in results and "linear" not in results


def test_two_weights_end_to_end(tmp_path, evaluate):
    write_folder(tmp_path / "data")
    weights = str(tmp_path / "other.pth")
    torch.save(neco.load_backbone("tiny").model.state_dict(), weights)
    status, results, out, _ = evaluate("--weights", "none", weights, "--pictures", "2")
    assert status == 0
    table = [re.sub(r"[ (]+", " ", line) for line in out.splitlines()]
    for method in eval_seg.PROTOCOLS:
        none, other = (results[method][name]["mIoU"] for name in ("none", weights))
        assert f"mIoU {none:.2f} +0.00) {other:.2f} {other - none:+.2f})" in table
        assert none > 70  # two plain colours
    assert Image.open(tmp_path / "out/picture.png").size == (6 * 286 + 6, 24 + 2 * 286 + 6 + 24)

    command = [sys.executable, eval_seg.__file__, "--data", tmp_path / "data", "--backbone", "tiny"]
    command += ["--weights", weights, "--size", "56", "--workers", "1", "--out", tmp_path]
    subprocess.run(command, check=True)  # alone, the second gets the same figures
    again = json.loads((tmp_path / "results.json").read_text())
    assert all(again[method][weights] == results[method][weights] for method in eval_seg.PROTOCOLS)


FOUR = [f"masks/{n}.png" for n in range(4)]
BLANK, BINARY = np.full((56, 56), 255), np.eye(56) * 255
ALL = [f"{split}/{mask}" for split in ("train", "val") for mask in FOUR]
REFUSALS = [  # layout, files in place of others (None for none), flags, words of the last line
    ("folder", {}, "--data", "--data"),
    ("folder", {}, "--data gone", "gone/train/images is missing"),
    ("folder", {}, "--dataset voc", "Segmentation/train.txt is missing.*VOCtrainval"),
    ("folder", {}, "--dataset imagenet", "--dataset.*imagenet"),
    ("folder", {"val/masks/0.png": None}, "", "data/val/masks/0.png"),
    ("folder", {f"train/images/{n}.png": None for n in range(4)}, "", "data has no images"),
    ("folder", {"val/masks/1.png": stripes(0, 3)}, "", "val/images/1.png.*differ in size"),
    ("folder", {"val/masks/1.png": GREY}, "", "val/masks/1.png holds .*RGB"),
    ("folder", {"val/masks/1.png": np.ones((56, 56, 4))}, "", "val/masks/1.png holds 65793.*RGB"),
    ("folder", {"val/masks/1.png": np.ones((56, 56, 2))}, "", "val/masks/1.png cannot be read"),
    ("folder", {"val/masks/2.png": b"nothing"}, "", "val/masks/2.png cannot be read"),
    ("folder", {"val/images/3.png": b"nothing"}, "", "val/images/3.png cannot be read"),
    ("folder", {"val/images/3.png": b""}, "--workers 1", "error: [^:]*val/images/3.png"),
    ("folder", {f"train/{mask}": BLANK for mask in FOUR}, "", "training masks hold no labelled"),
    ("folder", {f"val/{mask}": BLANK for mask in FOUR}, "", "validation masks hold no labelled"),
    ("folder", {mask: BINARY for mask in ALL}, "", "classes .0.; 255 means no label"),
    ("folder", {mask: BLANK for mask in ALL}, "", "classes ..; 255 means no label"),
    ("folder", {}, "--size 57", "--size 57.*14"),
    ("folder", {}, "--size 0", "--size.* 0 "),
    ("folder", {}, "--memory 0", "--memory.* 0 "),
    ("folder", {}, "--epochs -1", "--epochs.* -1 "),
    ("folder", {}, "--pictures -1", "--pictures.* -1 "),
    ("folder", {}, "--weights none gone.pth", "--weights gone.pth"),
    ("folder", {}, "--weights {root}/nan.pth", "--weights.*not finite"),
    ("folder", {}, "--backbone resnet", "--backbone resnet"),
    ("folder", {"file": b""}, "--out {root}/file", "data/file"),
    ("folder", {}, "--data {root}/val/masks --pictures 0", "neither train and val, nor"),
    ("voc", {}, "--dataset folder --data {root}/ImageSets", "neither train and val, nor"),
    ("voc", {"SegmentationClass/c.png": stripes(0, 33)}, "", "SegmentationClass/c.png holds 33"),
    ("voc", {"JPEGImages/c.jpg": None}, "", "JPEGImages/c.jpg is missing.*VOCtrainval"),
    ("voc", {"SegmentationClass/c.png": None}, "", "Class/c.png is missing.*VOCtrainval"),
    ("voc", {"ImageSets/Segmentation/val.txt": b""}, "", "data has no images"),
    ("ade20k", {"objectInfo150.txt": None}, "", "objectInfo150.txt is missing.*ADEChallengeData"),
    ("coco-things", {"val2017/val20170.jpg": None}, "", "val20170.jpg is missing.*val2017.zip"),
    ("coco-things", {"annotations/panoptic_val2017.json": None}, "", "missing.*panoptic_annot"),
    ("coco-things", {"annotations/panoptic_val2017.json": b'{"a'}, "", "val2017.json is cut off"),
    ("coco-things", {"annotations/panoptic_val2017.json": b"{}"}, "", "val2017.json.*'categories'"),
    ("coco-stuff", {"annotations/stuff_val2017.json": None}, "", "missing.*stuff_annotations"),
    ("coco-stuff", {"annotations/stuff_val2017.json": b"[]"}, "", "stuff_val2017.json.*TypeError"),
]


@pytest.mark.parametrize("layout, files, flags, words", REFUSALS, ids=[row[3] for row in REFUSALS])
def test_bad_input_is_one_sentence_and_status_2(tmp_path, evaluate, layout, files, flags, words):
    root = tmp_path / "data"
    LAYOUTS[layout][0](root)
    for path, content in files.items():
        (root / path).unlink() if content is None else write_image(root / path, content)
    state = {name: value * math.nan for name, value in neco.TinyViT().state_dict().items()}
    torch.save(state, root / "nan.pth")
    status, results, _, err = evaluate("--dataset", layout, *flags.format(root=root).split())
    last = err.strip().splitlines()[-1]
    assert status == 2 and not results
    assert last.startswith("eval_seg.py: error: ") and re.search(words, last), last
