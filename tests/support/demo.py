"""The demo on few images, for tests."""

from torchquant import demo
from torchquant.data import digit_images
from torchquant.demo import networks
from torchquant.models import load_digits_data

NETWORK_IMAGES = 60
NETWORK_STEPS = 1
NETWORK_CALIBRATION = 2  # batches
NETWORK_VERIFIED = 2  # images


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
