"""The model at work: `worker.py` is the thread that owns it. The engine itself is `protocol/models/engine.py`, shared with the evidence."""
