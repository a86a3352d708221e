"""Judges each answer of this node's model by the node's budget, remembers how, and moves the shipped curve by what was confirmed.

Rules:
 * A row of `judged` is written in the transaction that writes the answer: a kill loses neither or both. At start the last rows say
   what is owed, what was spent in the last 24 hours and what this model's confidences look like; nothing else is kept.
 * Another model, adapter or calibration starts with the confidences of its calibration records; what is owed and spent goes on.
 * The tracker sees the confidences as shipped. A refit is a rising curve over them, so who is asked does not depend on it.
 * A refit learns from answers that were to be asked, of verdict tasks. A text's confirmed answer does not say whether a teacher would
   have been better by the calibration's margin, and what an operator corrects unasked is what looked wrong to him.
 * A question of another node that may be handed on is judged, paid and remembered like an answer of the site, from the one budget. It is
   never asked only to check, and a refit does not read it: what comes of it is the other site's.
Limits: LOG_KEPT rows of about 120 bytes; refits from the newest OUTCOMES_READ.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa

from node.confidence.budget import DAY_S, SLOT_S, WINDOW, Budget, Cost, Decision, Spent, Tracker
from node.confidence.refit import Outcome, Refit, refit
from node.engine.worker import Speaker, Spoken, Worker
from node.parts import Figure, Part
from node.settings import NodeSettings
from node.store import AnswerRow, Store, example_key, is_held_out
from protocol.codec import encode
from protocol.confidence import (
    UNCALIBRATED_THRESHOLD,
    VERDICT_RIGHT,
    Calibration,
    Judgement,
    agreement,
    confidence,
    features,
    meaning,
    sample_tokens,
)
from protocol.digests import digest_bytes
from protocol.errors import MilpaError
from protocol.models.generation import Generation
from protocol.outbox import Executes
from protocol.reasons import Why
from protocol.tasks import Answer, Task, task_named

LOG_KEPT = 20_000  # rows
OUTCOMES_READ = 4_000
REFIT_S = 3_600.0  # seconds between looks at what was confirmed
ENVELOPE_BYTES = 900  # of a question and its reply beside the prompt: two JSON messages, MQTT, TLS and TCP headers; a stated estimate
AGREE_BAND = 2.0  # samples are taken of answers among the least sure `AGREE_BAND * planned share`; elsewhere they decide nothing
SAMPLES_S = 5.0  # seconds that samples may take,
SAMPLES_SHARE = 0.5  # and of the time left until the answer is due: it must still be stored and sent
RECENT = 1_000  # answers over which the realised share is told

log = logging.getLogger("milpa.node")
metadata = sa.MetaData()

judged = sa.Table(
    "judged", metadata,
    sa.Column("row", sa.Integer, primary_key=True),
    sa.Column("answer", sa.String(32), nullable=False, unique=True),
    sa.Column("at", sa.Float, nullable=False),  # seconds since 1970
    sa.Column("judge", sa.String(16), nullable=False, index=True),  # of model, adapter and calibration
    sa.Column("shipped", sa.Float, nullable=False),  # confidence before the refit
    sa.Column("asked", sa.Boolean, nullable=False),  # there was budget for it; whether anybody could be asked is another matter
    sa.Column("chance", sa.Float, nullable=False),  # that such an answer is asked
    sa.Column("plan", sa.Float, nullable=False),  # share to ask at that moment
    sa.Column("owed", sa.Float, nullable=False),  # questions, after this one
    sa.Column("bytes", sa.Float, nullable=False),  # 0 where not asked
    sa.Column("joules", sa.Float, nullable=False),
)  # fmt: skip

refits = sa.Table(
    "refits", metadata,
    sa.Column("judge", sa.String(16), primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("refit", sa.LargeBinary, nullable=False),  # JSON of a Refit
)  # fmt: skip

# task, prompt, how many, temperature, within how many seconds; raises MilpaError when not now
Samples = Callable[[Task, str, int, float, float], list[Generation]]


class Ruling(msgspec.Struct, frozen=True):
    """A judgement, and what `Judge.remember` writes of it."""

    judgement: Judgement
    row: dict[str, Any]


class Judge(Part):
    """Rules on answers. Any thread.

    Args:
        samples: takes the model's own samples, for self-agreement; None: never.
        may_agree: whether there is energy for samples now.
        random: of ties and audits.
    """

    name = "confidence"

    def __init__(
        self,
        store: Store,
        budget: Budget,
        *,
        joules_a_question: float = 0.0,
        refits: bool = True,
        samples: Samples | None = None,
        may_agree: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.time,
        random: random.Random | None = None,
    ) -> None:
        self._store, self._clock, self._random = store, clock, random or _random()
        self._joules, self._refits = joules_a_question, refits
        self._samples, self._may_agree = samples, may_agree
        self._lock = threading.Lock()
        self._tracker = Tracker(budget, fallback=UNCALIBRATED_THRESHOLD)
        self._calibration: Calibration | None = None
        self._speaker: Speaker | None = None
        self._judge = ""
        self._refit = Refit()
        self._cost = Cost(ENVELOPE_BYTES, joules_a_question)  # of the latest question
        self._next_refit = clock() + REFIT_S
        metadata.create_all(store.engine)
        self._restore()

    def rule(self, task: Task, answer: Answer, spoken: Spoken, *, prompt: str, left_s: float, audits: bool = True) -> Ruling:
        """Judge one answer that may be asked of a peer. It counts at once; write it down with `remember`.

        Args:
            left_s: seconds until the answer is due; samples take some of them, or are not taken.
            audits: whether it may be asked, though sure, to check.
        """
        values = features(spoken.generation)
        in_form = bool(answer.verdict) or not task.codes
        now = self._clock()
        with self._lock:
            self._follow(spoken.speaker)
            calibration = self._calibration
            cost = self._cost = Cost(ENVELOPE_BYTES + len(prompt.encode()), self._joules)
        sure = confidence(values, calibration, in_form=in_form)
        alike = self._agreement(task, answer, sure, calibration, prompt, cost, now, left_s) if in_form and left_s > 0 else None
        if alike is not None:
            sure = confidence(values, calibration, agreement=alike)
        with self._lock:
            decision = self._tracker.decide(
                sure,
                cost=cost,
                now=now,
                luck=self._random.random(),
                audit_luck=self._random.random(),
                ask_if_sure=in_form and audits,
            )
            told, limit = self._refit.apply(sure), self._refit.apply(decision.threshold)
            notes = [*([] if calibration else [Why("not-calibrated")]), *([Why("refitted")] if self._refit.used else []), decision.plan.why]
            judge = self._judge
        what = meaning(values, calibration)
        judgement = _judgement(in_form, told, limit, decision, what, notes, self._tracker.budget.audit)
        row = {
            "at": now, "judge": judge, "shipped": sure, "asked": decision.ask, "chance": decision.chance, "plan": decision.plan.share,
            "owed": decision.owed, "bytes": cost.bytes if decision.ask else 0.0, "joules": cost.joules if decision.ask else 0.0,
        }  # fmt: skip
        return Ruling(judgement, row)

    def confidence(self, task: Task, answer: Answer, spoken: Spoken) -> float:
        """How sure the model is of an answer that nobody can be asked about. It counts against no budget, and nothing is kept of it."""
        in_form = bool(answer.verdict) or not task.codes
        with self._lock:
            self._follow(spoken.speaker)
            return self._refit.apply(confidence(features(spoken.generation), self._calibration, in_form=in_form))

    def remember(self, session: Executes, answer: str, ruling: Ruling) -> None:
        """Write the ruling down, inside the caller's transaction, under the id of the answer, or of the reply to another node."""
        session.execute(sa.insert(judged).values(answer=answer, **ruling.row))

    def sweep(self) -> None:
        """Every hour or so: look at what was confirmed, forget the oldest rows."""
        if self._clock() < self._next_refit:
            return
        self._next_refit = self._clock() + REFIT_S
        self.refit()
        with self._store.transaction() as session:
            newest = session.scalar(sa.select(sa.func.max(judged.c.row))) or 0
            session.execute(sa.delete(judged).where(judged.c.row <= newest - LOG_KEPT))

    def refit(self) -> Refit:
        """Fit the correction anew from the confirmed answers of the active model, and use it if it is better."""
        with self._lock:
            judge, calibration = self._judge, self._calibration
        if not self._refits or calibration is None or calibration.target != VERDICT_RIGHT:
            return self._refit
        made = refit(self._outcomes(judge))
        with self._store.transaction() as session:
            session.execute(sa.delete(refits).where(refits.c.judge == judge))
            session.execute(sa.insert(refits).values(judge=judge, at=self._clock(), refit=encode(made)))
        with self._lock:
            if self._judge == judge:
                if made.used != self._refit.used:
                    log.info("confidence: the site's own correction is %s: %s", "used" if made.used else "not used", made.why)
                self._refit = made
        return made

    def reload(self, settings: NodeSettings) -> None:
        """Another budget; what is owed and spent stays."""
        with self._lock:
            self._tracker.budget = budget_of(settings)
            self._joules, self._refits = settings.confidence.joules_a_question, settings.confidence.refit

    def status(self) -> dict[str, Any]:
        """For GET /v1/status."""
        now = self._clock()
        with self._lock:
            plan = self._tracker.plan(self._cost, now)
            threshold = self._tracker.threshold(self._cost, now)
            spent = self._tracker.spent(now)
            calibration, made, owed, budget = self._calibration, self._refit, self._tracker.owed, self._tracker.budget
        realised = self._realised()
        return {
            "calibrated": calibration is not None, "target": calibration.target if calibration else "",
            "method": calibration.method if calibration else "", "plan": plan.share, "bound": plan.bound, "why": str(plan.why),
            "threshold": made.apply(threshold), "realised": realised[0], "planned": realised[1], "over": realised[2],
            "owed": round(owed, 3),
            "day": {
                "bytes": spent[0], "bytes_a_day": budget.bytes_a_day, "joules": spent[1], "joules_a_day": budget.joules_a_day,
            },
            "audit": budget.audit, "refit": msgspec.to_builtins(made),
        }  # fmt: skip

    def figures(self) -> tuple[Figure, ...]:
        """Gauges."""
        return (
            ("escalation_plan_ratio", "Share of the answers to ask of a peer, by the tightest budget", lambda: self._plan().share),
            ("escalation_realised_ratio", f"Share asked of the last {RECENT} answers", lambda: self._realised()[0]),
            ("confidence_threshold_ratio", "Confidence below which answers are asked now", self._threshold),
            ("confidence_refit", "1 while the site's own correction of the shipped curve is used", lambda: float(self._refit.used)),
        )

    # ---- inside

    def _plan(self) -> Any:
        with self._lock:
            return self._tracker.plan(self._cost, self._clock())

    def _threshold(self) -> float:
        with self._lock:
            return self._refit.apply(self._tracker.threshold(self._cost, self._clock()))

    def _follow(self, speaker: Speaker) -> None:
        """Judge by this speaker's calibration from now on."""
        if speaker is self._speaker:
            return
        self._speaker, before = speaker, self._judge
        self._calibration = speaker.calibration
        self._judge = judge_name(speaker)
        if self._judge == before:
            return
        self._tracker.begin(self._calibration.quantiles if self._calibration else (), fallback=UNCALIBRATED_THRESHOLD)
        with self._store.transaction() as session:
            rows = session.scalars(
                sa.select(judged.c.shipped).where(judged.c.judge == self._judge).order_by(judged.c.row.desc()).limit(WINDOW)
            ).all()
            kept = session.scalar(sa.select(refits.c.refit).where(refits.c.judge == self._judge))
        self._tracker.restore(scores=reversed(rows))
        self._refit = msgspec.json.decode(kept, type=Refit) if kept and self._refits else Refit()

    def _restore(self) -> None:
        """What is owed and spent, from the last rows."""
        now = self._clock()
        slot = sa.cast(judged.c.at / SLOT_S, sa.Integer)
        with self._store.transaction() as session:
            owed = session.scalar(sa.select(judged.c.owed).order_by(judged.c.row.desc()).limit(1)) or 0.0
            times = session.scalars(sa.select(judged.c.at).order_by(judged.c.row.desc()).limit(WINDOW)).all()
            spent = session.execute(
                sa.select(sa.func.max(judged.c.at), sa.func.sum(judged.c.bytes), sa.func.sum(judged.c.joules))
                .where(judged.c.asked, judged.c.at > now - DAY_S)
                .group_by(slot)
                .order_by(slot)
            ).all()
        self._tracker.restore(
            times=reversed(times), spent=[Spent(float(at), Cost(float(size), float(energy))) for at, size, energy in spent], owed=owed
        )

    def _agreement(
        self, task: Task, answer: Answer, sure: float, calibration: Calibration | None, prompt: str, cost: Cost, now: float, left_s: float
    ) -> float | None:
        """The samples' agreement, where the calibration knows what to make of it, it may decide something, and there is energy."""
        if self._samples is None or calibration is None or calibration.agreed is None or not self._may_agree():
            return None
        with self._lock:
            near = self._tracker.share_below(sure) < AGREE_BAND * self._tracker.plan(cost, now).share
        if not near:
            return None
        try:
            seconds = min(SAMPLES_S, SAMPLES_SHARE * left_s)
            said = self._samples(task, prompt, calibration.agreed.samples, calibration.agreed.temperature, seconds)
        except MilpaError as error:  # answers wait, or time is short: the answer goes without
            log.debug("no samples: %s", error)
            return None
        return agreement(answer.text, [one.text for one in said], task)

    def _outcomes(self, judge: str) -> list[Outcome]:
        answers: Any = AnswerRow.__table__
        columns = (judged.c.shipped, judged.c.chance, answers.c.task, answers.c.lang, answers.c.source, answers.c.local, answers.c.verdict)
        with self._store.transaction() as session:
            rows = session.execute(
                sa.select(*columns)
                .join(answers, answers.c.id == judged.c.answer)
                .where(judged.c.judge == judge, judged.c.asked, judged.c.chance > 0, answers.c.by != "")
                .order_by(judged.c.row.desc())
                .limit(OUTCOMES_READ)
            ).all()
        found = []
        for row in rows:
            said = task_named(row.task).parse(row.local).verdict
            if said:
                held_out = is_held_out(example_key(row.task, row.lang, row.source))
                found.append(Outcome(row.shipped, said == row.verdict, row.chance, held_out))
        return found

    def _realised(self) -> tuple[float, float, int]:
        """Share asked, share planned, and of how many answers."""
        last = sa.select(judged.c.asked, judged.c.plan).order_by(judged.c.row.desc()).limit(RECENT)
        with self._store.transaction() as session:
            rows = session.execute(last).all()
        if not rows:
            return 0.0, 0.0, 0
        return sum(row.asked for row in rows) / len(rows), sum(row.plan for row in rows) / len(rows), len(rows)


