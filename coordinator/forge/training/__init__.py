"""What is minimised and how.

losses objective          divergences as small functions; one loss out of several, on what the cache holds
recipe scale              how a model is trained, and by how many processes
rounds                    a feed that grows while training runs, replayed after a kill
on_policy speculative     the student writes, the teacher scores once; in blocks that the teacher prunes
rewards polish            what is a good answer, and learning from which of several are better
"""
