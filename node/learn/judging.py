"""Does the site's adapter answer better here than the release without it? Asked of llama.cpp, the engine that will answer.

Every held-out record is answered greedily by the release as it is and by each mixture; the mixture with the best mean on the site's own
examples is the candidate, and `node.learn.rules.better` decides on it. Runs in the training's process, after the training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from node.learn import rules, site, stored
from node.update.slots import ActiveRelease
from protocol.adapters import stacked, unpack
from protocol.digests import digest_file
from protocol.errors import DoesNotFit
from protocol.likeness import chrf
from protocol.models.engine import Engine
from protocol.models.lora import Factors, read_factors_gguf, write_factors_gguf
from protocol.models.training import Interrupted
from protocol.tasks import Record, Task

LIMIT = 64  # records of each set; more answers take minutes on a small board and change no decision


def judge(
    state_dir: Path,
    active: ActiveRelease,
    task: Task,
    own: Sequence[Record],
    general: Sequence[Record],
    *,
    threads: int,
    context: int,
    now: float,
    interrupted: Callable[[], bool] = lambda: False,
) -> site.Judged | None:
    """The verdict on the adapter stored for `active`; its file is beside it when it is good. None: nothing is stored.

    Raises:
        WrongDigest, MalformedMessage: what is stored is damaged.
        Interrupted: as asked.
    """
    found = stored.load(state_dir, active.number)
    if found is None:
        return None
    header, learned = found[0].header, found[0].digest
    model = active.release.file(active.role, "model")
    if model is None or header.base_digest != model.digest:
        raise DoesNotFit(f"the adapter stored for release {active.number} was trained on another model; it stays for the next round")
    ours = (unpack(found[1], header), header.alpha / header.rank)
    own, general = own[-LIMIT:], general[:LIMIT]
    folder = stored.folder(state_dir, active.number)
    with Engine(active.model, threads=threads, context=context, adapter=active.adapter) as engine:

        def scores(records: Sequence[Record]) -> list[float]:
            found = []
            for record in records:
                if interrupted():
                    raise Interrupted("stopped while judging; it begins anew")
                answer = engine.generate(task.prompt(record), max_new_tokens=task.max_new_tokens, form=task.form).text
                found.append(score(task, answer, record))
            return found

        before, general_before = scores(own), scores(general)
        best: tuple[float, tuple[float, float], Path, list[float]] | None = None
        mixtures = rules.MIXTURES if active.adapter else rules.MIXTURES[:1]
        for number, mixture in enumerate(mixtures):
            path = folder / f"candidate-{number}.gguf"
            write_factors_gguf(path, mixed(active.adapter, ours, mixture))
            engine.set_adapter(path)
            after = scores(own)
            if best is None or mean(after) > best[0]:
                best = (mean(after), mixture, path, after)
        assert best is not None
        engine.set_adapter(best[2])
        general_after = scores(general)
    _, mixture, path, after = best
    verdict = rules.better(
        list(zip(before, after, strict=True)), list(zip(general_before, general_after, strict=True)), tried=len(mixtures)
    )
    judged = site.Judged(
        learned=learned, good=verdict.ok, reason=verdict.reason, at=now, adapter=digest_file(path), base=header.base_digest,
        mixture=mixture, before=mean(before), after=mean(after), held_out=len(own), general_before=mean(general_before),
        general_after=mean(general_after), general=len(general),
    )  # fmt: skip
    if verdict.ok:
        path.replace(site.path_of(state_dir, active.number, judged))
    for left in folder.glob("candidate-*"):
        left.unlink()
    return judged


def mixed(release: Path | None, ours: tuple[Factors, float], mixture: tuple[float, float]) -> Factors:
    """The release's adapter and the site's own as one, each with its share; both are sums over the same base."""
    theirs, own = mixture
    parts = [(ours[0], own * ours[1])]
    if release is not None and theirs:
        factors, alpha = read_factors_gguf(release)  # llama.cpp takes alpha / rank of each module, or 1 where alpha is 0
        parts.append(({tensor: (a, b * (alpha / a.shape[0] if alpha else 1.0)) for tensor, (a, b) in factors.items()}, theirs))
    return stacked(parts)


def score(task: Task, answer: str, record: Record) -> float:
    """1 for the right verdict and 0 for another; for free text its likeness to the confirmed answer."""
    parsed = task.parse(answer)
    if task.codes:
        return float(bool(record.verdict) and parsed.verdict == record.verdict)
    return chrf(parsed.text, record.target)


def mean(values: Sequence[float]) -> float:
    """0 of nothing."""
    return sum(values) / len(values) if values else 0.0
