"""Sizes of real models, from their published configurations: what the cases are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A classifier's head.

    Attributes:
        name: for ``--model`` and the tables.
        classes: the size of the vocabulary, or the number of classes.
        features: the width of the layer in front of it.
    """

    name: str
    classes: int
    features: int


IMAGENET = Model("imagenet", 1000, 2048)  # ResNet-50
GPT2 = Model("gpt-2", 50_257, 768)
QWEN = Model("qwen2.5-0.5b", 151_936, 896)
LLAMA = Model("llama-3.2-1b", 128_256, 2048)
LLAMA_8B = Model("llama-3-8b", 128_256, 4096)
GEMMA = Model("gemma-2b", 256_000, 2048)

MODELS = {m.name: m for m in (IMAGENET, GPT2, QWEN, LLAMA, LLAMA_8B, GEMMA)}

SEGMENTATION = (8, 21, 512, 512)  # Pascal VOC: images, classes, height, width
TABULAR = (1 << 16,)  # targets of a regression over a table
RECOMMENDATION = (1 << 20,)  # clicks, one logit each
DETECTION = (1 << 22,)  # anchors times classes of a dense detector


def find(name: str) -> Model:
    """The model of that name, or ValueError with the names there are."""
    try:
        return MODELS[name]
    except KeyError:
        raise ValueError(
            f"mbkern bench: unknown model {name!r}; available: {', '.join(MODELS)}"
        ) from None


def parameters(layers: int, width: int, classes: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a GPT-2 of that size, in order."""
    shapes: list[tuple[int, ...]] = [(classes, width), (1024, width)]
    for _ in range(layers):
        shapes += [
            (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
            (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
        ]  # fmt: skip
    return [*shapes, (width,), (width,)]
