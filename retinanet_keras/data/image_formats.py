"""The image formats that are read, and what Pillow raises for damaged files of them."""

import struct

from PIL import Image

IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")  # as Pillow names them; its readers of others fail in other ways
DAMAGE = (Image.DecompressionBombError, EOFError, OSError, SyntaxError, ValueError, struct.error)
