"""The training transform: a benchmark's augmentation in front of a backbone's preprocessing."""

from __future__ import annotations

from cl_adapters.backbones.preprocessing import Preprocessing, Transform
from cl_adapters.benchmarks.base import Augmentation


def train_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Transform:
    """From one decoded image to float32 [C, H, W], with random changes from torch's global generator."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    if augmentation.kind == "none":
        return preprocessing.eval_transform()
    size = preprocessing.input_size[1:]
    bilinear = InterpolationMode.BILINEAR
    if augmentation.kind == "crop":
        steps = [transforms.RandomResizedCrop(size, scale=augmentation.scale, interpolation=bilinear)]
    else:
        shift = (augmentation.translate, augmentation.translate)
        affine = transforms.RandomAffine(augmentation.degrees, shift, augmentation.scale, interpolation=bilinear)
        steps = [transforms.Resize(size, interpolation=InterpolationMode(preprocessing.interpolation)), affine]
    flip = [transforms.RandomHorizontalFlip()] if augmentation.flip else []
    transform: Transform = transforms.Compose(
        [*preprocessing.image_steps(), *steps, *flip, *preprocessing.tensor_steps()]
    )
    return transform
