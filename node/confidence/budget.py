"""A budget becomes a threshold: which of a site's answers are asked of a peer. No I/O: scores, times and luck come in, a decision out.

The plan is a share of the questions: the smallest of the share the operator set, and of what the day's bytes and the day's joules pay for
at the site's own rate of questions. The threshold follows the plan by two rules:

 * an answer's rank among the site's recent confidences is a number in [0, 1), even if the model or the season changed since the
   calibration: rank = (how many are lower + luck * (how many are equal + 1)) / (how many + 1). By itself it is uniform where the
   recent ones are like the new one (the smoothed p-value of Vovk et al. 2005), so `rank < plan` asks the planned share. Luck decides
   ties, so that answers of one confidence are asked in turn and not all or none.
 * what was asked too little or too much is made good: rank < plan + owed / HORIZON, where `owed` is the sum of plan minus asked so far.
   The right side reaches 1, or 0, before more than HORIZON questions are owed either way, whatever the scores do; so over n
   questions the asked share is within 2 * HORIZON / n of the plan, and in a stationary season within a few questions.

A small share of the sure answers is asked too (`audit`): only so are sure answers ever confirmed, which `refit` needs. They are part of the
plan, not on top of it. Bytes and joules are also counted over the last 24 hours, and nothing is asked that would go past them.
Limits: WINDOW scores; the rate of questions is that of the last WINDOW of them. A clock set forward forgets what was spent before.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from protocol.reasons import Code, Why

WINDOW = 256  # scores; long enough for a 5% threshold, short enough for a change of season
HORIZON = 20.0  # questions owed at most; 20 of 1,000 are the 2 points promised. Shorter makes the threshold restless: docs/adr/0022
DAY_S = 86_400.0
ENOUGH_TIMES = 20  # answers before their rate is believed
ASSUMED_A_DAY = 1_440.0  # questions until then: one a minute
SLOT_S = 60.0  # seconds of asking that are counted together
SLOTS = 4_000  # a day has 1,440; more only where the clock jumps
COLD = 20  # scores without a calibration before a rank is taken among them; until then the fixed threshold stands


class Budget(msgspec.Struct, frozen=True):
    """What may be spent on asking. 0 of bytes or joules: no limit."""

    share: float = 0.25  # of the questions
    bytes_a_day: float = 0.0
    joules_a_day: float = 0.0
    audit: float = 0.02  # share of the sure answers that are asked regardless


class Cost(msgspec.Struct, frozen=True):
    """Of asking one question, its reply included."""

    bytes: float = 0.0
    joules: float = 0.0


class Plan(msgspec.Struct, frozen=True):
    """The share to ask now, and which budget says so."""

    share: float
    bound: str  # "share", "bytes" or "joules"
    why: Why  # "share budget 25%", "20000 bytes a day pay for 3.1%"


class Decision(msgspec.Struct, frozen=True):
    """About one answer."""

    ask: bool
    audit: bool  # asked although sure
    chance: float  # that such an answer is asked, in [0, 1]: what an inverse propensity needs
    threshold: float  # the confidence below which answers are asked now
    plan: Plan
    owed: float  # questions, after this one


class Spent(msgspec.Struct, frozen=True):
    """What was asked in a while."""

    at: float  # its end, seconds since 1970
    cost: Cost


class Tracker:
    """Follows one budget. Not safe for several threads: its owner holds a lock.

    Args:
        prior: confidences of the calibration records, that stand in for the site's until it has its own.
        fallback: the threshold while there are neither.
    """

    def __init__(self, budget: Budget, *, prior: Sequence[float] = (), fallback: float = 0.5) -> None:
        self.budget = budget
        self.owed = 0.0
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._times: deque[float] = deque(maxlen=WINDOW)
        self._spent: deque[Spent] = deque(maxlen=SLOTS)
        self.begin(prior, fallback=fallback)

    def begin(self, prior: Sequence[float], *, fallback: float = 0.5) -> None:
        """Another model speaks: its confidences are other numbers. What is owed and spent stays."""
        self.fallback = fallback
        self._recent.clear()
        self._sorted = []
        for value in prior[:WINDOW]:
            self._remember(value)

    def restore(
        self, *, scores: Iterable[float] = (), times: Iterable[float] = (), spent: Iterable[Spent] = (), owed: float | None = None
    ) -> None:
        """Go on where an earlier process was; all oldest first, `scores` of the active model only."""
        for score in scores:
            self._remember(score)
        self._times.extend(times)
        for each in spent:
            self._pay(each.cost, each.at)
        if owed is not None:
            self.owed = _within(owed, -HORIZON, HORIZON)

    def decide(self, score: float, *, cost: Cost, now: float, luck: float, audit_luck: float, ask_if_sure: bool = True) -> Decision:
        """Whether the answer of confidence `score` is asked; it counts from now on.

        Args:
            luck, audit_luck: uniform in [0, 1), independent.
            ask_if_sure: False where an audit makes no sense.
        """
        plan = self.plan(cost, now)
        level = plan.share + self.owed / HORIZON if plan.share > 0 else 0.0
        chance = self._chance(score, level)
        ask = self._rank(score, luck) < level if self._warm else level >= 1 or (score < self.fallback and level > 0)
        audits = self.budget.audit if ask_if_sure and level > 0 else 0.0
        audit = not ask and audit_luck < audits
        threshold = self._threshold(level)
        self.owed += plan.share - float(ask or audit)
        self._remember(score)
        self._times.append(now)
        if ask or audit:
            self._pay(cost, now)
        return Decision(ask or audit, audit, chance + (1 - chance) * audits, threshold, plan, self.owed)

    def plan(self, cost: Cost, now: float) -> Plan:
        """The share to ask now: the tightest budget decides."""
        budget = self.budget
        plans = [Plan(budget.share, "share", Why("share-budget", {"share": budget.share}))]
        bytes_spent, joules_spent = self.spent(now)
        limits: tuple[tuple[str, Code, Code, float, float, float], ...] = (
            ("bytes", "bytes-spent", "bytes-pay", budget.bytes_a_day, bytes_spent, cost.bytes),
            ("joules", "joules-spent", "joules-pay", budget.joules_a_day, joules_spent, cost.joules),
        )
        for name, all_gone, pays, a_day, spent, each in limits:
            if a_day <= 0 or each <= 0:
                continue
            if spent + each > a_day:
                plans.append(Plan(0.0, name, Why(all_gone, {"a_day": a_day})))
            else:
                share = min(1.0, a_day / (each * self.questions_a_day()))
                plans.append(Plan(share, name, Why(pays, {"a_day": a_day, "share": share})))
        return min(plans, key=lambda plan: plan.share)

    def questions_a_day(self) -> float:
        """By the last WINDOW answers."""
        if len(self._times) < ENOUGH_TIMES:
            return ASSUMED_A_DAY
        span = max(self._times) - min(self._times)  # not last minus first: a clock may be set back
        return max(1.0, (len(self._times) - 1) * DAY_S / max(span, 1.0))

    def spent(self, now: float) -> tuple[float, float]:
        """Bytes and joules of the last 24 hours; what is dated in the future was just spent, by a clock since set back."""
        while self._spent and self._spent[0].at <= now - DAY_S:
            self._spent.popleft()
        return math.fsum(each.cost.bytes for each in self._spent), math.fsum(each.cost.joules for each in self._spent)

    def threshold(self, cost: Cost, now: float) -> float:
        """The confidence below which answers are asked now, luck apart."""
        plan = self.plan(cost, now)
        return self._threshold(plan.share + self.owed / HORIZON if plan.share > 0 else 0.0)

    def share_below(self, score: float) -> float:
        """Share of the recent answers that were less sure."""
        return bisect_left(self._sorted, score) / max(1, len(self._sorted))

    @property
    def _warm(self) -> bool:
        return len(self._sorted) >= COLD

    def _pay(self, cost: Cost, at: float) -> None:
        end = (at // SLOT_S + 1) * SLOT_S  # counted a minute too long rather than too short
        if self._spent and self._spent[-1].at == end:
            before = self._spent.pop().cost
            cost = Cost(before.bytes + cost.bytes, before.joules + cost.joules)
        self._spent.append(Spent(end, cost))

    def _rank(self, score: float, luck: float) -> float:
        lower = bisect_left(self._sorted, score)
        equal = bisect_right(self._sorted, score) - lower
        return (lower + luck * (equal + 1)) / (len(self._sorted) + 1)

    def _chance(self, score: float, level: float) -> float:
        """Probability over luck that the rank is below the level."""
        if not self._warm:
            return float(level >= 1 or (score < self.fallback and level > 0))
        lower = bisect_left(self._sorted, score)
        equal = bisect_right(self._sorted, score) - lower
        return _within((level * (len(self._sorted) + 1) - lower) / (equal + 1), 0.0, 1.0)

    def _threshold(self, level: float) -> float:
        if level <= 0:
            return 0.0
        if not self._warm:
            return self.fallback
        return self._sorted[min(len(self._sorted) - 1, max(0, math.ceil(level * (len(self._sorted) + 1)) - 1))]

    def _remember(self, score: float) -> None:
        if len(self._recent) == WINDOW:
            gone = self._recent.popleft()
            del self._sorted[bisect_left(self._sorted, gone)]
        self._recent.append(score)
        insort(self._sorted, score)


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
