"""What needs a CUDA device: its results are the CPU's, and no step waits for it."""

import contextlib
import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_line_error, run_script, write_exams

from dataloader import MRDataset
from model import POOLINGS, MRNet, MultiPlaneMRNet
from mrnet.errors import InputError
from mrnet.networks import gpu
from mrnet.networks.backbones import BACKBONES, GreyConv2d, im2col_convolution
from mrnet.runtime import devices
from mrnet.training.augmentation import make_augmentation
from mrnet.training.config import Config
from mrnet.training.datasets import MultiPlaneDataset, cache_volumes
from mrnet.training.graphs import as_graphs, use_graphs
from mrnet.training.optimization import make_average, make_optimizer, make_scheduler
from mrnet.training.train_state import TrainState
from train import train_model, training_step

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_where_steps_are_graphs():
    article, strong = Config("acl", "axial"), Config("acl", "axial", augment="strong")
    several = Config("acl", "axial+coronal")
    cycle = Config("acl", "axial", lr_scheduler="one-cycle")
    assert use_graphs(None, article, CUDA, "device") and use_graphs(True, article, CUDA, "device")
    assert not use_graphs(False, article, CUDA, "device")
    for config, device, cached, fault in (
        (article, CPU, "disk", "--cuda-graphs: needs --device cuda and room"),
        (article, CUDA, "disk", "--cuda-graphs: needs --device cuda and room"),
        (strong, CUDA, "device", "--cuda-graphs: not with --augment strong"),
        (several, CUDA, "device", "--cuda-graphs: not with --plane axial coronal"),
        (cycle, CUDA, "device", "--cuda-graphs: not with --lr-scheduler one-cycle"),
    ):
        assert not use_graphs(None, config, device, cached)
        with pytest.raises(InputError, match=fault):
            use_graphs(True, config, device, cached)


def gradients(model, x, device, precision="fp32"):
    """Logits and gradients of one exam, float64 on the CPU, one vector each."""
    model = model.to(device).train()
    model.zero_grad()
    x = {p: v.to(device) for p, v in x.items()} if isinstance(x, dict) else x.to(device)
    with devices.autocast(device, precision):
        logits = model(x)
    logits.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return logits.detach().cpu().double(), gradient.cpu().double()


def features_of(model, x, device, precision):
    """The exam's features, before the classifier, on the CPU."""
    model.to(device)
    with torch.no_grad(), devices.autocast(device, precision):
        return model.exam_features(x.to(device)).cpu()


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@needs_cuda
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_equals_the_cpu(backbone):
    torch.manual_seed(0)
    devices.pick_device("cuda")  # fp32 without TF32
    # In double precision: where a maximum or a rectifier turns over in the last digit of fp32, the
    # gradient of a deep network jumps by more than rounding (on a CPU alone fp32 is 8e-4 from it).
    model, x = MRNet(backbone=backbone).double(), torch.randn(3, 1, 96, 96, dtype=torch.float64)
    if backbone in ("efficientnet_b0", "convnext_tiny"):  # stochastic depth
        model.pretrained_model.requires_grad_(True).eval()
        model.train = lambda mode=True: model
    cpu, gpu = gradients(model, x, CPU), gradients(model, x, CUDA)
    assert distance(gpu[0], cpu[0]) < 1e-8 and distance(gpu[1], cpu[1]) < 1e-8
    gpu = gradients(model.float(), x.float(), CUDA)
    jumps = backbone in ("vgg16", "resnet34")  # 8e-4 and 5e-4 on a CPU, above 1e-3 on a GPU
    assert distance(gpu[0], cpu[0]) < 1e-4 and distance(gpu[1], cpu[1]) < (1e-2 if jumps else 1e-3)


@needs_cuda
@pytest.mark.parametrize("pooling, channels, tasks", itertools.product(POOLINGS, (1, 3), (1, 3)))
def test_every_pooling_equals_the_cpu(pooling, channels, tasks):
    torch.manual_seed(0)
    devices.pick_device("cuda")
    model, x = MRNet(pooling=pooling, tasks=tasks), torch.randn(5, channels, 128, 128)
    cpu, gpu = gradients(model, x, CPU), gradients(model, x, CUDA)
    assert distance(gpu[0], cpu[0]) < 1e-4 and distance(gpu[1], cpu[1]) < 1e-4
    features = features_of(model, x, CUDA, "bf16"), features_of(model, x, CPU, "fp32")
    assert distance(*features) < 2e-2  # a logit may be near zero
    both = MultiPlaneMRNet({plane: MRNet(pooling=pooling) for plane in ("axial", "coronal")})
    x = {"axial": x, "coronal": x.flip(0)}
    cpu, gpu = gradients(both, x, CPU), gradients(both, x, CUDA)
    assert distance(gpu[0], cpu[0]) < 1e-4 and distance(gpu[1], cpu[1]) < 1e-4


