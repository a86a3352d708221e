"""docs/cached-teacher-logits.md is run as it stands, block by block, on models of a moment."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import coordinator.cli
from coordinator.forge.targets.cache import TargetCache
from tests.tiny import WORDS, tiny_gguf

pytestmark = [pytest.mark.torch, pytest.mark.llama, pytest.mark.filterwarnings("ignore")]

PAGE = Path(__file__).parents[2] / "docs/cached-teacher-logits.md"
PAIRS = 12


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the page says is there: two models with one tokenizer, a GGUF, pairs."""
    torch.set_num_threads(1)
    words = dict.fromkeys(WORDS.split())
    vocabulary = {word: at for at, word in enumerate(["<pad>", "</s>", "<s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    tiny_gguf(tmp_path / "teacher.gguf")
    lines = [f"the tank is {('low', 'dry')[i % 2]} since {list(words)[i]}\tel tanque {list(words)[i + 3]}" for i in range(PAIRS)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def loss_of(trainer: Any, model: torch.nn.Module) -> float:
    """The trainer's objective on all rows, by that model."""
    batch = trainer.data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset])
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(trainer.objective.on_labels(logits, batch["input_ids"], batch["labels"], batch["attention_mask"]))


def test_every_block_of_the_page_runs_and_the_students_learn_from_the_cache_alone(workplace: Path) -> None:
    capture, train, in_trl = blocks("python")
    names: dict[str, Any] = {"__name__": "page"}

    exec(compile(capture, "capture", "exec"), names)
    size = TargetCache.open(workplace / "cache").size
    exec(compile(capture, "capture", "exec"), names)
    assert TargetCache.open(workplace / "cache").size == size
    assert len(TargetCache.open(workplace / "cache")) == PAIRS

    (workplace / "teacher" / "model.safetensors").unlink()
    for block in (train, in_trl):
        exec(compile(block, "train", "exec"), names)
        assert names["trainer"].objective.coverage == 1.0
        trained, untrained = names["trainer"].model, LlamaForCausalLM.from_pretrained(workplace / "student")
        assert loss_of(names["trainer"], trained) < loss_of(names["trainer"], untrained)


def test_the_commands_of_the_page_capture_all_pairs_between_them(workplace: Path) -> None:
    (block,) = blocks("sh")

    for line in block.splitlines():
        result = CliRunner().invoke(coordinator.cli.complete(), shlex.split(line)[1:])
        assert result.exit_code == 0, result.output

    assert len(TargetCache.open(workplace / "captured")) == PAIRS
