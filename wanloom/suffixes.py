"""Which files are media, by their suffixes; what a file holds, only decoding tells."""

from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("mp4", "m4v", "mov", "mkv", "webm", "avi", "wmv", "asf", "flv", "f4v", "mpg", "mpeg", "m2v", "mpe", "ts"),
        *("mts", "m2ts", "vob", "ogv", "ogg", "3gp", "3g2", "mxf", "gif", "y4m", "h264", "264", "h265", "265", "hevc"),
        *("ivf", "obu", "av1", "nut", "dv", "divx", "rm", "rmvb", "mjpeg", "mjpg"),
    )
)
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".tga"))


def kind_of(name: str) -> str | None:
    """ "video", "image" or None for a file that is no media, by its suffix."""
    suffix = Path(name).suffix.lower()
    return "video" if suffix in VIDEO_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else None
