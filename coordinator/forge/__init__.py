"""The forge: from a teacher to a small quantised student, with evidence.

pipeline     all stages, cached and resumable
teachers/    who teaches
synthesis/   new targets from the teacher, gated and scored
targets/     what the teacher said and how sure it was, kept on disk
students/    what the student is, and the file it becomes
training/    what it minimises, and how
judging/     what came of it: evaluation, intervals, evidence, pages
pairs        a user's own files
"""
