"""What a step costs a user of the usual tools: transformers' model and generation, TRL's dense divergence. The baselines of two measures.

Same student, same teacher, same prompts as ours. The divergence is `GKDTrainer.generalized_jsd_loss` of TRL itself, with its trainer's
temperature and beta; the optimiser is AdamW as transformers' Trainer makes it. Nothing is slowed down: an answer may be no longer than the
longest target of its batch (TRL's default would be 128), keys and values are cached, and each baseline runs in the faster of two types.
"""

import time
from collections.abc import Sequence

import torch
from transformers import Gemma3ForCausalLM

from bench.settings import TRANSLATION, Settings
from bench.student import small
from coordinator.forge.training.losses import kl
from protocol.models.checkpoint import Checkpoint
from protocol.models.feed import Batch
from protocol.models.tokenizer import Example, Tokenizer, make_example
from protocol.models.torch_model import best_dtype, embed, hidden_states, logits_of, to_torch
from protocol.models.training import Loss, View

BETA, TEMPERATURE = 0.5, 0.9  # GKDConfig's defaults
IGNORED = -100


class Naive:
    """One baseline: a student in training and its live teacher. `fresh`: the student writes each batch anew, and the loss is TRL's JSD;
    else the batch's own targets and the dense KL."""

    def __init__(self, teacher: Checkpoint, student: Checkpoint, *, fresh: bool, autocast: bool, eos: int) -> None:
        from trl.experimental.gkd import GKDTrainer

        self.divergence = GKDTrainer.generalized_jsd_loss
        self.fresh, self.autocast, self.eos = fresh, autocast, eos
        self.teacher = to_torch(teacher, dtype=torch.bfloat16 if autocast else torch.float32)
        self.student: Gemma3ForCausalLM = to_torch(student)
        self.student.requires_grad_(True)
        self.student.model.embed_tokens.requires_grad_(False)  # as in our own training
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self, examples: Sequence[Example]) -> float:
        """CPU-seconds of one step on them."""
        began = time.process_time()
        ids, mask, labels = self.written(examples) if self.fresh else padded(examples)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            mine = self.student(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            with torch.no_grad():
                theirs = self.teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        options = {"beta": BETA, "temperature": TEMPERATURE} if self.fresh else {"beta": 0.0, "temperature": 1.0}
        loss = self.divergence(mine.float(), theirs.float(), labels=labels[:, 1:], **options)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - began

    def written(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The student's own answers to the prompts: ids, mask and labels, (rows, T)."""
        longest = max(len(one.prompt) for one in examples)
        ids = torch.tensor([[0] * (longest - len(one.prompt)) + one.prompt for one in examples])
        mask = torch.tensor([[0] * (longest - len(one.prompt)) + [1] * len(one.prompt) for one in examples])
        self.student.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            said = self.student.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(len(one.target) for one in examples), do_sample=True,
                temperature=TEMPERATURE, top_k=0, top_p=1.0, use_cache=True, eos_token_id=self.eos, pad_token_id=0,
            )  # fmt: skip
        self.student.train()
        answer = said[:, longest:]
        ended = (answer == self.eos).cumsum(1) - (answer == self.eos).long() > 0  # after the first end
        mask = torch.cat((mask, (~ended).long()), dim=1)
        labels = said.masked_fill(mask == 0, IGNORED)
        labels[:, :longest] = IGNORED
        return said, mask, labels


def padded(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts with their targets: ids, mask and labels, (rows, T)."""
    rows = [[*one.prompt, *one.target] for one in examples]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, IGNORED)
    for at, one in enumerate(examples):
        labels[at, : len(one.prompt)] = IGNORED
    return ids, mask, labels


def lesson(settings: Settings, count: int) -> tuple[Checkpoint, Checkpoint, list[Example], int]:
    """Teacher, `small` student cut out of it, examples, end token: what both measures train with."""
    path = settings.trimmed()
    with Tokenizer(path) as tokenizer:
        examples = [make_example(tokenizer, TRANSLATION, record) for record in settings.pairs("train", count)]
        eos = tokenizer.eos
    return Checkpoint.read(path), Checkpoint.read(small(settings)), examples, eos


def live(teacher: Checkpoint) -> Loss:
    """Dense forward KL to a teacher that runs in every step, at the predicting positions only: the strongest such loop we know."""
    model = to_torch(teacher, dtype=best_dtype())

    def loss(view: View, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            logits = logits_of(model, hidden_states(model, embed(model, batch.ids), at=(batch.rows, batch.columns))).float()
        return kl(logits.log_softmax(-1), view.logits.log_softmax(-1)).mean()

    return loss
