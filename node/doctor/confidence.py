"""Whether the node's confidence means something, and whether its budget for asking is kept."""

from typing import Any

from node.doctor.finding import Finding

ENOUGH = 500  # answers before a share is judged: the horizon is 20 questions
OFF = 0.05  # of the answers


def confidence(running: dict[str, Any]) -> Finding:
    """What the running node says of its own judgements."""
    told = running.get("confidence")
    if not isinstance(told, dict) or not told.get("over"):
        return Finding("confidence", "good", "nothing was judged yet")
    realised, planned = float(told["realised"]), float(told["planned"])
    shares = f"{realised:.1%} of the last {told['over']} answers were to be asked, {planned:.1%} planned"
    if not told.get("calibrated"):
        return Finding(
            "calibration", "warn", f"not calibrated; {shares}", "publish a release with a calibration (milpa-coordinator calibrate)"
        )
    if told["over"] >= ENOUGH and abs(realised - planned) > OFF:
        return Finding("confidence", "bad", shares, "report this: the budget must hold whatever the site sends")
    if told.get("plan") == 0 and told.get("bound") != "share":
        return Finding(
            "confidence", "warn", str(told["why"]), "nothing is asked until tomorrow; raise confidence.bytes_a_day or joules_a_day"
        )
    return Finding("confidence", "good", f"{shares}; {told['why']}")
