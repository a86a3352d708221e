"""llama.cpp's log: never on our stderr, its complaints kept for our own error messages. Set once, when this module is first imported.

The library has one log callback for the whole process, so there is one place that sets it.
"""

import ctypes
from collections import deque
from typing import Any

import llama_cpp

ERROR = 4  # ggml.h; llama-cpp-python's own table is older

_complaints: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator,unused-ignore]
def _listen(level: int, text: bytes, _user: Any) -> None:
    if level == ERROR and text and text.strip():
        _complaints.append(text.decode("utf-8", "replace").strip())


llama_cpp.llama_log_set(_listen, ctypes.c_void_p(0))  # `_listen` is a module global, so it lives as long as the library calls it


def forget() -> None:
    """Drop the complaints so far: call it before what may fail."""
    _complaints.clear()


def said() -> str:
    """llama.cpp's first complaint since `forget` (the later ones only pass it on), for the end of a sentence."""
    return f" (llama.cpp: {_complaints[0]})" if _complaints else ""
