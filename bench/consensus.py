"""What a vote of several peers buys against the best single peer at equal cost.

    python -m bench.consensus --task ranch --local student.gguf --peer a=one.gguf --peer b=two.gguf --peer c=three.gguf
    python -m bench.consensus --task translate-english-spanish --data FOLDER --local student.gguf --peer ...

The local model answers every record; its least sure ones are asked of peers, and what the peers say stands. Compared, on the same records:

    the best single peer    chosen on the first half of the records, where the peers' confidences are calibrated as well
    the vote                node/escalation/consensus.py as a node runs it, trust learned on the way
    at equal cost           a vote of three costs three answers, so it can be asked a third of the questions: both policies get the same
                            CPU-seconds of peers, and each spends them on the questions that the local model is least sure of
    with a liar             one peer answers another record's answer, entirely sure of itself; for each peer in turn, the worst one counts

Nothing is judged by what voted: verdicts vote by weight and are judged by the simulator's truth; texts vote by chrF and are judged by BLEU
(of sentences for paired intervals, of the corpus for the table) and by exact match. All of it on the second half. Peers' answers are
kept in the folder; the same command goes on where it was killed. Writes bench/results/consensus.json, one entry a task.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import sacrebleu

from bench.result import RESULTS, write
from coordinator.forge.judging.calibrate import fit
from coordinator.forge.judging.evaluation import Evaluation, evaluate
from coordinator.forge.judging.metrics import paired_difference, text_scores
from coordinator.forge.pairs import read_pairs
from coordinator.ranch import generate, site_named
from node.escalation.consensus import Record as History
from node.escalation.consensus import agree, verdicts_on
from protocol.blobs import write_atomically
from protocol.digests import digest_file
from protocol.errors import BadInput
from protocol.messages import Reply
from protocol.tasks import Record, Task, task_named

SHARES = (0.1, 0.2, 0.3)  # of the questions, put to the single peer; the vote gets as many as cost the same
LIAR = "a liar"


class Voice(msgspec.Struct, frozen=True):
    """One model's answers to the judged records."""

    name: str
    texts: tuple[str, ...]
    confidences: tuple[float, ...]  # calibrated on the other half
    cpu_seconds: float  # of all of them
    digest: str = ""


def main() -> None:
    """Have the answers, compare, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="ranch")
    parser.add_argument("--local", type=Path, required=True, help="the model that decides what is asked")
    parser.add_argument("--peer", action="append", required=True, metavar="NAME=GGUF", help="three or more")
    parser.add_argument("--site", default="esteli", help="of the ranch's records")
    parser.add_argument("--data", type=Path, default=Path("var/data/tatoeba-en-es"), help="folder with test.tsv")
    parser.add_argument("--records", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("var/consensus"))
    said = parser.parse_args()
    task = task_named(said.task)
    files = dict(named(one) for one in said.peer)
    if len(files) < 3:
        raise SystemExit("bench.consensus: name three peers or more; of two that disagree nobody knows which is right")
    if task.codes:
        records = generate(site_named(said.site), seed=said.seed, count=said.records, split="test")
    else:
        records = read_pairs(said.data / "test.tsv", task, limit=said.records)
    found = {name: answered(path, records, task, said) for name, path in {"local": said.local, **files}.items()}
    figures = compared(task, records, found, seed=said.seed)
    results = RESULTS / "consensus.json"
    kept = json.loads(results.read_text(encoding="utf-8"))["figures"] if results.is_file() else {}
    command = "python -m bench.consensus --task TASK --local STUDENT.gguf --peer NAME=GGUF ..."
    write("consensus", kept | {task.name: figures}, command=command, rows=table(figures))


def named(pair: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, sign, path = pair.partition("=")
    if not sign or not name:
        raise SystemExit(f"bench.consensus: {pair!r} is not of the form NAME=GGUF")
    return name, Path(path)


def answered(model: Path, records: Sequence[Record], task: Task, said: argparse.Namespace) -> Evaluation:
    """The model's answers to all records; computed once."""
    file = said.folder / f"{task.name}-{digest_file(model)[:16]}-{said.site}-{len(records)}-{said.seed}.json"
    if file.is_file():
        return msgspec.json.decode(file.read_bytes(), type=Evaluation)
    made = evaluate(model, records, task, threads=said.threads, name=model.name)
    said.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, msgspec.json.encode(made))
    return made


def compared(task: Task, records: Sequence[Record], found: Mapping[str, Evaluation], *, seed: int) -> dict[str, Any]:
    """The report: `found` holds the local model's answers under "local", and the peers' under their names.

    Raises:
        BadInput: fewer than three peers.
    """
    if len(found) < 4:
        raise BadInput("a vote needs three peers or more, beside the local model")
    half = len(records) // 2
    truth = records[half:]
    local, *peers = (voice(name, evaluation, half, seed) for name, evaluation in found.items())
    quality = {name: judged(task, records[:half], [one.text for one in evaluation.answers[:half]]) for name, evaluation in found.items()}
    best = max(peers, key=lambda peer: sum(quality[peer.name]))
    voted = vote(task, peers)
    lied = min((vote(task, with_liar(peers, at)) for at in range(len(peers))), key=lambda texts: sum(judged(task, truth, texts)))
    order = sorted(range(len(truth)), key=lambda i: local.confidences[i])
    cost, single_cost = sum(peer.cpu_seconds for peer in peers), best.cpu_seconds
    shares = []
    for share in SHARES:
        equal = share * single_cost / cost
        single = replaced(local.texts, best.texts, order[: round(share * len(truth))])
        votes = replaced(local.texts, voted, order[: round(equal * len(truth))])
        same = replaced(local.texts, voted, order[: round(share * len(truth))])
        shares.append({
            "share asked of the best peer": share, "share voted on at equal cost": round(equal, 4),
            "best peer": figures(task, truth, single), "vote at equal cost": figures(task, truth, votes),
            "vote on as many questions": figures(task, truth, same),
            "vote minus best peer at equal cost": gain(task, truth, single, votes, seed),
            "vote minus best peer on as many questions": gain(task, truth, single, same, seed),
        })  # fmt: skip
    alone = {one.name: figures(task, truth, one.texts) | {"cpu_s_1000": 1000 * one.cpu_seconds / len(truth)} for one in (local, *peers)}
    return {
        "n": len(truth), "judged_by": judge_name(task), "best single peer": best.name, "all asked": {
            **alone, "vote": figures(task, truth, voted) | {"cpu_s_1000": 1000 * cost / len(truth)},
            f"vote with {LIAR}": figures(task, truth, lied),
            "vote minus best peer": gain(task, truth, best.texts, voted, seed),
            f"vote with {LIAR} minus best peer": gain(task, truth, best.texts, lied, seed),
        },
        "least sure asked": shares,
    }  # fmt: skip


