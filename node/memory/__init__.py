"""What a site has been told once need not be worked out again: confirmed answers, and its operator's own patterns.

rules      which remembered answer fits a record, and when a near one may be trusted (no I/O)
table      what is remembered: rows in the node's own database, changed in the same transaction as the answer they come from
vectors    the same as vectors, in a file of their own that can be thrown away; the only home of apsw and sqlite-vec
recall     the use cases: exact, near, examples, and what the operator may do
making     the thread that makes vectors, and learns from which similarity on near answers are trusted
sharing    patterns the operator marked shareable, as events, over a link rich enough
commands   `milpa-node memory`                       routes     /v1/memory
"""
