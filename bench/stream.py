"""Confidences one after the other through a node's budget, a minute apart."""

import random
from collections.abc import Sequence

from node.confidence.budget import Budget, Cost, Tracker
from protocol.confidence import Calibration

EVERY_S = 60.0


def asked(confidences: Sequence[float], calibration: Calibration, *, share: float, seed: int) -> list[bool]:
    """Which are asked of a peer."""
    tracker, luck = Tracker(Budget(share=share), prior=calibration.quantiles), random.Random(seed)
    return [
        tracker.decide(sure, cost=Cost(), now=EVERY_S * minute, luck=luck.random(), audit_luck=luck.random()).ask
        for minute, sure in enumerate(confidences)
    ]
