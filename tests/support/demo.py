"""The demo on few images, for tests."""

import pytest

from torchquant import demo
from torchquant.data import digit_images
from torchquant.demo import exactness, networks, training
from torchquant.models import load_digits_data

IMAGES = 80
SAMPLED_ROWS = 16
TRAINING_STEPS = 4
VERIFIED_IMAGES = 5
NETWORK_IMAGES = 60
NETWORK_STEPS = 1
NETWORK_CALIBRATION = 2  # batches
NETWORK_VERIFIED = 2  # images


def run_small_demo():
    """The result of the demo with the numbers above, and its steps."""
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        with_few_images(patch, IMAGES)
        patch.setattr(exactness, "SAMPLED_ROWS", SAMPLED_ROWS)
        patch.setattr(training, "STEPS", TRAINING_STEPS)
        patch.setattr(training, "VERIFIED_IMAGES", VERIFIED_IMAGES)
        result = demo.run_demo(
            isa="scalar",
            threads=1,
            latency_seconds=0,
            on_step=lambda description, done: steps.append((description, done)),
        )
    return result, steps


def with_few_images(patch, images):
    """Patch the demo: ``images`` digits for the transformer, and little work for the networks."""
    data = load_digits_data()
    some = data._replace(
        test_images=data.test_images[:images], test_labels=data.test_labels[:images]
    )
    patch.setattr(demo, "load_digits_data", lambda: some)
    enlarged = digit_images(test_copies=1)
    few = enlarged._replace(
        test_images=enlarged.test_images[:NETWORK_IMAGES],
        test_labels=enlarged.test_labels[:NETWORK_IMAGES],
    )
    patch.setattr(demo, "digit_images", lambda: few)
    patch.setattr(networks, "CALIBRATION_BATCHES", NETWORK_CALIBRATION)
    patch.setattr(networks, "STEPS", NETWORK_STEPS)
    patch.setattr(networks, "VERIFIED_IMAGES", NETWORK_VERIFIED)
