# SPDX-License-Identifier: MIT
"""Time and memory of neco.py: its loss beside diffsort's, its loader, its training step.

    pip install diffsort==0.2.0
    python .ci/bench.py loss loader step                    # small enough for a CPU
    python .ci/bench.py loss --threads 2
    python .ci/bench.py step --backbone dinov2_vits14_reg --global-size 518 --local-size 98
    python .ci/bench.py memory --backbone dinov2_vitl14_reg --global-size 518 --local-size 98

What is compared takes turns in one process, after one call that does not count: medians (smallest
to largest), and the median of the ratios within a turn. Peak memory is that of a process of its
own, above what was there before. With CUDA everything but the loader runs there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import neco  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def seconds(call) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(calls: dict, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            value = 1e3 * seconds(call)
            times[name] += [value] if turn else []
    return times


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1e3


def peak(call) -> float:
    """Peak memory in MB of a call, above what was there before."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


# --------------------------------------------------------------------------------------- loss


def loss_call(way: str, images: int):
    """A call of loss and gradient for 49 patches an image, each with 49 references."""
    torch.manual_seed(0)
    student = torch.randn(images, 49, 256, device=DEVICE, requires_grad=True)
    teacher = student.detach() + 0.5 * torch.randn_like(student)
    references = torch.randn(images, 49, 256, device=DEVICE)
    if way == "diffsort":
        from diffsort import DiffSortNet

        sorter = DiffSortNet("bitonic", 49, str(DEVICE), steepness=100)

    def cosines(features: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize
        return (unit(features, dim=-1) @ unit(references, dim=-1).mT).flatten(0, 1)

    def call() -> tuple[float, torch.Tensor]:
        student.grad = None
        if way == "diffsort":
            p = sorter(cosines(student))[1]
            with torch.no_grad():
                q = sorter(cosines(teacher))[1]
            loss = -(q * p.log()).sum(-1).mean()
        else:
            loss = neco.neco_loss(student, teacher, references)
        loss.backward()
        return loss.item(), student.grad.clone()

    return call


def bench_loss(args: argparse.Namespace) -> None:
    calls = {way: loss_call(way, 64) for way in ("neco.py", "diffsort")}
    (mine, gradient), (other, expected) = (call() for call in calls.values())
    apart = (gradient - expected).abs().max() / expected.abs().max()
    print(f"loss {mine:.6f} and {other:.6f}, gradients {apart:.0e} of the largest apart")
    times = take_turns(calls, args.repeats)
    for way in calls:
        command = [sys.executable, __file__, "--measure", way, "--threads", str(args.threads)]
        memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"loss of 3136 x 49 on {way}: {spread(times[way])} ms, {float(memory):.0f} MB")
    print(f"times as fast: {spread([b / a for a, b in zip(*times.values())])}")


# ------------------------------------------------------------------------------------- loader


