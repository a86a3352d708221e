"""What a student's own answers teach, and what they cost: `python -m bench.on_policy --student F16.gguf --teacher F16.gguf --records FILE`.

Arms, each from the same student with the same number of steps on the same prompts:

fixed        the teacher's own answers, written and scored once
replay       the student writes, the teacher scores once, answers are learned from for some rounds
speculative  the same, written in blocks that the teacher prunes
fresh        the naive loop: at every step new answers, scored for that step only

Measured on held-out prompts: mean log student - log teacher a token of what the student says (KL(student || teacher), nats), and how often
the student's greedy token is the teacher's at the same place. `--quick` makes a toy teacher and student in a minute and writes nothing.
Writes bench/results/on_policy.json.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import Gemma3ForCausalLM

from bench.result import print_table, write
from coordinator.forge.pairs import read_pairs, read_records
from coordinator.forge.targets.cache import CacheHeader, TargetCache
from coordinator.forge.targets.score import log_probs, predictions, score
from coordinator.forge.training.objective import distillation_loss
from coordinator.forge.training.on_policy import OnPolicy, OnPolicyPlan, alone, together
from coordinator.forge.training.speculative import Block
from protocol.errors import BadInput
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Epochs, Feed
from protocol.models.tokenizer import Example, Tokenizer
from protocol.models.torch_model import best_dtype, generate, to_torch, use_threads
from protocol.models.training import train
from protocol.tasks import Record, Task, task_named

PLANS = {
    "replay": OnPolicyPlan(share=1.0, every=8, prompts=32, staleness=3),
    "speculative": OnPolicyPlan(share=1.0, every=8, prompts=32, staleness=3),
    "fresh": OnPolicyPlan(share=1.0, every=1, prompts=16, staleness=1),
}
K = 50


class Setting(msgspec.Struct, frozen=True):
    """One run."""

    student: Path
    teacher: Path
    task: Task
    records: list[Record]
    held: list[Record]
    steps: int
    rate: float
    work: Path
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="F16 GGUF")
    parser.add_argument("--teacher", type=Path, help="F16 GGUF of the same vocabulary")
    parser.add_argument("--task", default="translate-english-spanish")
    parser.add_argument("--records", type=Path, help="pairs (TSV) or records (JSON lines); the last 100 are held out")
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--work", type=Path, default=Path("var/on-policy"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    use_threads(1 if given.quick else given.threads)
    if not given.quick and not (given.student and given.teacher and given.records):
        raise BadInput("say --student, --teacher and --records, or --quick")
    figures = measure(quick(given.work / "quick", given.seed) if given.quick else full(given))
    rows = [("arm", "KL, nats", "agreement", "seconds", "teacher tokens an example", "accepted")]
    for arm, one in figures["arms"].items():
        accepted = f"{one['acceptance']:.2f}" if one["acceptance"] is not None else ""
        said = (f"{one['kl']:.3f}", f"{one['agreement']:.3f}", f"{one['seconds']:.1f}", f"{one['teacher_tokens_an_example']:.1f}", accepted)
        rows.append((arm, *said))
    if given.quick:
        print_table(rows)
        return
    command = f"python -m bench.on_policy --student F16.gguf --teacher F16.gguf --records FILE --task {given.task} --steps {given.steps}"
    write("on_policy", figures, command=f"{command} --count {given.count} --rate {given.rate:g} --seed {given.seed}", rows=rows)


def full(given: argparse.Namespace) -> Setting:
    task = task_named(given.task)
    read = read_pairs if given.records.suffix == ".tsv" else read_records
    records = read(given.records, task, limit=given.count + 100)
    return Setting(given.student, given.teacher, task, records[:-100], records[-100:], given.steps, given.rate, given.work, given.seed)


def quick(work: Path, seed: int) -> Setting:
    from tests.fleet import toy

    work.mkdir(parents=True, exist_ok=True)
    student, teacher = work / "student.gguf", work / "teacher.gguf"
    if not teacher.is_file():
        toy.trained(student, kinds=(0, 1, 2), seed=seed, steps=12)
        toy.trained(teacher, kinds=(0, 1, 2))
    task = msgspec.structs.replace(task_named("ranch"), max_new_tokens=24)
    return Setting(student, teacher, task, toy.records(90), toy.records(60, start=500), 30, 2e-3, work, seed)


def measure(setting: Setting) -> dict[str, Any]:
    """Every arm, one after the other."""
    teacher = to_torch(Checkpoint.read(setting.teacher), dtype=best_dtype())
    with Tokenizer(setting.teacher) as tokenizer:
        prompts, held = (
            [tokenizer.encode(setting.task.prompt(record), bos=True) for record in records] for records in (setting.records, setting.held)
        )
        eos = tokenizer.eos
    arms = {"start": _distance(setting, to_torch(Checkpoint.read(setting.student)), teacher, held, eos) | _cost(0.0)}
    for arm in ("fixed", *PLANS):
        student = to_torch(Checkpoint.read(setting.student), dtype=best_dtype())
        cost = learn(setting, arm, student, teacher, prompts, eos)
        arms[arm] = _distance(setting, student, teacher, held, eos) | cost
    return {"steps": setting.steps, "prompts": len(prompts), "n": len(held), "arms": arms}


def learn(
    setting: Setting, arm: str, student: Gemma3ForCausalLM, teacher: Gemma3ForCausalLM, prompts: list[list[int]], eos: int
) -> dict[str, Any]:
    """Train the student by one arm; what it cost."""
    folder = setting.work / arm
    shutil.rmtree(folder, ignore_errors=True)  # an arm is minutes, and its seconds are part of the result
    size, longest = student.config.vocab_size, setting.task.max_new_tokens + 1
    cache = TargetCache(folder / "cache", CacheHeader(teacher="teacher", tokenizer="shared", k=min(K, size), vocabulary=size))
    began, tokens = time.monotonic(), 0
    feed: Feed
    if arm == "fixed":
        examples = []
        for at in range(0, len(prompts), 64):
            part = prompts[at : at + 64]
            examples += [Example(*one) for one in zip(part, generate(teacher, part, max_new_tokens=longest, eos=eos), strict=True)]
        for example, targets in zip(examples, score(teacher, examples, k=cache.header.k), strict=True):
            cache.put(example, targets)
        tokens = sum(len(one.prompt) + len(one.target) - 1 for one in examples)
        feed = Epochs(examples, batch_tokens=512, seed=setting.seed)
    elif arm == "speculative":
        writer = together(student, teacher=teacher, block=Block(), k=cache.header.k, max_new_tokens=longest, eos=eos)
        feed = _on_policy(setting, arm, prompts, writer, cache)
    else:
        writer = alone(student, score=lambda made: score(teacher, made, k=cache.header.k), max_new_tokens=longest, eos=eos)
        feed = _on_policy(setting, arm, prompts, writer, cache)
    parameters = [p for name, p in student.named_parameters() if "embed" not in name]
    loss = distillation_loss(feed.examples, cache=cache, alpha=1.0)
    done = train(student, feed, parameters=parameters, learning_rate=setting.rate, loss=loss, steps=setting.steps)
    seconds = time.monotonic() - began
    cache.close()
    if isinstance(feed, OnPolicy):
        return _cost(seconds) | msgspec.to_builtins(feed.result(done.steps)) | {"seconds": seconds}
    return _cost(seconds) | {"examples": len(feed.examples), "teacher_tokens_an_example": tokens / len(feed.examples)}


def _on_policy(setting: Setting, arm: str, prompts: list[list[int]], writer: Any, cache: TargetCache) -> OnPolicy:
    return OnPolicy(
        [], prompts, writer=writer, plan=PLANS[arm], cache=cache, log=setting.work / arm / "rounds.jsonl", batch_tokens=512,
        seed=setting.seed, origin=arm,
    )  # fmt: skip


def _cost(seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "teacher_tokens_an_example": 0.0, "acceptance": None}


def _distance(
    setting: Setting, student: Gemma3ForCausalLM, teacher: Gemma3ForCausalLM, held: list[list[int]], eos: int
) -> dict[str, float]:  # fmt: skip
    """How far what the student says is from its teacher."""
    longest = setting.task.max_new_tokens + 1
    drawn, greedy = (
        [
            Example(prompt, answer)
            for prompt, answer in zip(held, generate(student, held, max_new_tokens=longest, eos=eos, temperature=heat, seed=3), strict=True)
        ]
        for heat in (1.0, 0.0)
    )
    away = torch.cat(log_probs(student, drawn)) - torch.cat(log_probs(teacher, drawn))
    same = [
        float(found)
        for place, logits in predictions(teacher, greedy, batch_tokens=2048)
        for found in logits.argmax(-1) == torch.tensor(greedy[place].target)
    ]
    return {"kl": float(away.mean()), "agreement": sum(same) / len(same)}


if __name__ == "__main__":
    main()
