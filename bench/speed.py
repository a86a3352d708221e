"""How fast engines write, side by side: tokens a CPU-second of one thread, prompt reading left out.

The engines take turns prompt by prompt, so a busy machine is busy for all of them, and processor time is counted, not wall-clock. A prompt
is read once without and once with writing; the difference is the writing.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from protocol.errors import NotEnough
from protocol.models.engine import Engine

WRITTEN = 48  # tokens asked for of each prompt
SHORTEST = 6  # words of a sentence to go on with


def decode_speed(engines: Mapping[str, Engine], prompts: Sequence[str], *, turns: int) -> dict[str, dict[str, Any]]:
    """Per engine: tokens a CPU-second (median over turns, and each turn's), and how many tokens that rests on.

    Raises:
        NotEnough: an engine wrote nothing after its first token; its model says nothing to these prompts.
    """
    rates: dict[str, list[float]] = {name: [] for name in engines}
    counts = dict.fromkeys(engines, 0)
    for turn in range(turns + 1):  # the first warms up
        tokens, seconds = dict.fromkeys(engines, 0), dict.fromkeys(engines, 0.0)
        for prompt in prompts:
            for name, engine in engines.items():
                written, spent = _writing(engine, prompt)
                tokens[name] += written
                seconds[name] += spent
        for name in engines if turn else ():
            if not tokens[name] or seconds[name] <= 0:
                raise NotEnough(f"{name} wrote {tokens[name]} tokens after the first; other prompts are needed to measure its speed")
            rates[name].append(tokens[name] / seconds[name])
            counts[name] += tokens[name]
    return {name: {"tokens_per_cpu_s": statistics.median(found), "turns": found, "tokens": counts[name]} for name, found in rates.items()}


def unfinished(sentences: Sequence[str], count: int) -> list[str]:
    """Sentences without their last two words: any model goes on from there, and not with the end."""
    return [" ".join(sentence.split()[:-2]) for sentence in sentences if len(sentence.split()) >= SHORTEST][:count]


def ratio(speeds: Mapping[str, Mapping[str, Any]], fast: str, slow: str) -> dict[str, Any]:
    """Median over turns of fast / slow, with the lowest and the highest turn."""
    found = [a / b for a, b in zip(speeds[fast]["turns"], speeds[slow]["turns"], strict=True)]
    return {"figure": statistics.median(found), "interval": [min(found), max(found)], "interval_of": "lowest to highest turn"}


def _writing(engine: Engine, prompt: str) -> tuple[int, float]:
    """Tokens after the first one and the processor seconds of this thread for them."""
    at = [time.thread_time()]
    lengths = []
    for limit in (1, WRITTEN):
        lengths.append(len(engine.generate(prompt, max_new_tokens=limit).tokens))
        at.append(time.thread_time())
    return lengths[1] - lengths[0], max(0.0, (at[2] - at[1]) - (at[1] - at[0]))