def voice(name: str, evaluation: Evaluation, half: int, seed: int) -> Voice:
    """The answers to the second half, their confidences calibrated on the first."""
    first, second = (msgspec.structs.replace(evaluation, answers=part) for part in (evaluation.answers[:half], evaluation.answers[half:]))
    texts = tuple(answer.text for answer in second.answers)
    cpu = sum(answer.cpu_seconds or answer.seconds for answer in second.answers)
    return Voice(name, texts, second.confidences(fit(first, seed=seed)), cpu, evaluation.model_digest)


def vote(task: Task, peers: Sequence[Voice]) -> list[str]:
    """What stands for each record, with trust as a node would have learned it by then."""
    history = {peer.name: History() for peer in peers}
    texts = []
    for at in range(len(peers[0].texts)):
        replies = [
            Reply(f"r{at}", str(at), "", peer.name, peer.digest, task.parse(peer.texts[at]).text, confidence=peer.confidences[at])
            for peer in peers
        ]
        if not any(reply.text for reply in replies):
            texts.append("")
            continue
        outcome = agree(replies, task, trust={name: one.trust for name, one in history.items()})
        for name, one in verdicts_on(replies, task, outcome).items():
            history[name] = history[name].after(one)
        texts.append(outcome.reply.text)
    return texts


def with_liar(peers: Sequence[Voice], at: int) -> list[Voice]:
    """The peers, one of which answers what belongs to another record and is entirely sure."""
    honest = peers[at]
    lies = honest.texts[len(honest.texts) // 3 :] + honest.texts[: len(honest.texts) // 3]
    liar = msgspec.structs.replace(honest, texts=lies, confidences=(1.0,) * len(lies))
    return [*peers[:at], liar, *peers[at + 1 :]]


def replaced(texts: Sequence[str], by: Sequence[str], where: Sequence[int]) -> list[str]:
    """`texts` with those at `where` taken from `by`."""
    there = set(where)
    return [by[i] if i in there else text for i, text in enumerate(texts)]


def judged(task: Task, records: Sequence[Record], texts: Sequence[str]) -> list[float]:
    """Per record: 1 or 0 for the verdict; BLEU of the sentence, 0 to 100. Never chrF, which voted."""
    if task.codes:
        return [float(task.parse(text).verdict == record.verdict) for record, text in zip(records, texts, strict=True)]
    return [sacrebleu.sentence_bleu(task.parse(text).text, [record.target]).score for record, text in zip(records, texts, strict=True)]


def gain(task: Task, records: Sequence[Record], before: Sequence[str], after: Sequence[str], seed: int) -> dict[str, float]:
    """What `after` is better by, with its interval."""
    return paired_difference(judged(task, records, before), judged(task, records, after), seed=seed)


def judge_name(task: Task) -> str:
    return "truth of the simulator" if task.codes else "BLEU and exact match (voted by chrF)"


def figures(task: Task, records: Sequence[Record], texts: Sequence[str]) -> dict[str, float]:
    """What these texts are worth."""
    if task.codes:
        return {"accuracy": sum(judged(task, records, texts)) / len(records)}
    said = [task.parse(text).text for text in texts]
    exact = sum(text == record.target for text, record in zip(said, records, strict=True)) / len(records)
    return {"bleu": text_scores(said, [record.target for record in records], resamples=10).bleu, "exact": exact}


def table(report: Mapping[str, Any]) -> list[Sequence[str]]:
    """For people."""
    rows: list[Sequence[str]] = [("asked", "who", "figures", "vote minus best peer (95%)")]
    difference = report["all asked"]["vote minus best peer"]
    liar = report["all asked"][f"vote with {LIAR} minus best peer"]
    beside = {"vote": difference, f"vote with {LIAR}": liar}
    rows += [
        ("all", f"{name} *" if name == report["best single peer"] else name, worth(one), interval(beside.get(name)))
        for name, one in report["all asked"].items()
        if "minus" not in name
    ]
    for one in report["least sure asked"]:
        share, equal = one["share asked of the best peer"], one["share voted on at equal cost"]
        rows.append((f"{share:.0%}", "best peer", worth(one["best peer"]), ""))
        rows.append(
            (f"{equal:.1%}", "vote, equal cost", worth(one["vote at equal cost"]), interval(one["vote minus best peer at equal cost"]))
        )
        rows.append(
            (f"{share:.0%}", "vote", worth(one["vote on as many questions"]), interval(one["vote minus best peer on as many questions"]))
        )
    return rows


def worth(one: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in one.items())


def interval(difference: Mapping[str, float] | None) -> str:
    return f"{difference['diff']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})" if difference else ""


if __name__ == "__main__":
    main()
