"""The forge: from a teacher to a small quantised student, with evidence.

teacher trim correct student    the general model, trimmed, corrected on the task, and cut
cache distil losses             what the teacher said and how sure it was, kept; what the student learns from it
export pipeline                 GGUF by our writer; all stages, cached and resumable
evaluation engine_process       the GGUF itself on held-out records, in processes of its own
metrics calibrate peers         intervals and paired tests; confidence; the system a user would pick instead
evidence report charts          the bundle of a release, its page, and the page of a run
pairs                           a user's own files
"""
