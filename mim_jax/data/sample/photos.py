"""The embedded sample: gray blocks and tiles of the real photographs inside two Python wheels.

scikit-image (0.26) and scikit-learn ship sixteen photographs that load with no network. Each is a class.
The blocks of a photo alternate like a chessboard between the splits, so no pixel is in two of them.
Only gray values are kept: with colours, the mean of a tile nearly tells which photo it is from.
"""

import importlib.util
import os

import numpy as np
from einops import rearrange
from PIL import Image

from mim_jax.data.augment import DataError

PHOTOS = {  # name -> (package, file inside it)
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "immunohistochemistry": ("skimage", "data/ihc.png"),
    "moon": ("skimage", "data/moon.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "stereo_motorcycle": ("skimage", "data/motorcycle_left.png"),
}
NAMES = tuple(PHOTOS)
SPLITS = ("train", "train_tiles", "validation", "test")
BLOCK, TILE = 128, 32  # px
REGION = 512  # px; the centre of larger photos, so that classes stay balanced
MIN_STD = 4.0  # gray levels of 255; flatter pieces are skipped


def load_photo(name):
    """Name -> uint8 [h w]: the gray centre of a photo, sides multiples of BLOCK and at most REGION.

    Raises:
      DataError: the package is not installed, or its version does not bundle the photo.
    """
    package, file = PHOTOS[name]
    spec = importlib.util.find_spec(package)  # finds the files without importing the package
    if spec is None:
        raise DataError(
            "data.source=sample reads photographs bundled with scikit-image and scikit-learn: "
            "pip install scikit-image scikit-learn"
        )
    path = os.path.join(os.path.dirname(spec.origin), file)
    if not os.path.exists(path):
        words = "pip install scikit-image==0.26.0 scikit-learn"
        raise DataError(f"data.source=sample: this version of {package} does not bundle {file!r}: {words}")
    with Image.open(path) as image:
        gray = np.asarray(image.convert("L"))  # ITU-R 601
    h, w = (min(side, REGION) // BLOCK * BLOCK for side in gray.shape)
    y, x = (gray.shape[0] - h) // 2, (gray.shape[1] - w) // 2
    return gray[y : y + h, x : x + w]


def split_of(i, j):
    """Row and column of a block -> the split that owns it; neighbours are never in the same training set."""
    return "train" if (i + j) % 2 == 0 else "test" if i % 2 else "validation"


def pieces(gray, side):
    """uint8 [h w], multiples of side -> uint8 [n side side]: non-overlapping squares, row by row."""
    return rearrange(gray, "(y h) (x w) -> (y x) h w", h=side, w=side)


def load(split):
    """Split -> images uint8 [n h w 1], labels int32 [n] (indices into NAMES), skipped (number of flat pieces).

    "train" gives the training blocks whole (h = w = BLOCK), for random crops; all others give tiles (h = w = TILE).

    Raises:
      DataError: unknown split, or a package that holds the photos is missing.
    """
    if split not in SPLITS:
        raise DataError(f"data.source=sample has no split {split!r}; it has {', '.join(SPLITS)}.")
    owner = "train" if split == "train_tiles" else split
    side = BLOCK if split == "train" else TILE
    images, labels = [], []
    for label, name in enumerate(NAMES):
        gray = load_photo(name)
        columns = gray.shape[1] // BLOCK
        for k, block in enumerate(pieces(gray, BLOCK)):
            if split_of(*divmod(k, columns)) == owner:
                images.append(pieces(block, side))
                labels.append(np.full(len(images[-1]), label, np.int32))
    images, labels = np.concatenate(images), np.concatenate(labels)
    keep = images.std(axis=(1, 2)) >= MIN_STD
    return images[keep, ..., None], labels[keep], int((~keep).sum())
