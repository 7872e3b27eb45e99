"""Images on disk: grids with class labels, animations, single files."""

import re

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import make_grid

from common.run import write_atomic


def picture(names, rows):
    """A grid of uint8 images (rows, n, C, H, W), small ones enlarged, with a name before each row."""
    names, rows = names[:20], rows[:20, :20]
    (H, W), zoom = rows.shape[-2:], max(1, 56 // rows.shape[-1])
    images = resize(rows.flatten(0, 1), [H * zoom, W * zoom])
    grid = to_pil_image(make_grid(images, nrow=rows.shape[1], pad_value=255))
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 13)
    margin = round(max(map(font.getlength, names))) + 8
    canvas = Image.new("RGB", (margin + grid.width, grid.height), "white")
    canvas.paste(grid, (margin, 0))
    for i, name in enumerate(names):
        middle = (i + 0.5) * grid.height / len(names)
        ImageDraw.Draw(canvas).text((4, middle), name, "black", font, anchor="lm")
    return canvas


def save_picture(image, path, **settings):
    """Write the image; settings are those of Pillow's writer for the format."""
    write_atomic(path, lambda file: image.save(file, format=path.suffix[1:], **settings))


def save_film(frames, path):
    """Write frames as a GIF that repeats, the last one longer."""
    settings = dict(duration=[150] * (len(frames) - 1) + [1500], loop=0)  # milliseconds; 0: for ever
    save_picture(frames[0], path, save_all=True, append_images=frames[1:], **settings)


def save_files(names, rows, folder):
    """Write each of the images (rows, n, C, H, W) as a file of its own: NAME_000.png, NAME_001.png, ..."""
    stems = [re.sub(r"[^\w-]+", "_", name)[:60] or "sample" for name in names]
    if len(set(map(str.casefold, stems))) < len(stems):  # two would be one file
        stems = [f"{i}_{stem}" for i, stem in enumerate(stems)]
    for stem, row in zip(stems, rows, strict=True):
        for i, x in enumerate(row):
            save_picture(to_pil_image(x), folder / f"{stem}_{i:03}.png")
