"""A round: what the sites learned becomes release n+1, if it is better; if not, the reason in words.

    collect -> admit -> merge -> choose eta on dev sets -> judge on held-out sets -> gate -> calibrate -> publish -> ledger

Rules:
 * What arrived is a file and a ledger row before anything is computed from it. A round that dies is taken up where it was: the folder
   `rounds/<n>` holds the replies, evaluations are kept by digest of model, adapter and records; how it opens and ends is in `rounds.py`.
 * A site that did not answer counts with its last accepted adapter of the same base and start, its weight halved a release.
 * eta and the calibration are chosen on dev sets, the gate judges on held-out sets. Give disjoint files.
 * An adapter-only release: model and initial adapter stay as they are, so nodes download some MB and swap.
Nothing here knows Flower: that is `collect`.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from coordinator.federation import admission, gate, merge
from coordinator.federation.collect import Reply, collect, load, read_adapter
from coordinator.federation.rounds import Opened, Result, decide, finish_what_was_decided, locked, open_round, told
from coordinator.federation.superlink import Keys
from coordinator.fleet.ledger import Ledger
from coordinator.fleet.publishing import Publisher
from coordinator.forge.judging import calibrate, evidence
from coordinator.forge.judging.evaluation import Evaluation, evaluate, paired_bootstrap
from protocol.adapters import AdapterHeader, AdapterQuestion, Flat
from protocol.blobs import write_atomically
from protocol.confidence import FEATURES, Calibration
from protocol.digests import digest_file, digest_value
from protocol.errors import BadInput, NotEnough, Unavailable
from protocol.releases import KnownAnswer, Release, ReleaseFile, Role
from protocol.tasks import Record, Task, task_named

GENERAL = "general"  # the set that must not get worse; every other set is a site's
KNOWN_ANSWERS = 4
CLEAR = -0.2  # log-probability of the least likely token of a known answer: another processor's rounding must not turn it
STUDENT: Role = "student"
ONLY_BEFORE = (
    "Teacher, float student and peers: a round compares with the release before and nothing else. How far this model file is from its "
    "teacher stands in the evidence it was first released with."
)

Progress = Callable[[str, int, int], None]  # (what, done, total); total 0: no telling


class Options(msgspec.Struct, frozen=True):
    """What an operator may choose about a round."""

    expected: tuple[str, ...] = ()  # sites to wait for; empty: whoever is connected
    deadline_s: float = 120.0  # for collecting
    etas: tuple[float, ...] = (1.0,)  # server scales to try on the dev sets
    max_rank: int = 64  # of the merged adapter; above it, truncation
    clip_factor: float = 0.0  # clip norms at this many times their median; 0: no clipping
    minimum_examples: int = admission.MINIMUM_EXAMPLES
    norm_share: float = 0.5  # of the adapted weights' own norm: a change this large is no correction
    margin: float = gate.GENERAL_MARGIN
    dry_run: bool = False  # everything but the release
    threads: int = 2
    seed: int = 12345


class _Adapter(msgspec.Struct, frozen=True):
    """An adapter that may be merged, and the round whose folder holds it."""

    header: AdapterHeader
    flat: Flat
    digest: str
    round: int


def run_round(
    store: Path,
    *,
    ledger: Ledger,
    superlink: str,
    keys: Keys,
    superlink_ca: str = "",
    heldout: Mapping[str, Sequence[Record]],
    dev: Mapping[str, Sequence[Record]] | None = None,
    files: Mapping[str, Path] | None = None,
    options: Options | None = None,
    progress: Progress = lambda what, done, total: None,
    clock: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """Run one round to its end, or take up the one that was left open.

    Args:
        store: the coordinator's folder; `repository/`, `rounds/` and `evaluations/` lie in it.
        superlink: HOST:PORT.
        superlink_ca: who signs its certificate, a PEM file; "" is plain HTTP.
        heldout: "general" and site names -> records that neither trained nor chose anything.
        dev: the same for choosing eta and fitting the calibration; without it eta is the first and no calibration is shipped.
        files: where each held-out set came from, for the command in the evidence that measures it again; without them it has none.

    Returns:
        `Result` as a dict without the manifest: round, base_release, decision, reasons, release (None if there is none), accepted,
        refused, eta, etas, rank, relative_error, sets (before and after each), figures, seconds.

    Raises:
        BadInput: no release with an initial adapter, no held-out set of a site, a refused token.
        Unavailable: no SuperLink and nothing collected earlier; or another round runs in this store.
    """
    options = options or Options()
    if not any(name != GENERAL for name in heldout):
        raise BadInput("no held-out set of a site was given: without one nothing can be shown to be better")
    if not options.etas:
        raise BadInput("no eta was given; 1 is the weighted mean")
    began = time.monotonic()
    publisher = Publisher(store / "repository")
    rounds = store / "rounds"
    rounds.mkdir(parents=True, exist_ok=True)
    with locked(rounds / "lock"):
        if (decided := finish_what_was_decided(store, publisher, ledger)) is not None:
            return told(decided)
        base = _Base.of(publisher)
        opened = open_round(
            rounds, ledger, base.release, expected=options.expected, deadline_s=options.deadline_s, now=int(clock())
        )  # fmt: skip
        work = _Round(store, publisher, ledger, base, opened, options, files or {}, progress, clock)
        adapters, accepted, refused = work.collect(superlink, keys, superlink_ca)
        if not adapters:
            reason = "no adapter was accepted" if refused else "no site had an adapter"
            result = Result(opened.number, base.release.number, "no adapters", (reason,), refused=refused)
        else:
            result = work.judge(adapters, heldout, dev or {})
            result = msgspec.structs.replace(result, accepted=accepted, refused=refused)
        result = msgspec.structs.replace(result, seconds=round(time.monotonic() - began, 3))
        decide(store, publisher, ledger, result)
    return told(result)


class _Base(msgspec.Struct, frozen=True):
    """The active release: what the sites trained on and what the merged model is judged against."""

    release: Release
    task: Task
    model: Path
    adapter: Path | None
    initial: ReleaseFile
    initial_path: Path

    @classmethod
    def of(cls, publisher: Publisher) -> "_Base":
        """The newest release.

        Raises:
            BadInput: there is none, or it has no student or no initial adapter.
        """
        release = publisher.latest()
        if release is None:
            raise BadInput(f"{publisher.root} has no release yet; publish one before a round")
        model, initial, adapter = (release.file(STUDENT, kind) for kind in ("model", "initial-adapter", "adapter"))
        if model is None or initial is None:
            raise BadInput(f"release {release.number} has no student with an initial adapter: nothing trained on it could be merged")
        path = publisher.blobs.path
        return cls(
            release, task_named(release.task), path(model.digest), path(adapter.digest) if adapter else None, initial, path(initial.digest)
        )

    @property
    def digest(self) -> str:
        """Of the student's model file."""
        return next(file.digest for file in self.release.files if file.role == STUDENT and file.kind == "model")

    def expected(self, options: Options) -> admission.Expected:
        """What an adapter of this round must be."""
        from protocol.models.checkpoint import Checkpoint  # reads GGUF; torch stays out
        from protocol.models.lora import read_adapter_gguf

        checkpoint = Checkpoint.read(self.model)
        _, layout = read_adapter_gguf(self.initial_path)
        squares = sum(float((checkpoint.array(module.tensor) ** 2).sum(dtype="float64")) for module in layout.modules)
        return admission.Expected(
            release=self.release.number, base_digest=self.digest, initial_digest=self.initial.digest,
            modules=dict(checkpoint.matrices()), norm_limit=options.norm_share * squares**0.5, minimum_examples=options.minimum_examples,
        )  # fmt: skip


