"""MRNet against torchvision's own AlexNet and against closed forms."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torchvision.models import alexnet

from model import MRNet
from mrnet.networks.backbones import BACKBONES, space_to_depth_convolution
from mrnet.networks.receptive_fields import upsample_maps


def articles_forward(model, x):
    """The article's forward, written out with plain eager modules on three channels."""
    maps = x.squeeze(0)
    for layer in model.pretrained_model:
        maps = layer(maps)
    slices = nn.functional.adaptive_avg_pool2d(maps, 1).view(maps.shape[0], -1)
    return model.classifier(torch.max(slices, 0, keepdim=True)[0])


def gradients(model, logit):
    model.zero_grad()
    logit.sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("size", [(256, 256), (63, 63), (64, 70), (113, 112), (99, 257)])
@pytest.mark.parametrize("slices", [1, 5])
def test_one_channel_is_three_equal_channels(size, slices):
    # In float64: at a kink of ReLU or maximum, rounding in fp32 may send a gradient elsewhere.
    torch.manual_seed(0)
    model = MRNet().double()
    grey = torch.randn(1, slices, 1, *size, dtype=torch.float64)
    wanted = articles_forward(model, grey.expand(1, slices, 3, *size))
    wanted_gradients = gradients(model, wanted)
    for x in (grey, grey.expand(1, slices, 3, *size)):
        logit = model(x)
        assert logit.shape == (1, 1)
        torch.testing.assert_close(logit, wanted, atol=1e-12, rtol=1e-10)
        for mine, theirs in zip(gradients(model, logit), wanted_gradients, strict=True):
            assert (mine - theirs).norm() <= 1e-10 * theirs.norm() + 1e-15


def test_one_channel_is_three_equal_channels_in_fp32():
    torch.manual_seed(0)
    model = MRNet()
    brightness = torch.arange(1, 7).view(1, 6, 1, 1, 1)  # slices that differ, as an exam's do
    grey = torch.rand(1, 6, 1, 256, 256) * brightness
    wanted = articles_forward(model, grey.expand(1, 6, 3, 256, 256))
    wanted_gradients = gradients(model, wanted)
    logit = model(grey)
    torch.testing.assert_close(logit, wanted, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(gradients(model, logit), wanted_gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_features_are_torchvisions():
    torch.manual_seed(0)
    reference = alexnet(weights=None).features
    model = MRNet(reference.state_dict())
    x = torch.randn(2, 3, 256, 256)
    maps = model.feature_maps(x)
    assert maps.shape == (2, 256, 7, 7)
    torch.testing.assert_close(maps, reference(x), atol=1e-5, rtol=1e-4)


def test_first_convolution_has_the_article_shape_and_pixel_alignment():
    conv = nn.Conv2d(3, 64, 11, 4, 2)
    x = torch.zeros(1, 1, 256, 256)
    x[0, 0, 0, 0] = 1.0  # a corner: a misplaced border would show here
    x[0, 0, 255, 255] = 1.0
    torch.testing.assert_close(
        space_to_depth_convolution(x, conv), conv(x.expand(1, 3, 256, 256)), atol=1e-6, rtol=1e-5
    )


def test_scripts_do_not_import_torchvision():
    # It takes 170 MB, which the bound on memory leaves no room for.
    code = "import sys, predict, train; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_the_convolutions_of_alexnet():
    model = MRNet()
    assert sum(p.numel() for p in model.parameters()) == 2_469_696 + 256 + 1
    assert model.pretrained_model[0].weight.shape == (64, 3, 11, 11)
    assert not any(p.is_meta for p in model.parameters())


def test_logit_is_a_maximum_over_slices():
    torch.manual_seed(0)
    model = MRNet().eval()
    x = torch.randn(1, 6, 1, 64, 64)
    with torch.inference_mode():
        logit = model(x)
        torch.testing.assert_close(model(x[:, [5, 2, 0, 1, 4, 3]]), logit)  # order of slices
        torch.testing.assert_close(model(torch.cat([x, x[:, :2]], 1)), logit)  # repeated slices
        assert (model(x[:, :1]) - logit).abs() > 1e-6


def test_slices_in_chunks_change_nothing_without_gradient(monkeypatch):
    torch.manual_seed(0)
    model, x = MRNet().eval(), torch.randn(1, 7, 1, 64, 64)
    found, lengths = [], []
    model.pretrained_model.register_forward_pre_hook(lambda _, x: lengths.append(len(x[0])))
    with torch.inference_mode():
        for most in (900e6, 3 * 64 * 64 * BACKBONES["alexnet"].activations):
            monkeypatch.setattr("model.MOST_ACTIVATIONS", most)
            found.append((model(x), *model.heat_maps(x[0])))
    assert lengths == [7, 7, 3, 3, 1, 3, 3, 1]
    for whole, parts in zip(*found, strict=True):
        np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_dropout_only_while_training():
    torch.manual_seed(0)
    model = MRNet(dropout=0.5)
    x = torch.randn(1, 2, 1, 64, 64)
    assert model(x) != model(x)
    model.eval()
    assert model(x) == model(x)


@pytest.mark.parametrize("cells", [(7, 7), (3, 2), (2, 4), (1, 1)])
def test_enlarged_maps_are_numpys_interpolation_between_the_centres_of_cells(cells):
    # Cell i of a row or column lies at 31 + 32 i px; NumPy keeps the outer values beyond the ends.
    maps = np.random.default_rng(0).standard_normal((2, *cells)).astype(np.float32)
    wanted = maps
    for axis, side in ((1, 230), (2, 256)):
        centres = 31 + 32 * np.arange(maps.shape[axis])
        wanted = np.apply_along_axis(
            lambda row, at=centres, n=side: np.interp(np.arange(n), at, row), axis, wanted
        )
    np.testing.assert_allclose(upsample_maps(maps, 230, 256, "alexnet"), wanted, atol=1e-4)
