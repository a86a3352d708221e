"""The local HTTP API: `routes.py` says what is offered, `shapes.py` how bodies look, `guard.py` who may ask and how much, `metrics.py` what
is counted, `server.py` runs it in a thread. Bound to this machine unless a key is set."""