def write_images(folder: str, count: int = 16) -> None:
    """640 x 480 JPEGs of noise as smooth as photographs are."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(f"{folder}/{i:02}.jpg", quality=90)


def usual_views(path: str) -> list[torch.Tensor]:
    """Six crops with colours as they are usually written: torchvision on a Pillow image."""
    image = Image.open(path).convert("RGB")
    crops = []
    for size, scale in [(518, (0.25, 1))] * 2 + [(98, (0.05, 0.25))] * 4:
        crop = v2.RandomResizedCrop(size, scale)(image)
        crops.append(v2.functional.pil_to_tensor(neco.change_colours(crop)))
    return crops


def bench_loader(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder)
        paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
        kinds = [(2, 518, (0.25, 1), 0.02), (4, 98, (0.05, 0.25), 0.01)]
        calls = {
            "make_views": lambda: [neco.make_views(neco.read_image(p), kinds) for p in paths],
            "torchvision on Pillow images": lambda: [usual_views(path) for path in paths],
        }
        for name, times in take_turns(calls, args.repeats).items():
            per_image = spread([value / len(paths) for value in times])
            print(f"six crops with colours, one core, {name}: {per_image} ms an image")
        settings = argparse.Namespace(batch_size=len(paths), seed=0)
        views = neco.Views(paths, kinds, settings, slice(0, None))
        options = {"num_workers": args.workers, "sampler": range(12), "batch_size": None}
        batches = iter(torch.utils.data.DataLoader(views, **options))
        next(batches)  # with the start of the workers
        rate = 11 * len(paths) / seconds(lambda: list(batches))
        print(f"DataLoader with {args.workers} workers: {rate:.1f} images a second")
    torch.set_num_threads(args.threads)


# --------------------------------------------------------------------------------------- step


def bench_step(args: argparse.Namespace) -> None:
    flags = ["--data=none", "--steps=100"]
    flags += [f"--{name}={value}" for name in STEP if (value := vars(args)[name])]

    def command(settings: argparse.Namespace) -> int:
        backbone = neco.load_backbone(settings.backbone, settings.hub, settings.weights)
        run, step = neco.Run(backbone, settings), iter(range(100))
        image = torch.randint(256, (3, 480, 640), dtype=torch.uint8)
        kinds = [
            (2, settings.global_size, (0.25, 1.0), 0.02),
            (settings.local_crops, settings.local_size, (0.05, 0.25), 0.01),
        ]
        views = [neco.make_views(image, kinds) for _ in range(settings.batch_size)]
        batch = torch.utils.data.default_collate(views)

        def call() -> float:
            losses = neco.train_step(run, batch, settings, next(step), slice(0, None))
            return losses[0].item()

        memory = peak(call)
        times = take_turns({"step": call}, args.repeats)["step"]
        what = f"{settings.backbone}, {settings.batch_size} images, {settings.precision}"
        print(f"step of {what}: {spread(times)} ms, {memory:.0f} MB")
        return 0

    neco.prepare = command
    neco.main(flags)


# ------------------------------------------------------------------------------------- memory


def bench_memory(args: argparse.Namespace) -> None:
    """Count what autograd keeps of the student's forward pass on 64 images, without computing it.

    Tensors are fake: they have sizes, and no content.
    """
    kind = args.backbone.split("_")[0]
    hub = args.hub or f"facebookresearch/{kind}"
    options = {"drop_path_rate": 0.1} if kind in ("dino", "dinov2") else {}
    source = "local" if os.path.isdir(hub) else "github"
    views = (2, vars(args)["global-size"]), (4, vars(args)["local-size"])
    for precision, half in (("bf16", True), ("fp32", False)):
        storages = {}

        def keep(x: torch.Tensor, storages=storages):
            if not isinstance(x, torch.nn.Parameter):
                storage = x.untyped_storage()
                storages[storage._cdata] = storage
            return x

        model = torch.hub.load(
            hub, args.backbone, source=source, trust_repo=True, pretrained=False, **options
        )
        network = neco.Network(neco.Backbone(model), 2048).train()
        with FakeTensorMode(allow_non_fake_inputs=True):
            crops = [torch.zeros(count, 64, 3, size, size) for count, size in views]
            kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
            with kept, torch.autocast("cpu", torch.bfloat16, enabled=half):
                maps = [network(each) for each in crops]
        size = sum(storage.nbytes() for storage in storages.values()) / 1e9
        print(
            f"{args.backbone}, {len(maps)} kinds of crops of 64 images, {precision}: {size:.1f} GB"
        )


STEP = {"backbone": "tiny", "hub": "", "weights": "", "batch-size": 8}
STEP |= {"global-size": 98, "local-size": 42}
SECTIONS = {"loss": bench_loss, "loader": bench_loader, "step": bench_step}
SECTIONS["memory"] = bench_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS)[:3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    for name, default in STEP.items():
        parser.add_argument(f"--{name}", dest=name, type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        loss_call(args.measure, 1)()  # what is loaded or built once does not count
        print(json.dumps(peak(loss_call(args.measure, 64))))
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else 'CPU'}")
    for section in args.sections:
        SECTIONS[section](args)


if __name__ == "__main__":
    main()
