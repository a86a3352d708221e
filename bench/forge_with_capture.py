"""CPU-seconds of a whole distillation, the capture of the teacher included: five epochs of ours against five of the naive loop.

Ours: the teacher answers every source and its top 50 are cached, then the student trains five epochs on them. The naive loop has the
student write and the live teacher look on in every step; its steps are alike, so one epoch is measured and counted five times.
The teacher is corrected on other sentences first, for both: one that was not never ends an answer, and no capture would ask it.
"""

from collections import Counter
from typing import Any

import torch

from bench.forge_step import BATCH_TOKENS, cpu_seconds
from bench.naive import Naive
from bench.settings import TRANSLATION, Settings
from bench.student import small
from coordinator.forge.targets.cache import TargetCache
from coordinator.forge.targets.capture import capture, examples_of, header_of, read_log
from coordinator.forge.training.objective import distillation_loss
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs
from protocol.models.tokenizer import Tokenizer
from protocol.models.torch_model import best_dtype, body, to_torch
from protocol.models.training import train

EPOCHS = 5
RECORDS = 400
CORRECTION = 80  # steps


def measure(settings: Settings) -> dict[str, Any]:
    count = 16 if settings.quick else RECORDS
    student, records = Checkpoint.read(small(settings)), settings.pairs("train", count)
    outside, steps = settings.pairs("train", 6 * count)[count:], 2 if settings.quick else CORRECTION
    teacher = settings.corrected(settings.folder("with_capture") / "teacher.gguf", outside, steps=steps)
    with Tokenizer(settings.trimmed()) as tokenizer:
        eos = tokenizer.eos
    folder = settings.folder("with_capture") / "cache"

    def captured() -> dict[str, Any]:
        cache = TargetCache(folder, header_of(teacher))
        with Tokenizer(settings.trimmed()) as tokenizer:
            model = to_torch(teacher, dtype=best_dtype())
            spent = cpu_seconds(lambda: capture(model, tokenizer, TRANSLATION, records, cache=cache, log=folder / "log.jsonl"))
        cache.close()
        return {"cpu_s": spent}

    capture_s = settings.kept("with_capture", "capture", captured)["cpu_s"]
    kinds = Counter(one.kind for one in read_log(folder / "log.jsonl"))
    cache = TargetCache.open(folder)
    examples = examples_of(read_log(folder / "log.jsonl"))

    def trained() -> dict[str, Any]:
        pupil = to_torch(student, dtype=best_dtype())
        feed, loss = Epochs(examples, batch_tokens=BATCH_TOKENS, seed=settings.seed), distillation_loss(examples, cache=cache, alpha=0.5)
        return {"cpu_s": cpu_seconds(lambda: train(pupil, feed, parameters=body(pupil), learning_rate=1e-4, loss=loss, epochs=EPOCHS))}

    training_s = settings.kept("with_capture", "training", trained)["cpu_s"]
    cache.close()

    feed = Epochs(examples, batch_tokens=BATCH_TOKENS, seed=settings.seed)
    batches = [batch for batch, _ in zip(feed.batches(0), range(feed.batches_an_epoch), strict=False)]

    def naive(autocast: bool) -> dict[str, Any]:
        torch.manual_seed(settings.seed)
        arm = Naive(teacher, student, fresh=True, autocast=autocast, eos=eos)
        return {"cpu_s": sum(arm.step([examples[i] for i in batch]) for batch in batches)}

    epoch = {kind: settings.kept("with_capture", f"naive-{kind}", lambda autocast=kind == "autocast": naive(autocast))["cpu_s"]
             for kind in ("float32", "autocast")}  # fmt: skip
    naive_s = EPOCHS * min(epoch.values())
    return {
        "figure": naive_s / (capture_s + training_s),
        "against": {"naive loop, CPU-s": naive_s, "measured epoch by type": epoch},
        "ours": {"capture, CPU-s": capture_s, "training, CPU-s": training_s, "answers": dict(kinds)},
        "n": len(examples), "epochs": EPOCHS, "steps_an_epoch": len(batches),
    }  # fmt: skip