class _Round:
    """One round under way."""

    def __init__(
        self,
        store: Path,
        publisher: Publisher,
        ledger: Ledger,
        base: _Base,
        opened: Opened,
        options: Options,
        files: Mapping[str, Path],
        progress: Progress,
        clock: Callable[[], float],
    ) -> None:
        self.store, self.publisher, self.ledger, self.base, self.opened = store, publisher, ledger, base, opened
        self.options, self.files, self.progress, self.clock = options, files, progress, clock
        self.folder = store / "rounds" / str(opened.number)
        self.expected = base.expected(options)

    # -------------------------------------------------------------------------------------------------------- collecting

    def collect(
        self, superlink: str, keys: Keys, superlink_ca: str
    ) -> tuple[list[_Adapter], tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
        """Ask, write every reply down as it comes, admit. Returns what may be merged, and both lists for the result."""
        question = AdapterQuestion(self.base.release.number, self.base.digest, self.base.initial.digest)
        others: list[dict[str, Any]] = []
        heard: set[str] = set()

        def on_reply(reply: Reply) -> None:
            heard.add(reply.node)
            self.progress(f"{reply.node or 'a node'}: {reply.code}", len(heard), len(self.options.expected))
            if reply.code == "adapter":
                self._write_down(reply, read_adapter(self.folder, reply))
                return
            others.append({"site": reply.node, "reason": reply.code, "detail": reply.detail})
            if reply.node:
                self.ledger.add_reply(
                    self.opened.number, reply.node, reply.header, reply.digest, False, _words(reply.code, reply.detail), int(self.clock())
                )

        for reply, flat in load(self.folder):  # of an earlier attempt at this round
            self._write_down(reply, flat)
            heard.add(reply.node)
        try:
            collect(
                superlink, question, self.folder, token=keys.control, secret=keys.secret, ca=superlink_ca, seconds=self.options.deadline_s,
                expected=self.options.expected, flower_home=self.store / "flower", on_reply=on_reply,
                on_progress=lambda text: self.progress(text, len(heard), len(self.options.expected)),
            )  # fmt: skip
        except Unavailable:
            if not heard:
                raise
            self.progress("no SuperLink; going on with what was collected before", len(heard), len(self.options.expected))
        for name in self.options.expected:
            if name not in heard:
                detail = f"no answer within {self.options.deadline_s:g} s"
                others.append({"site": name, "reason": "no-reply", "detail": detail})
                self.ledger.add_reply(self.opened.number, name, None, "", False, _words("no-reply", detail), int(self.clock()))
        return self._admit(others)

    def _write_down(self, reply: Reply, flat: Flat | None) -> None:
        """The ledger row of one adapter, the moment it is here; what shows only later (`outlier`, `duplicate`) is corrected then."""
        assert reply.header is not None
        if flat is None:
            accepted, reason = False, _words("damaged", "the stored array is not the one its digest names")
        else:
            decision = admission.admit_one(reply.header, flat, self.expected)
            accepted, reason = decision.accepted, _words(decision.reason, decision.detail)
        self.ledger.add_reply(self.opened.number, reply.node, reply.header, reply.digest, accepted, reason, int(self.clock()))

    def _admit(self, others: list[dict[str, Any]]) -> tuple[list[_Adapter], tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
        fresh = _adapters_in(self.folder, self.opened.number)
        decisions = admission.admit([(one.header, one.flat) for one in fresh], self.expected)
        taken = [one for one, decision in zip(fresh, decisions, strict=True) if decision.accepted]
        refused = list(others)
        for one, decision in zip(fresh, decisions, strict=True):
            if not decision.accepted:
                refused.append({"site": decision.site, "reason": decision.reason, "detail": decision.detail})
                self.ledger.refuse_reply(self.opened.number, decision.site, one.digest, _words(decision.reason, decision.detail))
        if taken:  # without a fresh one there is nothing new to merge
            taken += self._kept_from_before({one.header.site for one in taken})
        norms = {decision.site: decision.norm for decision in decisions if decision.accepted}
        accepted = tuple(
            {"site": one.header.site, "examples": one.header.examples, "release": one.header.release, "from_round": one.round,
             "norm": norms.get(one.header.site, merge.norm(one.header, one.flat)),
             "loss_before": one.header.loss_before, "loss_after": one.header.loss_after}
            for one in taken
        )  # fmt: skip
        return taken, accepted, tuple(refused)

    def _kept_from_before(self, have: set[str]) -> list[_Adapter]:
        """The last admissible adapter of every site that is not in this round, from the folders of earlier rounds."""
        found: list[_Adapter] = []
        earlier = (path for path in (self.store / "rounds").iterdir() if path.name.isdigit() and int(path.name) < self.opened.number)
        for folder in sorted(earlier, key=lambda path: -int(path.name)):
            for one in _adapters_in(folder, int(folder.name)):
                site = one.header.site
                if site not in have and admission.admit_one(one.header, one.flat, self.expected).accepted:
                    have.add(site)
                    found.append(one)
                    reason = f"accepted: kept from round {folder.name}"
                    self.ledger.add_reply(self.opened.number, site, one.header, one.digest, True, reason, int(self.clock()))
        return found

    # ----------------------------------------------------------------------------------------------------------- judging

    def judge(self, adapters: Sequence[_Adapter], heldout: Mapping[str, Sequence[Record]], dev: Mapping[str, Sequence[Record]]) -> Result:
        """Merge, choose eta, compare with the active release, decide."""
        release = self.base.release.number
        contributions = [merge.Contribution(one.header, one.flat, merge.weight_of(one.header, release=release)) for one in adapters]
        if self.options.clip_factor:
            norms = sorted(merge.norm(one.header, one.flat) for one in contributions)
            contributions = merge.clip(contributions, bound=self.options.clip_factor * norms[len(norms) // 2])
        files: dict[float, Path] = {}
        rank, lost = 0, 0.0
        for eta in self.options.etas:
            files[eta], rank, lost = self._candidate(contributions, eta)
        eta, scores, on_dev = self._choose(files, dev)
        before = {name: self._evaluate(self.base.adapter, records, f"release {release}", name) for name, records in heldout.items()}
        after = {name: self._evaluate(files[eta], records, "merged", name) for name, records in heldout.items()}
        sets = {name: compared(name, before[name], after[name], seed=self.options.seed) for name in heldout}
        sites = [comparison for name, comparison in sets.items() if name != GENERAL]
        together = pooled(before, after, seed=self.options.seed)
        decision = gate.decide(together, general=sets.get(GENERAL), sites=sites, margin=self.options.margin)
        result = Result(
            round=self.opened.number, base_release=release, decision="not better", reasons=decision.reasons, eta=eta, etas=scores,
            rank=rank, relative_error=lost, sets={name: _plain(comparison) for name, comparison in {**sets, "sites": together}.items()},
            figures={name: {"before": before[name].figures(), "after": after[name].figures()} for name in heldout},
        )  # fmt: skip
        if not decision.release:
            return result
        if self.options.dry_run:
            return msgspec.structs.replace(result, decision="would release")
        return self._released(result, files[eta], before, after, heldout, on_dev)

    def _candidate(self, contributions: Sequence[merge.Contribution], eta: float) -> tuple[Path, int, float]:
        """The merged adapter as a file for llama.cpp; its rank and what truncation lost."""
        from protocol.models.lora import write_adapter_gguf

        flat, header = merge.merge(contributions, eta=eta)
        flat, header, lost = merge.truncate(flat, header, rank=self.options.max_rank)
        path = self.folder / f"merged-{eta:g}.gguf"
        write_adapter_gguf(path, flat, header)
        return path, header.rank, lost

    def _choose(self, files: Mapping[float, Path], dev: Mapping[str, Sequence[Record]]) -> tuple[float, dict[str, float], list[Evaluation]]:
        """The eta (see `gate.smallest_as_good`), the mean of each over the dev sets, and the winner's evaluations, for the calibration."""
        if not dev:
            return self.options.etas[0], {}, []
        kept = {
            eta: [self._evaluate(files[eta], records, f"merged, eta {eta:g}", f"dev {name}") for name, records in dev.items()]
            for eta in sorted(files)
        }
        eta, scores = gate.smallest_as_good({eta: [one.quality() for one in sets] for eta, sets in kept.items()})
        return eta, {f"{eta:g}": score for eta, score in scores.items()}, kept[eta]

    def _evaluate(self, adapter: Path | None, records: Sequence[Record], what: str, where: str) -> Evaluation:
        """The base model with that adapter on those records; remembered by their digests."""
        spoken = digest_file(adapter) if adapter else ""
        key = digest_value([self.base.digest, spoken, [msgspec.to_builtins(record) for record in records], "1"])
        path = self.store / "evaluations" / f"{key}.json"
        if path.is_file():
            with contextlib.suppress(msgspec.DecodeError):  # a spoiled file is measured again
                return msgspec.json.decode(path.read_bytes(), type=Evaluation)
        found = evaluate(
            self.base.model, records, self.base.task, adapter=adapter, threads=self.options.threads, name=what, seed=self.options.seed,
            progress=lambda done, total: self.progress(f"{what} on {where}", done, total),
        )  # fmt: skip
        write_atomically(path, msgspec.json.encode(found))
        return found

    # --------------------------------------------------------------------------------------------------------- releasing

    def _released(
        self,
        result: Result,
        adapter: Path,
        before: Mapping[str, Evaluation],
        after: Mapping[str, Evaluation],
        heldout: Mapping[str, Sequence[Record]],
        on_dev: Sequence[Evaluation],
    ) -> Result:
        """Describe release n+1: the old files, the merged adapter, its calibration and its evidence. Publishes nothing."""
        old = self.base.release
        calibration, told = fit(on_dev, seed=self.options.seed)
        now = int(self.clock())
        blobs = self.publisher.blobs
        files = [file for file in old.files if file.role != STUDENT or file.kind in ("model", "initial-adapter", "rehearsal")]
        digest = blobs.put_file(adapter)
        files.append(ReleaseFile("adapter.gguf", STUDENT, "adapter", digest, adapter.stat().st_size, self.base.digest))
        if calibration is not None:
            files.append(_put(self.publisher, "calibration.json", "calibration", msgspec.json.encode(calibration)))
        found = evidence.bundle(
            release=old.number + 1, task=old.task, seed=self.options.seed, command=self._repeat_line(digest, heldout),
            sets={name: {evidence.STUDENT: after[name], f"release-{old.number}": before[name]} for name in heldout},
            records=heldout, calibration=calibration, created=now, machine=evidence.machine(),
            commit=evidence.commit(), code=evidence.code(),
            lineage=[{"name": f"release {old.number}", "digest": self.base.digest},
                     {"name": f"round {result.round}, eta {result.eta:g}, rank {result.rank}", "digest": digest}],
            not_tested=[*([told] if told else []), ONLY_BEFORE],
        )  # fmt: skip
        files.append(_put(self.publisher, "evidence.json", "evidence", msgspec.json.encode(found)))
        gain = result.sets["sites"]
        manifest = Release(
            number=old.number + 1, task=old.task, created=now, files=tuple(files), previous=old.number, min_memory_mb=old.min_memory_mb,
            note=f"round {result.round}: {100 * (gain['after'] - gain['before']):+.1f} points at the sites together",
            known_answers=known_answers(self.base.task, heldout.get(GENERAL, ()), after.get(GENERAL)),
        )  # fmt: skip
        return msgspec.structs.replace(
            result, decision="released", release=manifest.number, manifest=manifest, evidence=found,
            reasons=result.reasons + ((told,) if told else ()),
        )  # fmt: skip

    def _repeat_line(self, adapter: str, heldout: Mapping[str, Sequence[Record]]) -> str:
        """The command that judges the merged adapter against the release before it again; "" where a set came from no file."""
        if any(name not in self.files for name in heldout):
            return ""
        before = (self.base.model, self.base.adapter)
        return evidence.repeat_line(
            self.base.model, {"--task": self.base.task.name, "--adapter": self.publisher.blobs.path(adapter)}, "--records",
            {name: self.files[name] for name in heldout}, {f"release-{self.base.release.number}": before}, seed=self.options.seed,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- small functions


def compared(name: str, before: Evaluation, after: Evaluation, *, seed: int) -> gate.Comparison:
    """Both on the same records: share of right verdicts, or sentence chrF over 100."""
    return _comparison(name, before.kind, before.quality(), after.quality(), seed)


def pooled(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation], *, seed: int) -> gate.Comparison:
    """All sites' records as one set; the general set is not among them."""
    names = [name for name in before if name != GENERAL]
    sides = [[value for name in names for value in side[name].quality()] for side in (before, after)]
    return _comparison("sites together", before[names[0]].kind, sides[0], sides[1], seed)


def _comparison(name: str, kind: str, before: Sequence[float], after: Sequence[float], seed: int) -> gate.Comparison:
    unit = 1.0 if kind == "verdict" else 100.0
    found = paired_bootstrap(before, after, seed=seed)
    return gate.Comparison(
        name, len(before), sum(before) / len(before) / unit, sum(after) / len(after) / unit, found["low"] / unit, found["high"] / unit,
        found["p"],
    )  # fmt: skip


def fit(on_dev: Sequence[Evaluation], *, seed: int) -> tuple[Calibration | None, str]:
    """The merged model's calibration from its answers on the dev sets; or None and why not."""
    if not on_dev:
        return None, "No calibration: no dev set was given, nodes judge by plain log-probability."
    together = msgspec.structs.replace(on_dev[0], answers=tuple(answer for one in on_dev for answer in one.answers))
    try:
        return calibrate.fit(together, seed=seed), ""
    except NotEnough as error:
        return None, f"No calibration: {error}."


def known_answers(task: Task, records: Sequence[Record], found: Evaluation | None) -> tuple[KnownAnswer, ...]:
    """A few answers of the merged model to general records that were clear at every token. Never a site's record: manifests are public."""
    if found is None:
        return ()
    lowest = FEATURES.index("lowest")
    clear = [
        KnownAnswer(task.prompt(record), answer.text)
        for record, answer in zip(records, found.answers, strict=True)
        if answer.features and answer.features[lowest] > CLEAR and answer.stopped != "length"
    ]
    return tuple(clear[:KNOWN_ANSWERS])


def _plain(comparison: gate.Comparison) -> dict[str, Any]:
    return {**msgspec.to_builtins(comparison), "diff": comparison.diff}


def _words(reason: str, detail: str) -> str:
    return f"{reason}: {detail}" if detail else reason


def _put(publisher: Publisher, name: str, kind: Any, data: bytes) -> ReleaseFile:
    return ReleaseFile(name, STUDENT, kind, publisher.blobs.put_bytes(data), len(data))


def _adapters_in(folder: Path, number: int) -> list[_Adapter]:
    """Whole adapters in a round's folder, each site's each digest once."""
    found = {
        (reply.node, reply.digest): _Adapter(reply.header, flat, reply.digest, number)
        for reply, flat in load(folder)
        if flat is not None and reply.header is not None
    }
    return list(found.values())
