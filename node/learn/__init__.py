"""What a site learned, and how it leaves: as one flat array of adapter factors, never as text.

rules       when to train and sync, what is good enough; no I/O     learner    the daemon's thread that decides and watches
examples    confirmed answers -> training and held-out parts       session    one training from examples to judgement; `process`: as a child
underway    a training on disk while it is not finished            train      LoRA on the active release, within a budget
stored      the trained adapter on disk, whole or not at all       judging    does it answer better here?   site   the adapter that answers
sync        a window in which the coordinator may ask for it       flower     the only file here that imports flwr
commands    `milpa-node learn`, `milpa-node sync`                      needs      the libraries of a training, and how they get here

The daemon imports `learner` and `commands`, which load neither torch nor flwr. Training and syncing are processes that end.
"""
