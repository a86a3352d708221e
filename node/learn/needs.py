"""What a training needs beside the node itself: the extra `train`, which deploy/install-node.sh installs when asked to."""

import importlib.util

LIBRARIES = ("torch", "transformers", "gguf")  # a node without them answers and does not learn
CURE = "run deploy/install-node.sh again with --train"


def missing() -> list[str]:
    """The libraries that are not installed here."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
