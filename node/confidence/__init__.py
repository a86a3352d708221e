"""How sure is sure enough here: what the site's budget lets ask, and what its own confirmed answers say about the shipped curve.

budget.py    a budget becomes a threshold that follows what the site really sends; rules only
refit.py     the shipped curve moved toward the site's confirmed answers; rules only
judging.py   both around one answer, and what of them is kept in the node's store
"""