@needs_cuda
def test_the_pooling_kernel_is_torchs():
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), SIZES):
        x = torch.randint(-4, 5, shape, device=CUDA).to(dtype)  # many are equal
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        wanted, ours = F.relu(F.max_pool2d(x, 3, 2)), gpu.PoolingFunction.apply(x)
        assert torch.equal(ours, wanted)
        gradient = torch.randn_like(wanted)
        (a,), (b,) = (torch.autograd.grad(y, x, gradient) for y in (ours, wanted))
        assert distance(a.float(), b.float()) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("channels, stride, bias", [(1, 4, True), (3, 4, True), (3, 2, False)])
def test_the_im2col_convolution_is_a_convolution(channels, stride, bias):
    torch.manual_seed(0)
    conv = GreyConv2d(3, 8, 11, stride, 2, bias=bias).double()
    x = torch.randn(2, channels, 70, 65, dtype=torch.float64)
    wanted = F.conv2d(x.expand(-1, 3, -1, -1), conv.weight, conv.bias, stride, 2)
    ours, gradient = im2col_convolution(x, conv), torch.randn_like(wanted)
    torch.testing.assert_close(ours, wanted)
    for a, b in zip(*(torch.autograd.grad(y, list(conv.parameters()), gradient)
                      for y in (ours, wanted)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


@needs_cuda
@pytest.mark.parametrize("augment", ["article", "anatomical", "none"])
def test_every_exam_equals_the_cpus(shared_exams, augment):
    for plane, channels in itertools.product(("axial", "sagittal"), ("grey", "neighbours")):
        exams = MRDataset(shared_exams, "acl", plane, transform=make_augmentation(augment, plane))
        exams.channels, exams.slices = channels, (0.5, 0.5)
        torch.manual_seed(0)
        on_cpu = exams.draw(range(len(exams)))
        torch.manual_seed(0)
        on_gpu = exams.draw(range(len(exams)), CUDA)
        for i in range(len(exams)):
            ours, wanted = exams.exam(i, CUDA, on_gpu[i]), exams.exam(i, CPU, on_cpu[i])
            # The bilinear weights of two float32 grids differ in the last digits.
            assert distance(ours.cpu(), wanted) < 1e-4


SIZES = ((2, 64, 63, 63), (1, 16, 31, 33), (3, 16, 7, 16), (2, 192, 32, 30))
RECIPES = {
    "article": {},
    "best": {"channels": "neighbours", "augment": "anatomical", "optimizer": "adamw",
             "head_lr": 1e-3, "lr_scheduler": "cosine", "warmup": 0.1, "average_weights": 0.9},
    "more": {"pooling": "attention", "slices": 0.5, "clip": 1.0, "accumulate": 5},
    "mean": {"pooling": "mean", "accumulate": 2, "augment": "none", "freeze": 2},
}  # fmt: skip


def trained(exams, name, graphs, precision="fp32", epochs=2, device=CUDA):
    """Losses of each exam, the weights after some epochs, the step and its Config."""
    config = Config("acl", "axial", lr=1e-4, epochs=epochs, cuda_graphs=graphs, precision=precision,
                    device=device.type, **RECIPES[name])  # fmt: skip
    torch.manual_seed(0)
    devices.pick_device(device.type)
    exams.channels, exams.slices = config.channels, (config.slices, config.slices)
    exams.transform = make_augmentation(config.augment, "axial")
    model = MRNet(pooling=config.pooling).to(device)
    optimizer, average = make_optimizer(model, config), make_average(model, config.average_weights)
    scheduler = make_scheduler(config, optimizer, -(-len(exams) // config.accumulate))
    state = TrainState(model, optimizer, scheduler, exams.tasks, average)
    step, losses = partial(training_step, model, optimizer, config), []
    if graphs:
        step = as_graphs(step, model, config)
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        losses.append(train_model(state, step, exams, config)[0][2])
    weights = torch.cat([p.flatten() for p in state.evaluated.parameters()])
    return np.concatenate(losses), weights, step


def capture_without_cuda(self, work, tensors):
    """A graph whose replay computes from the buffers, as one of CUDA would."""
    buffers = [None if value is None else torch.empty_like(value) for value in tensors]
    results = [torch.full((1, 1), torch.nan) for _ in range(2)]

    class Graph:
        def replay(_):
            for result, value in zip(results, work(*buffers), strict=True):
                result.copy_(value)

    return Graph(), buffers, results


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_graph_reads_is_what_an_eager_step_reads(shared_exams, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(gpu.Graphed, "on_capture_stream", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(gpu.Graphed, "capture", capture_without_cuda)
    exams = MRDataset(shared_exams, "acl", "axial")
    wanted, weights, _ = trained(exams, name, graphs=False, device=CPU)
    losses, ours, step = trained(exams, name, graphs=True, device=CPU)
    assert len(step.graphs) > 2
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert distance(ours, weights) < 1e-6
    monkeypatch.setattr(gpu.Graphed, "MOST", 1)  # the rest of the steps are eager
    losses, _, step = trained(exams, name, graphs=True, device=CPU)
    assert len(step.graphs) == 1
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


@needs_cuda
@pytest.mark.parametrize("name", RECIPES)
def test_graphs_equal_eager_steps(shared_exams, name):
    exams = MRDataset(shared_exams, "acl", "axial")
    cache_volumes([exams], "device", CUDA)
    wanted, weights, _ = trained(exams, name, graphs=False)
    losses, ours, step = trained(exams, name, graphs=True)
    assert len(step.graphs) > 2
    np.testing.assert_allclose(losses, wanted, rtol=1e-3, atol=1e-4)
    assert distance(ours, weights) < 1e-4
    assert not np.allclose(losses[:12], losses[12:])  # it learns


@needs_cuda
def test_a_graph_of_every_size_is_captured(tmp_path):
    """Slices of other sizes come after the first captures: no kernel is left to be loaded then."""
    write_exams(tmp_path / "data", size=96)
    for i, side in enumerate((256, 261, 268, 280, 127, 128, 63)):
        path = tmp_path / "data" / "train" / "axial" / f"{i:04d}.npy"
        np.save(path, np.random.default_rng(i).integers(0, 255, (3, side, side), np.uint8))
    exams = MRDataset(tmp_path / "data", "acl", "axial")
    cache_volumes([exams], "device", CUDA)
    wanted = trained(exams, "article", graphs=False)[0]
    losses, _, step = trained(exams, "article", graphs=True)
    assert len(step.graphs) > 7
    np.testing.assert_allclose(losses, wanted, rtol=1e-3, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("graphs", [False, True])
def test_no_step_waits_for_the_gpu(shared_exams, name, graphs):
    exams = MRDataset(shared_exams, "acl", "axial")
    cache_volumes([exams], "device", CUDA)
    step = trained(exams, name, graphs, "bf16")[2]  # everything is captured
    rows = list(range(RECIPES[name].get("accumulate", 1)))
    views, model = exams.draw(rows, CUDA), MRNet().to(CUDA).eval()
    target = torch.ones(1, 1, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in rows:
            is_last = k + 1 == len(rows)
            step(exams, exams.volume(k), views[k], target, target, len(rows), is_last)
        with torch.inference_mode(), devices.autocast(CUDA, "bf16"):
            model(exams.exam(0, CUDA))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_dropout_differs_from_replay_to_replay(shared_exams):
    exams = MRDataset(shared_exams, "acl", "axial")
    cache_volumes([exams], "device", CUDA)
    model = MRNet(dropout=0.5).to(CUDA).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.0, device=CUDA), fused=True,
                                 capturable=True)  # fmt: skip
    config = Config("acl", "axial", device="cuda", cuda_graphs=True)
    step = as_graphs(partial(training_step, model, optimizer, config), model, config)
    one, volume = torch.ones(1, 1, device=CUDA), exams.volume(0)
    views = [exams.draw([0], CUDA)[0] for _ in range(20)]
    logits = [step(exams, volume, view, one, one)[0].item() for view in views]
    assert len(step.graphs) == 1 and len(set(logits[5:])) > 10


@needs_cuda
def test_several_planes_train_on_the_gpu(tmp_path):
    write_exams(tmp_path / "data")
    words = ("--data-dir", tmp_path / "data", "--models-dir", tmp_path / "models", "--logs-dir",
             tmp_path / "logs", "--no-pretrained", "--epochs", "1")  # fmt: skip
    done = run_script("train.py", "--task", "acl", "--plane", "axial", "coronal", *words,
                      "--plane-dropout", "0.3", "--slices", "0.5", "--device", "cuda")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cache      device" in done.stdout
    exams = MultiPlaneDataset(tmp_path / "data", "acl", ["axial", "coronal"])
    exams.slices = (0.5, 0.5)
    view = exams.draw([0, 1], CUDA)[1]
    assert view["axial"].rows.is_cuda


@needs_cuda
def test_no_memory_is_one_line(exams, tmp_path):
    torch.cuda.set_per_process_memory_fraction(0.0005)
    words = ("--data-dir", exams, "--models-dir", tmp_path / "models", "--logs-dir",
             tmp_path / "logs", "--no-pretrained", "--backbone", "vgg16")  # fmt: skip
    try:
        done = run_script("train.py", "--task", "acl", "--plane", "axial", *words, "--device",
                          "cuda", "--cache", "disk")  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_one_line_error(done, "memory", status=1)
