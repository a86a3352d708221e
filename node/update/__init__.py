"""How a signed release comes onto this node and goes live.

updater.py    the state machine: metadata, download, self-test, switch, confirmed
trust.py      TUF metadata over HTTP, verified and remembered
rules.py      our rules beyond TUF: numbers, fit, the clock floor; no I/O
download.py   resumable fetching by digest, with a byte budget a day
slots.py      the live release, the previous one, and going back by itself
selftest.py   known answers
"""
