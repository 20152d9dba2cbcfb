"""What one file may take: a few bytes can ask for gigabytes of memory and hours of decoding.

In: sizes as headers give them, and what was decoded until now. Out: MediaError where a limit is passed. The one
decision: a limit is asked before memory is taken, and counts what leads to one sample, so that a long film passes and a
file that gives nothing ends. Seconds are those of one core, whatever else the machine does.
"""

import time

from pydantic import Field, model_validator

from wanloom.config import Config
from wanloom.media.decoding import MediaError


class LimitsConfig(Config):
    """Far above what cameras, films and editors make."""

    max_pixels: int = Field(
        default=100_000_000, description="of a picture as it is stored; reading one takes 12 to 20 bytes for each"
    )
    max_pictures: int = Field(default=1_000_000, description="to be decoded, or looked through, for one sample")
    max_seconds: float = Field(default=600.0, description="of one core's time for decoding one sample")

    @model_validator(mode="after")
    def _check(self) -> "LimitsConfig":
        for name in ("max_pixels", "max_pictures", "max_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}={getattr(self, name):g}` lets no file pass")
        return self


USUAL = LimitsConfig()


class Budget:
    """What one file has left of the limits; `renew` gives all of it back for the next sample."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.limits = limits
        self.renew()

    def renew(self) -> None:
        self.pictures = 0
        self.started = time.thread_time()

    def spend(self) -> None:
        """One more picture or packet. Raises MediaError when that is too many or too late."""
        self.pictures += 1
        if self.pictures > self.limits.max_pictures:
            raise MediaError("too large", f"needs more than `max_pictures={self.limits.max_pictures}` for one sample")
        if time.thread_time() - self.started > self.limits.max_seconds:
            reason = f"needs more than `max_seconds={self.limits.max_seconds:g}` of decoding for one sample"
            raise MediaError("too large", reason)

    def check_size(self, width: int, height: int) -> None:
        """Raise MediaError for a picture of too many pixels."""
        if width * height > self.limits.max_pixels:
            raise MediaError(
                "too large", f"has pictures of {width}x{height} pixels, more than `max_pixels={self.limits.max_pixels}`"
            )
