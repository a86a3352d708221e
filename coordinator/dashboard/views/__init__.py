"""What the pages show, read from the ledger: questions in, frozen values out. Nothing here writes, and nothing here knows HTML.

nodes.py        how every node is, and what happened on it          series.py       quantities over time, shares with intervals
rounds.py       who was asked, who answered, what came of it        escalations.py  what asking peers brought
overview.py     the first page, and what needs a person             books.py        the audit, and messages that were refused

Rules:
 * A number comes with what it was counted from; where nothing was counted there is None, and the page shows no number.
 * `now` is an argument. Times are seconds since 1970, UTC.
 * A list has at most LIST_LIMIT rows.
"""

LIST_LIMIT = 200
