"""The picture sheet of all degradations, and what they cost beside decoding.

    python benchmarks/degradations.py [--sheet docs/degradations.jpg] [--images DIR] [--seed N] [--repeat N]

Without --images the sheet shows a scene drawn here, so that it may be shipped. With it, the sheet shows the first
image of the folder, and the time that each condition takes is measured on up to 100 of them, in turns with decoding
the same image; prints a table in Markdown: medians, and the median of the ratios image by image. Times are those that
this thread had the processor. "copying" is the pixels out of Pillow and back, which all that compute with them pay.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from pathlib import Path

import numpy as np
from edgec.calib.degrade import CONDITIONS, parameter_of, transform
from edgec.calib.pixels import read, write
from edgec.calib.sources import IMAGES, walk
from PIL import Image, ImageDraw, ImageFont

TILE, LABEL, COLUMNS = (256, 192), 30, 5
QUALITY = 78


def scene(size: tuple[int, int] = TILE) -> Image.Image:
    """Draw a sky, a textured ground, edges, colours and text: what each of the degradations acts on."""
    width, height = size
    rng = np.random.default_rng(3)
    down = np.linspace(0, 1, height)[:, None, None]
    pixels = (1 - down) * np.array([70, 130, 220]) + down * np.array([225, 235, 245])
    pixels = np.repeat(pixels, width, axis=1)
    horizon = height * 2 // 3
    pixels[horizon:] = np.array([95, 110, 60]) + 22 * rng.standard_normal((height - horizon, width, 1))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width - 60, 14, width - 24, 50), fill=(255, 240, 190))
    draw.rectangle((24, 62, 118, horizon + 18), fill=(150, 60, 48), outline=(40, 20, 20))
    for left, top in ((34, 74), (64, 74), (94, 74), (34, 104), (64, 104), (94, 104)):
        draw.rectangle((left, top, left + 14, top + 18), fill=(250, 225, 130), outline=(30, 30, 30))
    draw.polygon([(14, 62), (71, 26), (128, 62)], fill=(70, 62, 66))
    for i in range(12):  # edges that lie ever closer
        across = 144 + i * (27 - i) // 2
        draw.line((across, 70, across, 112), fill=(20, 20, 20), width=2 if i < 8 else 1)
    draw.rectangle((140, 118, 232, 146), fill=(20, 80, 150))
    draw.text((147, 122), "EXIT 42b", fill="white", font=ImageFont.load_default(18))
    for i, colour in enumerate(("#d02020", "#20a040", "#f0c000", "#f8f8f8", "#101010")):
        draw.rectangle((140 + 19 * i, 152, 155 + 19 * i, 170), fill=colour)
    return image


def sheet(image: Image.Image, seed: int) -> Image.Image:
    """Return a tile for each condition, with the parameter that the image named `scene` gets."""
    image = image.convert("RGB").resize(TILE, Image.Resampling.LANCZOS)
    width, height = TILE[0] + 8, TILE[1] + LABEL + 8
    page = Image.new("RGB", (width * COLUMNS + 8, height * -(-len(CONDITIONS) // COLUMNS) + 8), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for i, (name, condition) in enumerate(CONDITIONS.items()):
        left, top = 8 + width * (i % COLUMNS), 8 + height * (i // COLUMNS)
        page.paste(transform(name, seed)[0](image, "scene").convert("RGB"), (left, top))
        level = f"{parameter_of(name, seed, 'scene'):.3g} {condition.unit}" if condition.unit else "as it was decoded"
        draw.text((left, top + TILE[1] + 1), f"{name}   {level}", fill="black", font=font)
        among = f"{condition.low:g} to {condition.high:g}" if condition.unit else ""
        draw.text((left, top + TILE[1] + 15), f"{condition.title}  {among}", fill="#666666", font=font)
    return page


def timings(files: list[Path], seed: int, repeat: int) -> str:
    """Return a table: condition, milliseconds an image, times decoding the same image."""
    degrade = {"copying": lambda image, name: write(read(image))}
    degrade |= {name: transform(name, seed)[0] for name in CONDITIONS if name != "clean"}
    seconds: dict[str, list[float]] = {name: [] for name in ("decoding", *degrade)}
    for file in files * repeat:
        data = file.read_bytes()
        start = time.thread_time()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            seconds["decoding"].append(time.thread_time() - start)
            for name, change in degrade.items():
                start = time.thread_time()
                change(image, file.name)
                seconds[name].append(time.thread_time() - start)
    rows = ["| condition | ms an image | times decoding |", "|---|---|---|"]
    for name, times in seconds.items():
        ratio = statistics.median(t / d for t, d in zip(times, seconds["decoding"], strict=True))
        rows.append(f"| {name} | {statistics.median(times) * 1e3:.2f} | {ratio:.2f} |")
    return "\n".join(rows)


def main() -> None:
    """Write the sheet, measure, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path, help="where the picture sheet is written")
    parser.add_argument("--images", type=Path, help="a folder of images, to show and to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    files = [args.images / f for f in walk(args.images) if f.lower().endswith(IMAGES)][:100] if args.images else []
    if args.sheet:
        page = sheet(Image.open(files[0]) if files else scene(), args.seed)
        page.save(args.sheet, quality=QUALITY, optimize=True)
    if files:
        print(timings(files, args.seed, args.repeat))


if __name__ == "__main__":
    main()
