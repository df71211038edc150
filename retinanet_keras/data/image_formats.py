"""The image formats that can be read, and the exceptions that Pillow raises for damaged files."""

import struct

from PIL import Image

IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # Pillow's names; its readers of other formats raise other errors
DAMAGE = (Image.DecompressionBombError, EOFError, OSError, SyntaxError, ValueError, struct.error)
