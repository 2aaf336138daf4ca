"""Images for the small networks: digits, photographs, augmentation."""

import builtins
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from torchquant.data import augment, digit_images, load_digits_data, photograph_patches, photographs

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Augmentation


def test_augmentation_follows_from_the_seed_and_stays_in_range():
    first, again, other = (augment(IMAGES, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.shape, first.dtype) == (IMAGES.shape, IMAGES.dtype)
    assert first.min() >= 0
    assert first.max() <= 1


def test_augmentation_leaves_the_images_and_the_global_generator_alone():
    before = IMAGES.clone()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    augment(IMAGES, generator())
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(IMAGES, before)


NONE = {"shift": 0.0, "rotation": 0.0, "contrast": 0.0, "noise": 0.0}


def test_amounts_of_zero_change_nothing():
    torch.testing.assert_close(augment(IMAGES, generator(), **NONE), IMAGES)


@pytest.mark.parametrize("name", list(NONE))
def test_each_amount_alone_changes_each_image(name):
    changed = augment(IMAGES, generator(), **{**NONE, name: 0.2})
    least = 1e-5 if name == "rotation" else 1e-3
    assert bool(((changed - IMAGES).abs().flatten(1).amax(1) > least).all())


def test_a_shift_moves_pixels():
    dot = torch.zeros(64, 1, 32, 32)
    dot[:, :, 16, 16] = 1
    moved = augment(dot, generator(), **{**NONE, "shift": 0.25})
    for axis in (2, 3):
        places = (moved.sum(dim=axis).squeeze(1) * torch.arange(32)).sum(1) - 16
        assert 6 < places.abs().max() <= 8.01
        assert places.min() < -4 < 4 < places.max()


@pytest.mark.parametrize("name", list(NONE))
def test_a_negative_amount_is_refused(name):
    with pytest.raises(ValueError, match=rf"augment: {name} must be at least 0, got -0.1"):
        augment(IMAGES, generator(), **{name: -0.1})


def test_images_of_the_wrong_rank_are_refused():
    with pytest.raises(ValueError, match=r"must be \[n, channels, height, width\], got \[32, 32\]"):
        augment(torch.zeros(32, 32), generator())


# Digits


def test_digits_are_enlarged_and_split_as_before():
    data, small = digit_images(test_copies=0), load_digits_data()
    assert torch.equal(data.train_labels, small.train_labels)
    assert torch.equal(data.test_labels, small.test_labels)
    assert data.classes == tuple("0123456789")
    for large, images in ((data.train_images, small[0]), (data.test_images, small[2])):
        assert large.shape == (len(images), 1, 32, 32)
        shrunk = torch.nn.functional.avg_pool2d(large, 4).squeeze(1)
        assert (shrunk - images).abs().mean() < 0.06, "the same picture"
        assert large.min() >= 0
        assert large.max() <= 1


def test_test_images_are_augmented_copies_and_follow_from_the_seed():
    data = digit_images(test_copies=2)
    assert data.test_images.shape == (900, 1, 32, 32)
    assert torch.equal(data.test_labels[:450], data.test_labels[450:])
    assert not torch.equal(data.test_images[:450], data.test_images[450:])
    assert torch.equal(data.test_images, digit_images(test_copies=2).test_images)
    assert not torch.equal(data.test_images, digit_images(test_copies=2, seed=1).test_images)


def test_colour_digits_are_grey_in_three_channels():
    grey, colour = digit_images(test_copies=0), digit_images(channels=3, test_copies=0)
    assert torch.equal(colour.train_images, grey.train_images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("channels", [0, 2, 4, None])
def test_other_channels_are_refused(channels):
    with pytest.raises(ValueError, match=rf"channels must be 1 \(grey\) or 3 .*, got {channels}"):
        digit_images(channels=channels)


@pytest.mark.parametrize("copies", [-1, 1.5, True])
def test_other_numbers_of_copies_are_refused(copies):
    with pytest.raises(ValueError, match=r"test_copies must be an integer of at least 0, got"):
        digit_images(test_copies=copies)


# Photographs


def pretend(monkeypatch, sizes):
    """Modules in the place of scikit-learn and scikit-image."""
    sklearn, skimage = ModuleType("sklearn.datasets"), ModuleType("skimage.data")
    pixels = {}

    def photograph(name):
        if name not in pixels:
            height, width = sizes
            values = np.arange(height * width * 3) % 251
            pixels[name] = values.reshape(height, width, 3).astype(np.uint8)
        return pixels[name]

    sklearn.load_sample_image = lambda file: photograph(file.removesuffix(".jpg"))
    for name in photographs._SCIKIT_IMAGE:
        setattr(skimage, name, lambda name=name: photograph(name))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", sklearn)
    monkeypatch.setitem(sys.modules, "skimage.data", skimage)


def test_photographs_of_both_packages(monkeypatch):
    pretend(monkeypatch, (200, 330))
    data = photograph_patches(train_patches=3, test_patches=2)
    assert data.classes == ("china", "flower", *photographs._SCIKIT_IMAGE)
    assert data.train_images.shape == (24, 3, 32, 32)
    assert data.test_images.shape == (16, 3, 32, 32)
    assert data.train_labels.tolist() == [label for label in range(8) for _ in range(3)]
    assert data.test_labels.tolist() == [label for label in range(8) for _ in range(2)]
    assert (data.train_images.dtype, data.train_labels.dtype) == (torch.float32, torch.int64)
    assert data.train_images.max() == 250 / 255


def test_no_pixel_is_in_training_and_test():
    # Each pixel of the picture has its own number, exact in fp32.
    picture = torch.arange(256 * 320, dtype=torch.float32).view(1, 256, 320).expand(3, -1, -1)
    kept, held_out = photographs._squares(picture, generator())
    assert (len(kept), len(held_out)) == (15, 5)
    train = photographs._patches(kept, 400, generator(1)).unique()
    test = photographs._patches(held_out, 400, generator(2)).unique()
    assert not set(train.tolist()) & set(test.tolist())
    assert len(train) > 0.8 * 15 * 64 * 64, "patches come from everywhere"
    assert len(test) > 0.8 * 5 * 64 * 64
    patch = photographs._patches(kept, 1, generator())[0, 0]
    assert bool((patch.diff(dim=1) == 1).all()), "a patch is a piece of the picture"
    assert bool((patch.diff(dim=0) == 320).all())


def test_patches_follow_from_the_seed(monkeypatch):
    pretend(monkeypatch, (200, 330))
    first, again, other = (
        photograph_patches(train_patches=4, test_patches=4, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_images, again.test_images)
    assert not torch.equal(first.test_images, other.test_images)


def test_scikit_learn_alone_is_enough(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    data = photograph_patches(train_patches=2, test_patches=2)
    assert data.classes == ("china", "flower")
    assert data.train_images.std() > 0.05


def test_without_photographs_the_error_names_the_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install scikit-learn scikit-image pillow"):
        photograph_patches()


def test_a_missing_decoder_of_images_is_named(monkeypatch):
    pytest.importorskip("sklearn")
    real = builtins.__import__

    def without_pillow(name, *arguments, **options):
        if name.partition(".")[0] == "PIL":
            raise ImportError("no PIL")
        return real(name, *arguments, **options)

    monkeypatch.setitem(sys.modules, "skimage.data", None)
    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .* pillow"):
        photograph_patches()


@pytest.mark.parametrize("name", ["train_patches", "test_patches"])
def test_numbers_of_patches_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} must be an integer of at least 1, got 0"):
        photograph_patches(**{name: 0})
