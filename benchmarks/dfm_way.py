"""How NVIDIA's DFM (and Automodel before its own tool) reads videos: OpenCV, one picture after the other, float32.

Written anew after examples/common/wan/prepare_dataset_wan.py of NVIDIA-NeMo/DFM (6a88f08, `--center-crop`, bilinear, as
its documentation starts it): a whole video becomes a float32 tensor in [0, 1]; single frames are sought one by one.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor


def count_frames(path: Path) -> int:
    """As the header of the file has it."""
    capture = cv2.VideoCapture(str(path))
    number = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return number


def fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A BGR picture as RGB, resized to cover (width, height) `size` and cut in the middle."""
    rgb = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    (width, height), aspect = size, rgb.shape[1] / rgb.shape[0]
    covering = (int(height * aspect), height) if aspect > width / height else (width, int(width / aspect))
    resized = cv2.resize(rgb, covering, interpolation=cv2.INTER_LINEAR)
    left, top = max(0, (covering[0] - width) // 2), max(0, (covering[1] - height) // 2)
    return resized[top : top + height, left : left + width]


def load_video(path: Path, size: tuple[int, int], number: int) -> Tensor:
    """The first `number` pictures as `(1, 3, F, H, W)` float32 in [0, 1]."""
    capture = cv2.VideoCapture(str(path))
    capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
    frames = []
    for _ in range(number):
        there, picture = capture.read()
        if not there:
            break
        frames.append(fit(picture, size).astype(np.float32) / 255.0)
    capture.release()
    return torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)[None]


def load_frames(path: Path, size: tuple[int, int], numbers: list[int]) -> list[np.ndarray]:
    """Pictures by their numbers, `(H, W, 3)` uint8 each."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    for number in numbers:
        capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        there, picture = capture.read()
        if there:
            frames.append(fit(picture, size))
    capture.release()
    return frames


def spread(total: int, number: int) -> list[int]:
    """Numbers of pictures from the first to the last, evenly."""
    return np.linspace(0, total - 1, number, dtype=int).tolist()