def samples_of(worker: Worker) -> Samples:
    """The active model's own samples, when nobody waits for it."""

    def samples(task: Task, prompt: str, count: int, temperature: float, seconds: float) -> list[Generation]:
        return worker.sample(
            task.name, prompt, n=count, temperature=temperature, seed=0, max_new_tokens=sample_tokens(task), deadline_s=seconds,
            form=task.form,
        )  # fmt: skip

    return samples


def judge_name(speaker: Speaker) -> str:
    """Names what a confidence is made of: model, adapter and calibration."""
    numbers = encode(speaker.calibration) if speaker.calibration else b""
    return digest_bytes(b"\0".join((speaker.model_digest.encode(), speaker.adapter_digest.encode(), numbers)))[:16]


def budget_of(settings: NodeSettings) -> Budget:
    """The budget that the settings name."""
    limits = settings.confidence
    return Budget(settings.model.budget, float(limits.bytes_a_day), limits.joules_a_day, limits.audit)


def _judgement(in_form: bool, sure: float, limit: float, decision: Decision, what: Why, notes: list[Why], audit: float) -> Judgement:
    if not in_form:
        return Judgement(False, 0.0, Why("not-in-form").noting(*notes), ask=decision.ask)
    figures: dict[str, float | Why] = {"what": what, "sure": sure, "limit": limit}
    if decision.audit:
        return Judgement(False, sure, Why("audited", {**figures, "audit": audit}).noting(*notes), ask=True)
    tie = decision.ask and sure >= limit  # decided by lot
    return Judgement(
        not decision.ask, sure, Why("at" if tie else "below" if decision.ask else "not-below", figures).noting(*notes), ask=decision.ask
    )  # fmt: skip


def _random() -> random.Random:
    return random.Random()
