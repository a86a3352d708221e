"""What an operator sees: is anything wrong, and what do I do; did the fleet get better, and can I prove it?

routes.py     pages, login, the live line              views/        read-only questions to the ledger
proof.py      evidence bundles as rows and plots       charts.py     SVG geometry, drawn on the server
words.py      numbers, times and texts for a reader    catalogue.py  every text, English and Spanish
auth.py       first account, passwords, sessions       templates/, static/   no scripts needed, nothing from elsewhere
"""
