"""A round: ask every node what it learned, admit, merge, prove, and only then release.

superlink   Flower's SuperLink behind a guard            flower      the only file here that imports flwr
collect     one question a node, replies to files        admission   accept or refuse an adapter, with a named reason
merge       the sum of products, in low-rank form        gate        is the merged model better? a decision with reasons
round       the use case, resumable                      evidence comes from `coordinator.forge.judging.evaluation`

admission, merge and gate do no I/O. Flower runs in child processes, because it ends its own process when a token is refused.
"""
