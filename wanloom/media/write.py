"""Frames to files: H.264 in mp4, PNG pictures and contact sheets.

In: frames `(F, H, W, 3)` uint8 RGB, tensor or array. Out: a whole file or none: written beside its place and renamed.
The one decision: what every browser plays and every machine repeats: yuv420p in BT.709 limited range, tagged so; the
index in front; a fixed number of encoder threads, since x264's bytes depend on it.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import ColorRange
from PIL import Image

from wanloom.files import written

if TYPE_CHECKING:  # arrays are written without torch
    from torch import Tensor

# crf 16 is visually lossless, the default 23 smears small moving things. Without mbtree: at some widths (32, 160) it
# reads memory that nobody wrote, and the same frames give other bytes.
ENCODER = {"crf": "16", "preset": "medium", "x264-params": "mbtree=0"}
ENCODER_THREADS = 4
BT709 = 1  # the code of primaries, transfer and matrix in ITU-T H.273
SHEET_FRAMES = 8
SHEET_COLUMNS = 4
SHEET_WIDTHS = (128, 320)  # pixels of one picture: smaller ones are enlarged, larger ones reduced
SHEET_GAP = 4


def write_mp4(path: Path, frames: "Tensor | np.ndarray", fps: int) -> None:
    """Raises ValueError for an odd height or width, which 4:2:0 colour cannot hold."""
    pictures = _to_array(frames)
    _, height, width, _ = pictures.shape
    if height % 2 or width % 2:
        raise ValueError(f"{width}x{height} pixels: H.264 with 4:2:0 colour needs even sizes")
    options = {"movflags": "+faststart"}
    # a whole path: `12:30.mp4` alone would be taken for an address
    with written(path) as temporary, av.open(temporary.absolute(), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=fps, options=ENCODER)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = ENCODER_THREADS
        stream.codec_context.color_primaries = stream.codec_context.color_trc = BT709
        stream.codec_context.colorspace, stream.codec_context.color_range = BT709, ColorRange.MPEG
        for picture in pictures:
            rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_mp4(path: Path) -> np.ndarray:
    """Every frame of a file as it is stored: `(F, H, W, 3)` uint8 RGB."""
    with av.open(path.absolute(), options={"protocol_whitelist": "file"}) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_png(path: Path, picture: "Tensor | np.ndarray") -> None:
    """One picture `(H, W, 3)` uint8."""
    with written(path) as temporary:
        Image.fromarray(_to_array(picture)).save(temporary, format="PNG")


def write_sheet(path: Path, frames: "Tensor | np.ndarray") -> None:
    """A contact sheet: up to 8 frames from the first to the last, in reading order."""
    pictures = _to_array(frames)
    count = min(SHEET_FRAMES, len(pictures))
    chosen = np.linspace(0, len(pictures) - 1, count).round().astype(int)
    cells = [_fit(Image.fromarray(pictures[i])) for i in chosen]
    columns = min(SHEET_COLUMNS, count)
    width, height = cells[0].size
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", ((width + SHEET_GAP) * columns - SHEET_GAP, (height + SHEET_GAP) * rows - SHEET_GAP))
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % columns * (width + SHEET_GAP), i // columns * (height + SHEET_GAP)))
    with written(path) as temporary:
        sheet.save(temporary, format="PNG")


def _fit(picture: Image.Image) -> Image.Image:
    low, high = SHEET_WIDTHS
    width, height = picture.size
    if width < low:  # whole multiples keep the pixels visible as they are
        factor = math.ceil(low / width)
        return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    if width > high:
        return picture.resize((high, max(1, round(height * high / width))), Image.Resampling.LANCZOS)
    return picture


def _to_array(frames: "Tensor | np.ndarray") -> np.ndarray:
    array = frames if isinstance(frames, np.ndarray) else frames.cpu().numpy()
    if array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(f"frames are {array.dtype} {array.shape}, not uint8 RGB")
    return np.ascontiguousarray(array)
