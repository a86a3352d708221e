"""TRL's two on-policy trainers on our students, teachers and token ids: the baselines of `time_to_quality`.

Rules:
 * Prompts reach TRL as words that are their ids ("2 17 338"), read by a tokeniser of exactly those words, so both sides train on the
   same tokens; targets likewise.
 * `default` keeps TRL 1.16's own settings but for two that it needs on a CPU (use_cpu, bf16 off). `tuned` is what a knowing user would
   set here: no gradient checkpointing, answers no longer than the task's, bfloat16, 16 rows a step, a rate of 1e-4; not searched for.
 * A callback looks at the clock after every step, and judges the student when `Watch` says so; judging stops the clock.
 * Seconds are of the processor: with one thread, the wall-clock of a machine that does nothing else. Nobody's other work counts for anyone.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Gemma3ForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from bench.naive import padded
from protocol.models.tokenizer import Example

Setting = Literal["default", "tuned"]
TUNED_RATE = 1e-4
ROWS = 16  # a step, tuned
FIRST_LOOK, GROWTH = 20.0, 1.25  # seconds until the first judgement; each later one after so many times as long


class Watch:
    """A clock that stands still while a student is judged; keeps the curve of quality over seconds."""

    def __init__(self, judge: Callable[[], float], *, limit_s: float, goal: float | None = None, first_look: float = FIRST_LOOK) -> None:
        self.judge, self.limit_s, self.goal, self.next = judge, limit_s, goal, first_look
        self.curve: list[tuple[float, float]] = []
        self.began, self.paused = time.process_time(), 0.0
        self.look()

    @property
    def elapsed(self) -> float:
        """Processor seconds of work, judging left out."""
        return time.process_time() - self.began - self.paused

    def look(self) -> None:
        """Judge now."""
        at, stopped = self.elapsed, time.process_time()
        self.curve.append((round(at, 2), self.judge()))
        self.paused += time.process_time() - stopped

    def tick(self) -> bool:
        """After a step: judge if it is time to; True when the work is to end, at its goal or its limit."""
        if self.elapsed >= min(self.next, self.limit_s):
            self.look()
            self.next = self.elapsed * GROWTH
        return self.elapsed >= self.limit_s or (self.goal is not None and self.curve[-1][1] >= self.goal)


class _Ticking(TrainerCallback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = self.watch.tick()


def words_of(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def id_tokenizer(size: int, *, eos: int) -> PreTrainedTokenizerFast:
    """Reads "2 17 338" as the ids 2, 17, 338."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    found = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="3"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token=str(eos), pad_token="0", unk_token="3", padding_side="left")


def options(setting: Setting, **longest: int) -> dict[str, Any]:
    """What a trainer's configuration is given besides its defaults; `longest` names its own limit of new tokens."""
    if setting == "default":
        return {"bf16": False}
    return {
        "bf16": True, "learning_rate": TUNED_RATE, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20,
        "per_device_train_batch_size": ROWS, "gradient_checkpointing": False, "max_steps": 1_000_000, **longest,
    }  # fmt: skip


def gkd(
    student: Gemma3ForCausalLM, teacher: Gemma3ForCausalLM, examples: Sequence[Example], setting: Setting, *, out: Path, watch: Watch,
    eos: int, longest: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """GKDTrainer: half of the batches written by the student, half the data set's own; generalised JSD."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    chosen = options(setting, max_new_tokens=longest)

    def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids, mask, labels = padded([Example(row["prompt"], row["target"]) for row in rows])
        width = max(len(row["prompt"]) for row in rows)
        prompts = torch.tensor([[0] * (width - len(row["prompt"])) + row["prompt"] for row in rows])
        there = torch.tensor([[0] * (width - len(row["prompt"])) + [1] * len(row["prompt"]) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "prompts": prompts, "prompt_attention_mask": there}

    config = GKDConfig(output_dir=str(out), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=seed, **chosen)
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=config, data_collator=collate, callbacks=[_Ticking(watch)],
        train_dataset=Dataset.from_list([{"prompt": list(one.prompt), "target": list(one.target)} for one in examples]),
        processing_class=id_tokenizer(student.config.vocab_size, eos=eos),
    )  # fmt: skip
    trainer.train()
    return chosen | {"steps": trainer.state.global_step}


def distillation(
    student: Gemma3ForCausalLM, teacher: Gemma3ForCausalLM, examples: Sequence[Example], setting: Setting, *, out: Path, watch: Watch,
    eos: int, longest: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """DistillationTrainer: every batch written by the student; reverse KL by default."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    chosen = options(setting, max_completion_length=longest)
    config = DistillationConfig(
        output_dir=str(out), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=seed, **chosen
    )
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=config, callbacks=[_Ticking(watch)],
        train_dataset=Dataset.from_list([{"prompt": words_of(one.prompt)} for one in examples]),
        processing_class=id_tokenizer(student.config.vocab_size, eos=eos),
    )  # fmt: skip
    trainer.train()
    return chosen | {"steps": trainer.state.global_step}


TRAINERS = {"GKDTrainer": gkd, "DistillationTrainer": distillation}
