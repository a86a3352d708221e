"""How good a model file is, how sure we are of that, and the pages that say so.

evaluation engine_process    the GGUF itself on held-out records, in processes of its own
metrics calibrate peers      intervals and tests; confidence; the system a user would pick instead
categories regressions       what a record is about; where one model lost against another
economics claims             what an answer costs; the one place that may write a sentence about models
evidence schema              the bundle of a release, and its types
report charts                its page, and the page of a run
"""
