"""Known answers: a new release must give them again, on this machine, before it goes live. No I/O.

The coordinator takes only prompts whose greedy answer was clear at every token, so that another processor's rounding does not change it.
"""

from collections.abc import Callable

from protocol.errors import DoesNotFit
from protocol.releases import Release, Role


def known_answers_hold(generate: Callable[[str], str], release: Release, *, role: Role = "student") -> None:
    """Compare the candidate's greedy answers with the manifest's.

    Args:
        generate: prompt to text, by the candidate.
        role: the answers are the student's; for a teacher there is nothing to compare.

    Raises:
        DoesNotFit: another answer came out; the message says which, and shows no text.
    """
    for index, known in enumerate(release.known_answers if role == "student" else (), start=1):
        if generate(known.prompt).strip() != known.text.strip():
            raise DoesNotFit(f"known answer {index} of {len(release.known_answers)} of release {release.number} did not come out again")
